"""Figures of a report beyond those of :mod:`gmoe.plot`. Shapes: B images, h x w patches, T tokens, E experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from experiments.data import Task
from experiments.run_folder import RunFolder
from gmoe.plot import patch_weights

MOST_IMAGES = 1024
"""Validation images that galleries and shares are made of."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Images and what was done with their patches.

    Args:
        images: (B, C, H, W) as the model takes them.
        labels: (B,).
        weights: a MoE layer (B, h, w, E).
        pictures: (B, C, H, W) in 0..1.
    """

    images: Tensor
    labels: Tensor
    weights: list[Tensor]
    pictures: Tensor

    def properties(self, layer: int) -> dict[str, Tensor]:
        """(B * h * w,) the class and the place of every patch."""
        batch, h, w, _ = self.weights[layer].shape
        return {"label": self.labels.repeat_interleave(h * w), "place": torch.arange(h * w).repeat(batch)}


def look(model: nn.Module, task: Task, most: int = MOST_IMAGES, seed: int = 0) -> Seen:
    """Run the model on validation images, shuffled by ``seed`` since they may lie class by class."""
    images, labels, weights = list[Tensor](), list[Tensor](), list[list[Tensor]]()
    for batch in task.loader("val", 128, seed):
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
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        if axis.lines and len(runs) > 1:
            axis.legend(fontsize="small")
        figures += [figure] if axis.lines else []
    return figures


def shares(weight_TE: Tensor, value_T: Tensor) -> np.ndarray:
    """(E + 1, V) of each expert's weights the share of every value; last the share of the values among all tokens.

    Args:
        weight_TE: of every expert on every token.
        value_T: integers; tokens below 0 are left out.
    """
    known = value_T >= 0
    weight_TE = torch.cat([weight_TE, torch.ones(len(value_T), 1)], dim=1)[known].double()
    total_VE = torch.zeros(int(value_T.max()) + 1, weight_TE.size(1), dtype=torch.double)
    total_VE = total_VE.index_add(0, value_T[known], weight_TE)
    share: np.ndarray = (total_VE / total_VE.sum(dim=0).clamp(min=1e-12)).T.numpy()
    return share


def share_map(share: np.ndarray, title: str, names: Sequence[str] = ()) -> Figure:
    """:func:`shares` as a heat map, an expert a row."""
    figure = Figure(figsize=(4.6, 1.3 + 0.25 * len(share)), layout="constrained")
    axis = figure.subplots()
    figure.colorbar(axis.imshow(share, aspect="auto", cmap="Blues", vmin=0), ax=axis)
    axis.set_yticks(range(len(share)), [*map(str, range(len(share) - 1)), "all"])
    axis.set(xlabel=title, ylabel="expert")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(names) == share.shape[1]:
        turned = max(map(len, names)) > 2
        axis.set_xticks(range(len(names)), names, rotation=90 if turned else 0, fontsize="small")
    return figure


def gallery(seen: Seen, layer: int, classes: Sequence[str], per_expert: int = 8) -> Figure:
    """A row an expert: the patches on which its weight is largest, at most one of an image."""
    _, h, w, experts = seen.weights[layer].shape
    high, wide = seen.pictures.size(2) // h, seen.pictures.size(3) // w
    figure = Figure(figsize=(0.7 * per_expert + 0.4, 0.92 * experts), layout="constrained")
    grid = figure.subplots(experts, per_expert, squeeze=False)
    for axis in grid.flat:
        axis.set_axis_off()
    for expert, axes in enumerate(grid):
        best_B, patch_B = seen.weights[layer][..., expert].flatten(1).max(dim=1)
        images = best_B.argsort(descending=True, stable=True)[:per_expert].tolist()
        for axis, image in zip(axes, images, strict=False):
            if best_B[image] > 0:
                row, column = high * (int(patch_B[image]) // w), wide * (int(patch_B[image]) % w)
                crop = seen.pictures[image].expand(3, -1, -1)[:, row : row + high, column : column + wide]
                axis.imshow(crop.permute(1, 2, 0).numpy(), interpolation="nearest")
                axis.set_axis_on()
                axis.set(xticks=[], yticks=[])
                axis.set_title(classes[int(seen.labels[image])][:10], fontsize=8, pad=2)
        axes[0].text(-0.15, 0.5, str(expert), transform=axes[0].transAxes, ha="right", va="center")
    return figure


def places(seen: Seen, layer: int) -> Figure:
    """How often each expert takes the patch at each place of the image."""
    often = (seen.weights[layer] > 0).double().mean(dim=0)
    experts = often.size(-1)
    rows = -(-experts // 4)
    figure = Figure(figsize=(4.6, 1.25 * rows + 0.3), layout="constrained")
    for expert, axis in enumerate(figure.subplots(rows, 4, squeeze=False).flat):
        axis.set_axis_off()
        if expert < experts:
            image = axis.imshow(often[..., expert].numpy(), vmin=0, vmax=float(often.max()), cmap="magma")
            axis.set_title(str(expert), fontsize="small", pad=2)
    figure.colorbar(image, ax=figure.axes, shrink=0.8)
    return figure
