"""The page of ``experiments.report``. Shapes: B images, h x w patches, T tokens, E experts."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from experiments.train.config import ERRORS, ImageConfig, MoleculeConfig
from experiments.train.data.task import Batch
from experiments.train.files import replacing
from experiments.train.results import flops_of
from experiments.train.routing_stats import (
    IN_WORDS,
    advice,
    alignment,
    in_words,
    values_of,
)
from experiments.train.run_folder import RunFolder, read_run
from experiments.train.scores import differences, form_of, mean_std, scored, unit
from experiments.train.user_code import code_of, frames_of, raised
from gmoe.plot import expert_load, expert_maps, patch_weights

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
th:first-child, td:first-child { text-align: left; padding-left: 0; min-width: 7em; }
td { white-space: nowrap; }
.row { display: flex; flex-wrap: wrap; gap: 1rem 1.5rem; }
figure { margin: .6rem 0; max-width: 100%; } img { max-width: 100%; height: auto; display: block; }
"""

MEASURED = {
    "nodes": "all nodes",
    "patches": "the test images; AMI on validation images of the first seed",
    "atoms": "the test molecules",
}
"""What the figures of the routing are of, by what is routed."""
DRAWN = (
    "Validation images: each patch has the color of its expert, or of its experts mixed by weight; "
    "dark patches have none. Below, by layer, patches that each expert takes, every n-th of them. "
    "Experts of different layers have nothing to do with each other."
)
"""What is drawn of images."""
MOST_IMAGES = 1024
"""Validation images, about, whose patches are looked at."""


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
        cells = (
            "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)
            for tag, row in zip(tags, rows, strict=True)
        )
        self.append(f'<div class="scroll"><table><tr>{"</tr><tr>".join(cells)}</tr></table></div>')

    def figures(self, figures: Sequence[Figure], caption: str) -> None:
        """Add figures side by side, where there is room, and one caption below."""
        images = []
        for figure in figures:
            content = io.BytesIO()
            figure.savefig(content, format="png", dpi=150)
            data = base64.b64encode(content.getvalue()).decode()
            width = round(96 * figure.get_figwidth())
            images.append(
                f'<img width="{width}" alt="{escape(caption)}" src="data:image/png;base64,{data}">'
            )
        row = f'<div class="row">{"".join(images)}</div>'
        self.append(f"<figure>{row}<figcaption>{escape(caption)}</figcaption></figure>")

    def write(self, path: Path) -> None:
        """Write the file, and the folders that it needs."""
        path.parent.mkdir(parents=True, exist_ok=True)
        page = (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            "<title>Routing report</title>"
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<link rel="icon" href="data:,"><style>{STYLE}</style></head>'
            f"<body><h1>Routing report</h1>{''.join(self)}</body></html>\n"
        )
        with replacing(path) as fresh:
            fresh.write_text(page, encoding="utf-8")


def write_report(
    folders: Sequence[Path],
    path: Path,
    data_root: Path | None,
    trust: bool = False,
) -> list[str]:
    """Write the page about runs, and say why some were left out.

    If all were, it is a ``ValueError``. ``data_root`` and ``trust`` are those of
    :func:`experiments.train.run_folder.read_run`.
    """
    runs = list[RunFolder]()
    failed = list[str]()
    for folder in {folder.resolve(): folder for folder in folders}.values():
        try:
            runs.append(read_run(folder, data_root, trust))
        except ValueError as error:
            failed.append(str(error))
    if not runs:
        raise ValueError("; ".join(failed) or "runs: got none, expected at least one folder")
    names = [run.name for run in runs]
    runs = [
        replace(run, name=str(run.folder)) if names.count(run.name) > 1 else run for run in runs
    ]
    page = Page()
    routing = Page()
    for run in runs:
        if run.history:
            page.text(f"{run.name}: {_routing(routing, run)}", "lead")
            if line := advice(values_of(run.summary["routing"]), run.config):
                page.text(f"{run.name}: {line}", "warn")
    for reason in failed:
        page.text(f"Left out: {reason}", "warn")
    _results(page, runs)
    for data, metric in dict.fromkeys((data_of(run), run.summary["metric"]) for run in runs):
        of_data = [run for run in runs if (data_of(run), run.summary["metric"]) == (data, metric)]
        if curves := learning_curves(of_data):
            page.heading(f"{data[0]}: learning curves")
            page.figures(curves, "Mean over seeds, and the band from the lowest to the highest.")
    page.extend(routing)
    page.write(path)
    print(f"written to {path}")
    return failed


