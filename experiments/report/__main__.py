"""One page from finished runs: ``python -m experiments.report RUN... --out DIR [--data-root DIR]``.

    python -m experiments.train digits --router expert_choice --out runs/digits
    python -m experiments.report runs/digits --out runs/report

Writes ``index.html``, which holds all that it shows and works from disk, the figures as PNG, and for graphs the experts
of every node as CSV. Maps of patches and of nodes need the data of the run; without them they are left out, and the
page says so. A run folder that is broken or not finished is named, the report of the others is made all the same, and
the exit status is then 1.
"""

from __future__ import annotations

import math
import statistics
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape
from torch_geometric.data import Data

from experiments.data import Task
from experiments.report import curves, graph_view, image_view, similarity
from experiments.report.page import Page, file_name
from experiments.run_folder import RunFolder, load_model, read_run
from experiments.tables import percent


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Which runs, and where the page goes."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders."""
    out: Path = Path("runs/report")
    """Folder of the page."""
    data_root: Path = Path("data")
    """Root folder of the data; of a user's own graph its file or folder, or the folder that holds it."""
    images: int = 6
    """Images in a map of patches."""
    title: str = "Routing report"
    """Title of the page."""


def report(config: ReportConfig) -> tuple[Path, dict[str, str]]:
    """Make the page.

    Returns:
        The page, and by run folder why it was left out.

    Raises:
        ValueError: no run can be read, or a number of images below 1.
    """
    if config.images < 1:
        raise ValueError(f"images: got {config.images}, expected at least 1")
    runs, failed = list[RunFolder](), dict[str, str]()
    for folder in config.runs:
        try:
            runs.append(read_run(folder, config.data_root))
        except ValueError as error:
            failed[str(folder)] = str(error)
    if not runs:
        raise ValueError("; ".join(failed.values()) or "runs: got none, expected at least one folder")
    runs = _told_apart(runs)
    page = Page(config.title, config.out)
    for reason in failed.values():
        page.text(f"Left out: {reason}", warn=True)
    _results(page, runs)
    for name, mine in _by_data(runs).items():
        _training(page, name, mine)
        _similar(page, name, mine)
    for run in runs:
        if run.config.router != "dense":
            _routing(page, run, config)
    return page.write(), failed


def _by_data(runs: Sequence[RunFolder]) -> dict[str, list[RunFolder]]:
    """The runs on the same data, by what these are called; graphs and images of one's own go by their content."""
    groups: dict[tuple[str, str | None], list[RunFolder]] = {}
    for run in runs:
        groups.setdefault((run.science.get("file") or run.config.dataset, run.science.get("digest")), []).append(run)
    names = [name for name, _ in groups]
    return {f"{name} ({digest})" if names.count(name) > 1 else name: mine for (name, digest), mine in groups.items()}


def _told_apart(runs: Sequence[RunFolder]) -> list[RunFolder]:
    """The runs, each once; those whose folders have one name are called by their paths."""
    runs = list({run.folder.resolve(): run for run in runs}.values())
    names = [file_name(run.name) for run in runs]
    return [
        replace(run, name=str(run.folder.resolve())) if names.count(name) > 1 else run
        for run, name in zip(runs, names, strict=True)
    ]


def _results(page: Page, runs: Sequence[RunFolder]) -> None:
    page.heading("Results")
    page.text(
        "Validation selects the epoch, the test set is read once, at the end. Mean ± sample standard deviation over n "
        "seeds; memory is the peak of the process (on a GPU, of what torch allocated)."
    )
    header = [
        "run", "data", "router", "E", "K", "metric", "validation (%)", "test (%)", "n", "active FLOPs", "parameters",
        "active", "s a seed", "MiB",
    ]  # fmt: skip
    rows = []
    for run in runs:
        summary, dense = run.summary, run.config.router == "dense"
        rows.append(
            [
                run.name,
                run.config.dataset,
                run.config.router,
                "–" if dense else str(run.config.experts),
                "–" if dense else str(run.config.k),
                summary["metric"],
                percent(summary["val"]),
                percent(summary["test"]),
                str(summary["test"]["n"]),
                f"{summary['flops']:.3g}",
                f"{summary['parameters']:,}",
                f"{summary['active_parameters']:,}",
                f"{summary['seconds']['mean']:,.0f}",
                f"{summary['peak_memory']:,}",
            ]
        )
    page.table(header, rows)


