"""The page of ``experiments.report``."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch_geometric.data import Data

from experiments.data import Task
from experiments.figures import Page, Seen, gallery, learning_curves, look, places, share_map
from experiments.routing_stats import alignment, ami, node_properties
from experiments.run_folder import RunFolder, load_model, read_run
from experiments.tables import percent
from gmoe.plot import expert_load, expert_maps

FOLLOWED = 0.1
"""An expert assignment follows what it has at least so much mutual information with."""

PROPERTIES = {
    "nmi": ("planted region", "NMI"),
    "ami_label": ("class", "AMI"),
    "ami_place": ("place in the image", "AMI"),
    "ami_degree": ("degree", "AMI"),
    "ami_homophily": ("local homophily", "AMI"),
}
"""What experts may follow, by the figure that measures it."""

MOST_TOKENS = 50_000
"""Of more tokens a random part is compared, of two runs."""


def write_report(folders: Sequence[Path], path: Path, data_root: Path | None, first: Sequence[str] = ()) -> list[str]:
    """Write the page about runs, below first lines, and say why some were left out; a ``ValueError`` if all were."""
    warnings.filterwarnings("ignore", "Sparse (CSR tensor support is in beta|invariant checks are implicitly)")
    runs, failed = list[RunFolder](), list[str]()
    for folder in dict.fromkeys(folder.resolve() for folder in folders):
        try:
            runs.append(read_run(folder, data_root))
        except ValueError as error:
            failed.append(str(error))
    if not runs:
        raise ValueError("; ".join(failed) or "runs: got none, expected at least one folder")
    names = [run.name for run in runs]
    runs = [replace(run, name=str(run.folder)) if names.count(run.name) > 1 else run for run in runs]
    page, routing = Page(), Page()
    for line in first:
        page.text(line, "lead")
    for run in runs:
        if run.history:
            page.text(f"{run.name}: {_routing(routing, run)}", "lead")
    for reason in failed:
        page.text(f"Left out: {reason}", "warn")
    _results(page, runs)
    groups: dict[str, list[RunFolder]] = {}
    for run in runs:
        groups.setdefault(data_of(run), []).append(run)
    for name, mine in groups.items():
        curves = learning_curves(mine)
        if curves:
            page.heading(f"{name}: learning curves")
            page.figures(curves, "Mean over seeds, and the band from the lowest to the highest.")
        agreement = similarity(mine)
        if agreement:
            page.heading(f"{name}: do two runs find the same experts?", 3)
            page.table([["seeds of", "and of", "AMI"], *([*pair, _short(value)] for pair, value in agreement.items())])
            page.text(
                "Adjusted mutual information of the tokens' experts, mean over the MoE layers: 1 if two routings agree "
                "up to the experts' numbers, 0 by chance or where one uses a single expert.",
                "note",
            )
    page.extend(routing)
    page.write(path)
    print(f"written to {path}")
    return failed


def data_of(run: RunFolder) -> str:
    """What its data are called; graphs and images of one's own go by their content too."""
    name, digest = run.science.get("file") or run.config.dataset, run.science.get("digest")
    return name if digest is None else f"{name} ({digest})"


def _results(page: Page, runs: Sequence[RunFolder]) -> None:
    columns = [
        {
            "": run.name,
            "data": run.config.dataset,
            "router": run.config.router,
            "experts, K": f"{run.config.experts}, {run.config.k}" if run.history else "–",
            "metric": run.summary["metric"],
            "validation (%)": percent(run.summary["val"]),
            "test (%)": percent(run.summary["test"]),
            "seeds": str(run.summary["test"]["n"]),
            "active FLOPs": f"{run.summary['flops']:.3g}",
            "parameters": f"{run.summary['parameters']:,}",
            "active parameters": f"{run.summary['active_parameters']:,}",
            "seconds a seed": f"{run.summary['seconds']['mean']:,.0f}",
            "peak memory (MiB)": f"{run.summary['peak_memory']:,}",
        }
        for run in runs
    ]
    page.heading("Results")
    page.table([[name, *(column[name] for column in columns)] for name in columns[0]])
    page.text("Validation selects the epoch; the test set is read once. Mean ± sample standard deviation.", "note")


def similarity(runs: Sequence[RunFolder]) -> dict[tuple[str, str], float]:
    """Adjusted mutual information of the experts of two runs, by their names; mean over their seeds and MoE layers.

    Runs of one data set are compared that route as many tokens in as many layers as most do; of one run its own seeds.
    """
    groups: dict[Any, Any] = {}
    for run in runs:
        for routings in filter(None, run.routings.values()):
            experts = [routing.top_expert for routing in routings]
            groups.setdefault(tuple(map(len, experts)), []).append((run.name, experts))
    found = dict[tuple[str, str], list[float]]()
    generator = torch.Generator().manual_seed(0)
    for (one, first), (other, second) in combinations(max(groups.values(), key=len, default=()), 2):
        tokens = torch.randperm(len(first[0]), generator=generator)[:MOST_TOKENS]
        pairs = zip(first, second, strict=True)
        found.setdefault((one, other), []).append(statistics.fmean(ami(a[tokens], b[tokens]) for a, b in pairs))
    return {pair: statistics.fmean(values) for pair, values in found.items()}