def data_of(run: RunFolder) -> tuple[str, ...]:
    """What its data are called, and what ``config.json`` knows of their content."""
    name = run.config.data or run.science.get("file", run.config.dataset)
    return (name, run.science.get("digest") or "", run.science.get("contents") or "")


def _results(page: Page, runs: Sequence[RunFolder]) -> None:
    has_errors = any(run.summary["metric"] in ERRORS for run in runs)
    shares = "(%; errors as they are)" if has_errors else "(%)"
    columns = [
        {
            "": run.name,
            "data": run.config.dataset,
            "model": run.config.model or "–",
            "router": run.config.router if is_built(run) else "–",
            "experts, K": f"{run.config.experts}, {run.config.k}"
            if run.history and is_built(run)
            else "–",
            "metric": run.summary["metric"],
            f"validation {shares}": scored(run.summary["metric"], run.summary["val"]),
            f"test {shares}": scored(run.summary["metric"], run.summary["test"]),
            "test − dense run (points)" if not has_errors else "test − dense run": above_dense(
                run, runs
            ),
            "test top-5 (%)": scored("accuracy", run.summary["top5"])
            if "top5" in run.summary
            else "–",
            "seeds": str(run.summary["test"]["n"]),
            "active MFLOPs": mflops_of(run),
            "parameters": f"{run.summary['parameters']:,}",
            "active parameters": f"{run.summary['active_parameters']:,}",
            "seconds a seed": f"{run.summary['seconds']['mean']:,.1f}",
        }
        for run in runs
    ]
    page.heading("Results")
    lines = [[name, *(column[name] for column in columns)] for name in columns[0]]
    page.table([line for line in lines if not line[0] or set(line[1:]) != {"–"}])
    page.text(
        "Validation selects the epoch; the test set is read once. Mean ± sample standard "
        "deviation; of differences to the dense run of the same data and seeds, seed by seed.",
        "note",
    )
    if alone := [run.name for run in runs if run.history and dense_beside(run, runs) is None]:
        page.text(
            f"No dense run of the same data and seeds is beside {', '.join(alone)}. To see what "
            "experts add, train one with --router dense, and give both to the report.",
            "note",
        )


def mflops_of(run: RunFolder) -> str:
    """Its active FLOPs in millions, and what of."""
    flops, each = flops_of(run.summary)
    return f"{flops / 1e6:,.1f} {each}"


def dense_beside(run: RunFolder, runs: Sequence[RunFolder]) -> RunFolder | None:
    """The first dense run of the same data, seeds and metric."""
    for other in runs:
        is_same = data_of(other) == data_of(run) and other.config.seeds == run.config.seeds
        is_same &= other.summary["metric"] == run.summary["metric"]
        if is_same and other.config.router == "dense" and other is not run:
            return other
    return None


def is_built(run: RunFolder) -> bool:
    """Whether the options of a run say which router and experts it has; a user's model says it."""
    return run.config.model is None or bool(run.config.own_models())


def above_dense(run: RunFolder, runs: Sequence[RunFolder]) -> str:
    """Points above the dense run beside it, seed by seed."""
    dense = dense_beside(run, runs)
    if dense is None:
        return "–"
    metric = run.summary["metric"]
    values = differences(metric, run.summary["test"]["values"], dense.summary["test"]["values"])
    return mean_std(values, form_of(metric))


