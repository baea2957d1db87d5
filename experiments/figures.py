"""The figures of a report beyond those of :mod:`gmoe.plot`, and the HTML file that holds them.

Shapes: B images, h x w patches, T tokens, E experts.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from experiments.data import Task
from experiments.run_folder import RunFolder
from gmoe.plot import patch_weights

STYLE = """
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2733; max-width: 1120px; margin: 0 auto;
       padding: 1rem clamp(.8rem, 4vw, 2rem); overflow-wrap: anywhere; }
h2 { margin-top: 2.4rem; border-bottom: 2px solid #1f77b4; }
.lead { font-size: 1.15rem; border-left: 4px solid #1f77b4; padding-left: .8rem; }
.warn { background: #fff4e0; border-left: 4px solid #ff9f1c; padding: .4rem .8rem; }
p, figcaption { max-width: 80ch; } figcaption, .note { color: #52606d; font-size: 14px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 15px; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #e3e8ed; text-align: right; }
th:first-child, td:first-child { text-align: left; padding-left: 0; min-width: 7em; } td { white-space: nowrap; }
.row { display: flex; flex-wrap: wrap; gap: 1rem 1.5rem; }
figure { margin: .6rem 0; max-width: 100%; } img { max-width: 100%; height: auto; display: block; }
"""


class Page(list[str]):
    """The parts of one HTML file that needs nothing else, for wide screens and phones."""

    def heading(self, text: str, level: int = 2) -> None:
        """Add a heading: 2 for sections, 3 inside them."""
        self.append(f"<h{level}>{escape(text)}</h{level}>")

    def text(self, text: str, kind: str = "") -> None:
        """Add a paragraph; ``kind`` is "lead", "note", "warn" or nothing."""
        self.append(f'<p class="{kind}">{escape(text)}</p>')

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        """Add a table, header first, which scrolls by itself where it is too wide."""
        tags = ["th", *["td"] * (len(rows) - 1)]
        cells = ("".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) for tag, row in zip(tags, rows, strict=True))
        self.append(f'<div class="scroll"><table><tr>{"</tr><tr>".join(cells)}</tr></table></div>')

    def figures(self, figures: Sequence[Figure], caption: str) -> None:
        """Add figures side by side, where there is room, and one caption below."""
        images = []
        for figure in figures:
            content = io.BytesIO()
            figure.savefig(content, format="png", dpi=150)
            data, width = base64.b64encode(content.getvalue()).decode(), round(96 * figure.get_figwidth())
            images.append(f'<img width="{width}" alt="{escape(caption)}" src="data:image/png;base64,{data}">')
        row = f'<div class="row">{"".join(images)}</div>'
        self.append(f"<figure>{row}<figcaption>{escape(caption)}</figcaption></figure>")

    def write(self, path: Path) -> None:
        """Write the file, and the folders that it needs."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Routing report</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
            f"<style>{STYLE}</style></head><body><h1>Routing report</h1>{''.join(self)}</body></html>\n",
            encoding="utf-8",
        )


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Images and what a model did with their patches."""

    images: Tensor  # (B, C, H, W) as the model takes them
    labels: Tensor  # (B,)
    weights: list[Tensor]  # a MoE layer (B, h, w, E)
    pictures: Tensor  # (B, C, H, W) in 0..1

    def properties(self, layer: int) -> dict[str, Tensor]:
        """(B * h * w,) the class and the place of every patch."""
        batch, h, w, _ = self.weights[layer].shape
        return {"label": self.labels.repeat_interleave(h * w), "place": torch.arange(h * w).repeat(batch)}

    def top_expert(self, layer: int) -> Tensor:
        """(B * h * w,) the expert of largest weight on every patch; E where it has none."""
        weight_TE = self.weights[layer].flatten(0, 2)
        return weight_TE.argmax(dim=1).where(weight_TE.sum(dim=1) > 0, weight_TE.size(1))


def look(model: nn.Module, task: Task, most: int = 1024) -> Seen:
    """Run the model on validation images, shuffled since they may lie class by class."""
    images, labels, weights = list[Tensor](), list[Tensor](), list[list[Tensor]]()
    for batch in task.loader("val", 128, 0):
        (inputs,) = batch.inputs
        images.append(inputs)
        labels.append(batch.target)
        weights.append(patch_weights(model, inputs))
        if sum(map(len, images)) >= most:
            break
    stack = torch.cat(images)[:most]
    mean, std = (torch.tensor(value)[:, None, None] for value in (task.mean, task.std))
    return Seen(
        images=stack,
        labels=torch.cat(labels)[:most],
        weights=[torch.cat(parts)[:most] for parts in zip(*weights, strict=True)],
        pictures=(stack * std + mean).clamp(0, 1),
    )


def learning_curves(runs: Sequence[RunFolder]) -> list[Figure]:
    """Validation metric and training loss: the mean over seeds, and the band from the lowest to the highest."""
    figures = []
    for name, factor, label in (
        ("val", 100, f"validation {runs[0].summary['metric']} (%)"),
        ("loss", 1, "training loss"),
    ):
        figure = Figure(figsize=(4.8, 3.4), layout="constrained")
        axis = figure.subplots()
        for run in runs:
            epoch, values = run.summary["curve"]["epoch"], factor * np.array(run.summary["curve"][name])
            if len(epoch) > 1:
                (line,) = axis.plot(epoch, values.mean(axis=0), label=f"{run.name} (n = {len(values)})")
                axis.fill_between(epoch, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.2)
        axis.set(xlabel="epoch", ylabel=label)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize="small")
            figures.append(figure)
    return figures


def shares(weight_TE: Tensor, value_T: Tensor) -> Tensor:
    """(E + 1, V) of each expert's weights the share of every value; last the share of the values among all tokens.

    Tokens whose integer in ``value_T`` is below 0 are left out.
    """
    known = value_T >= 0
    weight_TE = torch.cat([weight_TE, torch.ones(len(value_T), 1)], dim=1)[known].double()
    total_VE = torch.zeros(int(value_T.max()) + 1, weight_TE.size(1), dtype=torch.double)
    total_VE = total_VE.index_add(0, value_T[known], weight_TE)
    return (total_VE / total_VE.sum(dim=0).clamp(min=1e-12)).T


def share_map(weight_TE: Tensor, value_T: Tensor, title: str, names: Sequence[str] = ()) -> Figure:
    """:func:`shares` as a heat map, an expert a row."""
    share = shares(weight_TE, value_T)
    figure = Figure(figsize=(4.6, 1.3 + 0.25 * len(share)), layout="constrained")
    axis = figure.subplots()
    figure.colorbar(axis.imshow(share.numpy(), aspect="auto", cmap="Blues", vmin=0), ax=axis)
    axis.set_yticks(range(len(share)), [*map(str, range(len(share) - 1)), "all"])
    axis.set(xlabel=title, ylabel="expert")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(names) == share.size(1):
        turned = max(map(len, names)) > 2
        axis.set_xticks(range(len(names)), names, rotation=90 if turned else 0, fontsize="small")
    return figure


def gallery(seen: Seen, layer: int, classes: Sequence[str], per_expert: int = 8) -> Figure:
    """A row an expert: the patches on which its weight is largest, at most one of an image."""
    _, h, w, experts = seen.weights[layer].shape
    high, wide = seen.pictures.size(2) // h, seen.pictures.size(3) // w
    figure = Figure(figsize=(0.7 * per_expert + 0.4, 0.92 * experts), layout="constrained")
    for expert, axes in enumerate(figure.subplots(experts, per_expert, squeeze=False)):
        best_B, patch_B = seen.weights[layer][..., expert].flatten(1).max(dim=1)
        images = best_B.argsort(descending=True, stable=True)[:per_expert].tolist()
        for axis in axes:
            axis.set_axis_off()
        for axis, image in zip(axes, images, strict=False):
            if best_B[image] > 0:
                row, column = high * (int(patch_B[image]) // w), wide * (int(patch_B[image]) % w)
                crop = seen.pictures[image].expand(3, -1, -1)[:, row : row + high, column : column + wide]
                axis.imshow(crop.permute(1, 2, 0).numpy(), interpolation="nearest")
                axis.set_title(classes[int(seen.labels[image])][:10], fontsize=8, pad=2)
        axes[0].text(-0.15, 0.5, str(expert), transform=axes[0].transAxes, ha="right", va="center")
    return figure


def places(seen: Seen, layer: int) -> Figure:
    """How often each expert takes the patch at each place of the image."""
    often = (seen.weights[layer] > 0).double().mean(dim=0)
    rows = -(-often.size(-1) // 4)
    figure = Figure(figsize=(4.6, 1.25 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, 4, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    for expert, axis in zip(range(often.size(-1)), axes, strict=False):
        image = axis.imshow(often[..., expert].numpy(), vmin=0, vmax=float(often.max()), cmap="magma")
        axis.set_title(str(expert), fontsize="small", pad=2)
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure
