"""The page of ``experiments.report``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch_geometric.data import Data

from experiments.data import Task
from experiments.report import figures
from experiments.report.findings import FOLLOWED, PROPERTIES, edges_within, sentence, similarity
from experiments.report.page import Page
from experiments.routing_stats import alignment, node_properties
from experiments.run_folder import RunFolder, load_model, read_run
from experiments.tables import percent
from gmoe.plot import expert_load, expert_maps

MOST_MAPPED = 6
"""Images in a map of patches, each of another class."""

NODE_PROPERTIES = {"label": "class", "degree": "degree (bin)", "homophily": "local homophily (bin)"}
"""What :func:`~experiments.structure.node_properties` finds, in words."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A run with experts and its data.

    Args:
        run: the folder.
        layers: by MoE layer, the figures of its routing by name, each a mean over seeds.
        task: the data as the first seed saw them; ``None`` where they are not there.
        model: of an image run, that of the first seed.
        seen: images through it.
        missing: why there are no maps.
    """

    run: RunFolder
    layers: list[dict[str, float]]
    task: Task | None = None
    model: nn.Module | None = None
    seen: figures.Seen | None = None
    missing: str = ""


def report(folders: Sequence[Path], out: Path, data_root: Path | None) -> tuple[Path, dict[str, str]]:
    """Make the page.

    Args:
        folders: of the runs.
        out: the folder of the page.
        data_root: where the data are (default: where each run was trained on them).

    Returns:
        The page, and by run folder why it was left out.

    Raises:
        ValueError: no run can be read.
    """
    runs, failed = list[RunFolder](), dict[str, str]()
    for folder in dict.fromkeys(folder.resolve() for folder in folders):
        try:
            runs.append(read_run(folder, data_root))
        except ValueError as error:
            failed[str(folder)] = str(error)
    if not runs:
        raise ValueError("; ".join(failed.values()) or "runs: got none, expected at least one folder")
    names = [run.name for run in runs]
    runs = [replace(run, name=str(run.folder)) if names.count(run.name) > 1 else run for run in runs]
    opened = [_open(run) for run in runs if _has_experts(run)]
    page = Page("Routing report")
    for one in opened:
        dead = [count for layer in one.run.summary["routing"] for count in layer["dead"]["values"]]
        page.text(f"{one.run.name}: {sentence(one.run.config.experts, dead, one.layers)}", "lead")
    for reason in failed.values():
        page.text(f"Left out: {reason}", "warn")
    _results(page, runs)
    for name, mine in _by_data(runs).items():
        _training(page, name, mine)
    for one in opened:
        _routing(page, one)
    path = out / "index.html"
    page.write(path)
    return path, failed


def _has_experts(run: RunFolder) -> bool:
    return bool(run.seeds[run.config.seeds[0]].routings)


def _open(run: RunFolder) -> Opened:
    seed = run.config.seeds[0]
    layers = [{name: value["mean"] for name, value in layer.items()} for layer in run.summary["routing"]]
    try:
        task = run.load_task(seed)
        if task.kind != "image":
            return Opened(run=run, layers=layers, task=task)
        model = load_model(run.folder, run.config, task, seed)
        seen = figures.look(model, task)
    except (FileNotFoundError, ValueError) as error:
        return Opened(run=run, layers=layers, missing=str(error))
    for number, weight in enumerate(seen.weights):
        weight_TE = weight.flatten(0, 2)
        expert = weight_TE.argmax(dim=1).where(weight_TE.sum(dim=1) > 0, weight_TE.size(1))
        found = alignment(expert, seen.properties(number))
        layers[number] |= {f"ami_{name}": value for name, value in found.items()}
    return Opened(run=run, layers=layers, task=task, model=model, seen=seen)


def _by_data(runs: Sequence[RunFolder]) -> dict[str, list[RunFolder]]:
    """The runs on the same data, by what these are called; graphs and images of one's own go by their content."""
    groups: dict[tuple[str, str | None], list[RunFolder]] = {}
    for run in runs:
        groups.setdefault((run.science.get("file") or run.config.dataset, run.science.get("digest")), []).append(run)
    names = [name for name, _ in groups]
    return {f"{name} ({digest})" if names.count(name) > 1 else name: mine for (name, digest), mine in groups.items()}


def _results(page: Page, runs: Sequence[RunFolder]) -> None:
    page.heading("Results")
    columns = []
    for run in runs:
        summary, dense = run.summary, not _has_experts(run)
        columns.append(
            {
                "": run.name,
                "data": run.config.dataset,
                "router": run.config.router,
                "experts, K": "–" if dense else f"{run.config.experts}, {run.config.k}",
                "metric": summary["metric"],
                "validation (%)": percent(summary["val"]),
                "test (%)": percent(summary["test"]),
                "seeds": str(summary["test"]["n"]),
                "active FLOPs": f"{summary['flops']:.3g}",
                "parameters": f"{summary['parameters']:,}",
                "active parameters": f"{summary['active_parameters']:,}",
                "seconds a seed": f"{summary['seconds']['mean']:,.0f}",
                "peak memory (MiB)": f"{summary['peak_memory']:,}",
            }
        )
    header, *rows = ([name, *(column[name] for column in columns)] for name in columns[0])
    page.table(header, rows)
    page.text("Validation selects the epoch; the test set is read once. Mean ± sample standard deviation.", "note")