def _training(page: Page, dataset: str, runs: Sequence[RunFolder]) -> None:
    page.heading(f"{dataset}: learning curves and cost")
    page.figure(
        curves.learning_curves(runs),
        f"{dataset}-curves",
        "Mean over seeds, and the band from the lowest to the highest.",
    )
    page.figure(curves.cost(runs), f"{dataset}-cost", "Test metric beside what a forward pass costs; bars are ± std.")


def _similar(page: Page, dataset: str, runs: Sequence[RunFolder]) -> None:
    found = similarity.similarity(runs)
    if found is None:
        return
    page.heading(f"{dataset}: do two runs find the same experts?", 3)
    page.text(
        "Adjusted mutual information of the expert with the largest weight of each token, mean over the MoE layers: 1 "
        "where two routings agree up to the experts' numbers, 0 by chance, and 0 where one of them uses one expert "
        f"only. Shuffled baseline: {found.shuffled:+.3f}."
    )
    if found.others:
        page.text(f"Of other numbers of MoE layers or tokens, and not compared: {', '.join(found.others)}.")
    names = list(dict.fromkeys(found.runs))

    def cell(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    page.table(
        ["", *names],
        [[one, *(cell(found.between(one, other)) for other in names)] for one in names],
    )
    page.figure(
        similarity.draw(found),
        f"{dataset}-similarity",
        "Every pair of runs and seeds. In the table, the diagonal is between seeds of one run.",
    )


def _routing(page: Page, run: RunFolder, config: ReportConfig) -> None:
    page.heading(f"{run.name}: routing")
    seed = run.config.seeds[0]
    page.figure(
        curves.routing_over_training(run),
        f"{run.name}-training",
        f"In training: load and weights of each expert of seed {seed} (those of other seeds have other numbers); "
        "entropy, the share of tokens that have an expert (coverage), of chosen pairs that experts had no capacity for "
        "(dropped) and of experts that no token went to (dead) as means and bands over seeds.",
    )
    layers = run.summary["routing"]
    names = [name for name in layers[0] if not name.startswith("ami_")]
    page.text("On the test split (of a graph: all nodes), with the selected weights; mean ± std over seeds:")
    page.table(
        ["MoE layer", *names],
        [[str(i + 1), *(_plain(layer[name]) for name in names)] for i, layer in enumerate(layers)],
    )
    try:
        task = run.load_task(seed)
        if task.kind == "image":
            _images(page, run, task, config)
        elif isinstance(task.graph, Data):
            _graph(page, run, task, config)
        else:
            page.text("Maps of heterogeneous graphs are not drawn.", warn=True)
    except (FileNotFoundError, ValueError) as error:
        page.text(f"Not drawn: {error}", warn=True)
        Console(stderr=True, soft_wrap=True).print(f"{run.name}, not drawn: {error}", markup=False, highlight=False)


def _plain(figures: dict[str, Any]) -> str:
    std = "" if figures["std"] is None else f" ± {figures['std']:.3f}"
    return f"{figures['mean']:.3f}{std}"


def _images(page: Page, run: RunFolder, task: Task, config: ReportConfig) -> None:
    seed = run.config.seeds[0]
    seen = image_view.look(load_model(run.folder, run.config, task, seed), task)
    assert seen.labels is not None
    name = f"{run.name}-patches"
    chosen = image_view.of_each_class(seen.labels, config.images)
    page.heading(f"{run.name}: which patches go to which expert", 3)
    page.figure(
        image_view.maps(seen, chosen, [task.classes[int(seen.labels[i])] for i in chosen]),
        f"{name}-maps",
        f"Validation images of seed {seed} through all MoE layers: each patch has the color of its expert, or of its "
        "experts mixed by weight; dark patches have none. Colors of different layers are different experts.",
    )
    for layer in range(len(seen.weights)):
        page.figure(
            image_view.gallery(seen, layer, task.classes),
            f"{name}-gallery-{layer + 1}",
            f"MoE layer {layer + 1}: a row an expert, its patches of largest weight among {len(seen.images):,} "
            "validation images, one an image, with the image's class.",
        )
    page.figure(
        image_view.by_class(seen, task.classes),
        f"{name}-classes",
        "Of the weights on each class's patches, the share of every expert: rows alike say that experts do not go by "
        "class.",
    )
    page.figure(
        image_view.by_place(seen),
        f"{name}-places",
        "How often each expert takes the patch at each place: black never, white always.",
    )


def _graph(page: Page, run: RunFolder, task: Task, config: ReportConfig) -> None:
    graph, seed = task.graph, run.config.seeds[0]
    assert isinstance(graph, Data)
    for number, log in run.seeds.items():
        graph_view.write_csv(log.routings, config.out / "csv" / f"{file_name(run.name)}-seed-{number}.csv")
    page.heading(f"{run.name}: which nodes go to which expert", 3)
    routings = run.seeds[seed].routings
    if {routing.num_tokens for routing in routings} != {graph.num_nodes}:
        page.text("The run was evaluated in batches: its tokens are not the nodes, and are not drawn.", warn=True)
        return
    layers = run.summary["routing"]
    followed = sorted(name for name in layers[0] if name.startswith("ami_") and name != "ami_shuffled")
    if followed:
        page.text(
            "Adjusted mutual information of a node's expert with what it could follow: 1 the same partition, 0 by "
            "chance; the last column is the largest with the experts shuffled among the nodes. Mean ± std over seeds."
        )
        columns = [*followed, "ami_shuffled"]
        page.table(
            ["MoE layer", *(name.removeprefix("ami_") for name in columns)],
            [[str(i + 1), *(_plain(layer[name]) for name in columns)] for i, layer in enumerate(layers)],
        )
    rows = []
    for layer in range(len(routings)):
        pairs = [graph_view.edges_within(graph, log.routings[layer]) for log in run.seeds.values()]
        within, chance = (statistics.fmean(values) for values in zip(*pairs, strict=True))
        rows.append(
            [
                str(layer + 1),
                "–" if math.isnan(within) else f"{100 * within:.1f}",
                "–" if math.isnan(chance) else f"{100 * chance:.1f}",
                f"{within / chance:.2f}×" if chance > 0 else "–",
            ]
        )
    page.text("Edges whose two ends have the same expert, and what chance would give; mean over seeds:")
    page.table(["MoE layer", "within (%)", "by chance (%)", "ratio"], rows)
    for layer, routing in enumerate(routings):
        page.figure(
            graph_view.heat_maps(graph, routing, task.classes, task.planted),
            f"{run.name}-nodes-{layer + 1}",
            f"MoE layer {layer + 1}, seed {seed}: of each expert's nodes, the share of every class, in-degree and "
            "local homophily (of the same class among its neighbors), both in bins from few to many. A row like the "
            "last one says that the expert does not go by it.",
        )
    page.figure(
        graph_view.drawing(graph, routings[0], seed),
        f"{run.name}-drawing",
        f"Nodes by the experts of MoE layer 1 of seed {seed}, and by class: the whole graph where it has at most "
        f"{graph_view.MOST_DRAWN} nodes, else the surroundings of a node of median degree of each expert.",
    )


def main(args: Sequence[str] | None = None) -> None:
    """Entry point."""
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
    warnings.filterwarnings("ignore", "Sparse invariant checks are implicitly disabled")
    config = tyro.cli(ReportConfig, args=args, prog="python -m experiments.report", description=__doc__)
    console = Console(stderr=True, soft_wrap=True)
    try:
        path, failed = report(config)
    except (ValueError, OSError) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(2)
    print(f"written to {path}")
    for reason in failed.values():
        console.print(f"[bold red]left out:[/] {escape(reason)}", highlight=False)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