def _routing(page: Page, run: RunFolder) -> str:
    """Write a run's section, and say the most important of it in a sentence."""
    seed = run.config.seeds[0]
    missing = ""
    maps = list[Figure]()
    kinds = {ImageConfig: "patches", MoleculeConfig: "atoms"}
    tokens = kinds.get(type(run.config), "nodes")
    layers = values_of(run.summary["routing"])
    try:
        if tokens == "patches":
            shown, maps = _patches(run)
            for layer, (weight, known) in zip(layers, shown, strict=True):
                expert = weight.argmax(dim=1).where(weight.sum(dim=1) > 0, weight.size(1))
                alignments = alignment(
                    expert, {name.removeprefix("ami_"): value for name, value in known.items()}
                )
                layer |= {f"ami_{name}": [value] for name, value in alignments.items()}
    except (FileNotFoundError, ValueError) as error:
        missing = f"Not drawn: {error}"
    except Exception as error:
        code = code_of(run.config)
        if not frames_of(error, *code):  # a fault of ours
            raise
        missing = f"Not drawn: {raised(error, *code)}"
    page.heading(f"{run.name}: routing")
    page.figures(
        [expert_load(run.history, xlabel="epoch")],
        f"Load of each expert in each epoch's steps, seed {seed}.",
    )
    header = ["MoE layer", *(str(number) for number in range(1, len(layers) + 1))]
    rows = {name: [f"{fmean(layer[name]):.3f}" for layer in layers] for name in layers[0]}
    page.table([header, *([name.replace("_", " "), *row] for name, row in rows.items())])
    page.text(
        f"Mean over seeds, on {MEASURED[tokens]}. Dropped pairs had no room at their expert; dead "
        "experts get no token; entropy is in nats. AMI: adjusted mutual information of experts and "
        f"a property, 1 if they are the same partition, 0 by chance. {IN_WORDS}",
        "note",
    )
    if missing:
        page.text(missing, "warn")
    if maps:
        page.heading("Which patches go to which expert?", 3)
        page.figures(maps, DRAWN)
    return in_words(layers, run.config)


def _patches(run: RunFolder) -> tuple[list[tuple[Tensor, dict[str, Tensor]]], list[Figure]]:
    """Validation images: by MoE layer (T, E) the weights of the experts, and (T,) what they may
    follow, as in :data:`PROPERTIES`; and maps of images, each of another class."""
    from vision.maps import expert_patches  # torchvision, which graphs do without

    task = run.load_task()
    model = run.load_model(task)
    batches = list[Batch]()
    weights = list[list[Tensor]]()
    for batch in task.loader("val", 128, 0):  # shuffled, since they may lie class by class
        batches.append(batch)
        weights.append(patch_weights(model, batch.inputs[0]))
        if sum(len(one.target) for one in batches) >= MOST_IMAGES:
            break
    images = torch.cat([one.inputs[0] for one in batches])
    labels = torch.cat([one.target for one in batches])
    shown = []
    by_layer = [torch.cat(parts) for parts in zip(*weights, strict=True)]
    for weight_BhwE in by_layer:
        number = weight_BhwE[0, ..., 0].numel()
        known = {
            "ami_label": labels.repeat_interleave(number),
            "ami_place": torch.arange(number).repeat(len(labels)),
        }
        shown.append((weight_BhwE.flatten(0, 2), known))
    chosen = [int((labels == label).nonzero()[0]) for label in labels.unique()[:6]]
    titles = [task.classes[int(labels[image])] for image in chosen]
    maps = expert_maps(model, images[chosen], mean=task.mean, std=task.std, titles=titles)
    return shown, [maps, *expert_patches(images, by_layer, task.mean, task.std)]


def learning_curves(runs: Sequence[RunFolder]) -> list[Figure]:
    """Validation metric and training loss.

    The mean over seeds, and the band from the lowest to the highest.
    """
    figures = []
    metric = runs[0].summary["metric"]
    val = f"validation {metric}{unit(metric)}"
    share = 1 if metric in ERRORS else 100
    for name, factor, label in (("val", share, val), ("loss", 1, "training loss")):
        figure = Figure(figsize=(4.8, 3.4), layout="constrained")
        axis = figure.subplots()
        for run in runs:
            curve: Any = run.summary["curve"]
            if len(curve["epoch"]) > 1:
                epoch = curve["epoch"]
                values = factor * np.array(curve[name])
                (line,) = axis.plot(
                    epoch, values.mean(axis=0), label=f"{run.name} (n = {len(values)})"
                )
                axis.fill_between(
                    epoch, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.2
                )
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize="small")
            figures.append(figure)
    return figures