def _training(page: Page, dataset: str, runs: Sequence[RunFolder]) -> None:
    curves = figures.learning_curves(runs)
    if curves:
        page.heading(f"{dataset}: learning curves")
        page.figures(curves, "Mean over seeds, and the band from the lowest to the highest.")
    found = similarity(runs)
    if found is None:
        return
    between, shuffled = found
    page.heading(f"{dataset}: do two runs find the same experts?", 3)
    page.table(["seeds of", "and of", "AMI"], [[one, other, _short(value)] for (one, other), value in between.items()])
    page.text(
        "Adjusted mutual information of the tokens' experts, mean over the MoE layers: 1 if two routings agree up to "
        f"the experts' numbers, 0 by chance or where one uses a single expert. Shuffled: {_short(shuffled)}.",
        "note",
    )


def _routing(page: Page, one: Opened) -> None:
    run, task = one.run, one.task
    seed = run.config.seeds[0]
    page.heading(f"{run.name}: routing")
    epochs: dict[float | None, list[dict[str, Tensor]]] = {}
    for row in run.seeds[seed].routing:
        load = [value for name, value in row.items() if name.startswith("load_") and value is not None]
        epochs.setdefault(row["epoch"], []).append({"load": torch.tensor(load)})
    page.figures([expert_load(list(epochs.values()))], f"Load of each expert in each epoch's steps, seed {seed}.")
    page.table(
        ["MoE layer", *(str(number) for number in range(1, len(one.layers) + 1))],
        [[_words(name), *(_short(layer[name]) for layer in one.layers)] for name in one.layers[0]],
    )
    split = "all nodes" if one.seen is None else f"the test images; AMI on validation images of seed {seed}"
    page.text(
        f"Mean over seeds, on {split}. Dropped pairs had no room at their expert; dead "
        "experts get no token; entropy is in nats. AMI: adjusted mutual information of experts and a property, 1 if "
        f"they are the same partition, 0 by chance; experts count as following it from {FOLLOWED} on.",
        "note",
    )
    if task is None:
        page.text(f"Not drawn: {one.missing}", "warn")
    elif one.seen is not None and one.model is not None:
        _images(page, one.model, one.seen, task)
    elif isinstance(task.graph, Data):
        _graph(page, run, task, task.graph)
    else:
        page.text("Maps of heterogeneous graphs are not drawn.", "warn")


def _short(value: float) -> str:
    """Three decimals, and no -0.000."""
    return f"{round(value, 3) + 0.0:.3f}"


def _words(name: str) -> str:
    if name in PROPERTIES:
        return "{1} with the {0}".format(*PROPERTIES[name])
    return "AMI, shuffled experts" if name == "ami_shuffled" else name.replace("_", " ")


def _images(page: Page, model: nn.Module, seen: figures.Seen, task: Task) -> None:
    layers = range(len(seen.weights))
    chosen = [int((seen.labels == label).nonzero()[0]) for label in seen.labels.unique()[:MOST_MAPPED]]
    page.heading("Which patches go to which expert?", 3)
    titles = [task.classes[int(seen.labels[image])] for image in chosen]
    page.figures(
        [expert_maps(model, seen.images[chosen], mean=task.mean, std=task.std, titles=titles)],
        "Validation images: each patch has the color of its expert, or of its experts mixed by weight; dark patches "
        "have none. Experts of different layers have nothing to do with each other.",
    )
    page.figures(
        [
            figures.share_map(
                figures.shares(seen.weights[layer].flatten(0, 2), seen.properties(layer)["label"]),
                f"class, MoE layer {layer + 1}",
                task.classes,
            )
            for layer in layers
        ],
        "Of the weights of each expert, the share on patches of every class. A row like the last one says that the "
        "expert does not go by class.",
    )
    page.figures(
        [figures.places(seen, layer) for layer in layers],
        "A panel an expert, by MoE layer: how often it takes the patch at each place.",
    )
    for layer in layers:
        page.figures(
            [figures.gallery(seen, layer, task.classes)],
            f"MoE layer {layer + 1}: the patches of largest weight of each expert, one an image, with the image's "
            f"class, among {len(seen.images):,} validation images.",
        )


def _graph(page: Page, run: RunFolder, task: Task, graph: Data) -> None:
    seed = run.config.seeds[0]
    routings = run.seeds[seed].routings
    if {routing.num_tokens for routing in routings} != {graph.num_nodes}:
        page.text("The run was evaluated in batches: its tokens are not the nodes, and are not drawn.", "warn")
        return
    page.heading("Which nodes go to which expert?", 3)
    rows = []
    for layer in range(len(routings)):
        pairs = [edges_within(graph, log.routings[layer]) for log in run.seeds.values()]
        within, chance = (statistics.fmean(values) for values in zip(*pairs, strict=True))
        rows.append([str(layer + 1), f"{100 * within:.1f}", f"{100 * chance:.1f}"])
    page.table(["MoE layer", "edges within an expert (%)", "by chance (%)"], rows)
    properties = {} if task.planted is None else {"planted region": task.planted}
    for name, value in node_properties(graph).items():
        if name != "label":  # bins without a node
            known = value >= 0
            value[known] = value[known].unique(return_inverse=True)[1]
        properties[NODE_PROPERTIES[name]] = value
    for layer, routing in enumerate(routings, start=1):
        page.figures(
            [
                figures.share_map(
                    figures.shares(routing.to_dense(), value), name, task.classes if name == "class" else ()
                )
                for name, value in properties.items()
            ],
            f"MoE layer {layer}, seed {seed}: of the weights of each expert, the share on nodes of every kind; degree "
            "and local homophily (neighbors of the same class) in bins from few to many. A row like the last one says "
            "that the expert does not go by it.",
        )