def _routing(page: Page, run: RunFolder) -> str:
    """Write a run's section, and say the most important of it in a sentence."""
    seed, seen, missing = run.config.seeds[0], None, ""
    layers = [{name: value["mean"] for name, value in layer.items()} for layer in run.summary["routing"]]
    try:
        task = run.load_task(seed)
        if task.kind == "image":
            model = load_model(run.folder, run.config, task, seed)
            seen = look(model, task)
    except (FileNotFoundError, ValueError) as error:
        missing = f"Not drawn: {error}"
    if seen:
        for number, layer in enumerate(layers):
            found = alignment(seen.top_expert(number), seen.properties(number))
            layer |= {f"ami_{name}": value for name, value in found.items()}
    page.heading(f"{run.name}: routing")
    page.figures([expert_load(run.history)], f"Load of each expert in each epoch's steps, seed {seed}.")
    header = ["MoE layer", *(str(number) for number in range(1, len(layers) + 1))]
    page.table([header, *([_words(name), *(_short(layer[name]) for layer in layers)] for name in layers[0])])
    page.text(
        f"Mean over seeds, on {'the test images; AMI on validation images of the first seed' if seen else 'all nodes'}"
        ". Dropped pairs had no room at their expert; dead experts get no token; entropy is in nats. AMI: adjusted "
        "mutual information of experts and a property, 1 if they are the same partition, 0 by chance; experts count "
        f"as following it from {FOLLOWED} on.",
        "note",
    )
    if missing:
        page.text(missing, "warn")
    elif seen:
        classes = [task.classes[int(label)] for label in seen.labels]
        chosen = [
            int((seen.labels == label).nonzero()[0]) for label in seen.labels.unique()[:6]
        ]  # each of another class
        titles = [classes[image] for image in chosen]
        maps = expert_maps(model, seen.images[chosen], mean=task.mean, std=task.std, titles=titles)
        _images(page, seen, maps, task.classes)
    else:
        _graph(page, run, task)
    dead = [count for layer in run.summary["routing"] for count in layer["dead"]["values"]]
    return sentence(run.config.experts, dead, layers)


def _short(value: float) -> str:
    """Three decimals, and no -0.000."""
    return f"{round(value, 3) + 0.0:.3f}"


def _words(name: str) -> str:
    if name in PROPERTIES:
        return "{1} with the {0}".format(*PROPERTIES[name])
    return "AMI, shuffled experts" if name == "ami_shuffled" else name.replace("_", " ")


def sentence(experts: int, dead: Sequence[float], layers: Sequence[Mapping[str, float]]) -> str:
    """Say how many experts are used (``dead`` are not, by MoE layer and seed), and what they follow most.

    ``layers`` holds those figures of :data:`PROPERTIES` that are known, by MoE layer.
    """
    used = dict.fromkeys((experts - int(max(dead)), experts - int(min(dead))))
    text = f"{'–'.join(map(str, used))} of {experts} experts used" + (" (by layer and seed)" if len(used) > 1 else "")
    found = [(layer[key], i, key) for i, layer in enumerate(layers, start=1) for key in PROPERTIES if key in layer]
    if not found:
        return f"{text}."
    value, number, key = max(found)
    name, measure = PROPERTIES[key]
    if value >= FOLLOWED:
        where = f" in MoE layer {number}" if len(layers) > 1 else ""
        return f"{text}; experts follow the {name}, {measure} {value:.2f}{where}."
    names = [name for key, (name, _) in PROPERTIES.items() if any(key == other for *_, other in found)]
    return f"{text}; experts do not follow the {' or the '.join(names)}, {measure} at most {value:.2f}."


def _images(page: Page, seen: Seen, maps: Figure, classes: Sequence[str]) -> None:
    layers = range(len(seen.weights))
    page.heading("Which patches go to which expert?", 3)
    page.figures(
        [maps],
        "Validation images: each patch has the color of its expert, or of its experts mixed by weight; dark patches "
        "have none. Experts of different layers have nothing to do with each other.",
    )
    shown = [(seen.weights[i].flatten(0, 2), seen.properties(i)["label"], f"class, MoE layer {i + 1}") for i in layers]
    page.figures(
        [share_map(*one, classes) for one in shown],
        "Of the weights of each expert, the share on patches of every class. A row like the last one says that the "
        "expert does not go by class.",
    )
    page.figures(
        [places(seen, layer) for layer in layers],
        "A panel an expert, by MoE layer: how often it takes the patch at each place.",
    )
    for layer in layers:
        page.figures(
            [gallery(seen, layer, classes)],
            f"MoE layer {layer + 1}: the patches of largest weight of each expert, one an image, with the image's "
            f"class, among {len(seen.images):,} validation images.",
        )


def _graph(page: Page, run: RunFolder, task: Task) -> None:
    seed, graph = run.config.seeds[0], task.graph
    routings = run.routings[seed]
    if not isinstance(graph, Data) or {routing.num_tokens for routing in routings} != {graph.num_nodes}:
        page.text("Not drawn: the graph is heterogeneous, or the run was evaluated in batches.", "warn")
        return
    page.heading("Which nodes go to which expert?", 3)
    shown = {} if task.planted is None else {"planted region": task.planted}
    for name, value in node_properties(graph).items():
        if name != "label":  # bins, of which some have no node
            value[value >= 0] = value[value >= 0].unique(return_inverse=True)[1]
        shown[PROPERTIES[f"ami_{name}"][0]] = value
    for layer, routing in enumerate(routings, start=1):
        weight = routing.to_dense()
        page.figures(
            [share_map(weight, value, name, task.classes if name == "class" else ()) for name, value in shown.items()],
            f"MoE layer {layer}, seed {seed}: of the weights of each expert, the share on nodes of every kind; degree "
            "and local homophily (neighbors of the same class) in bins from few to many. A row like the last one says "
            "that the expert does not go by it.",
        )
