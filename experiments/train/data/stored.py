"""Nodes of a graph that stays on disk: sampled neighborhoods, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import get_args

from experiments.train.config import PAPERS, GraphConfig
from experiments.train.data.graphs import make_metric, neighborhoods, task_loss
from experiments.train.data.ogb import OGBMetric
from experiments.train.data.on_disk import stored_folder
from experiments.train.data.task import Batch, Shard, Split, Splits, Task
from gmoe._checks import check
from gmoe.data.stored import StoredGraph

CHECKED = 1 << 28
"""Edges whose sources are read before a run, in a second; those of more were checked as they
were converted."""
SAID = {"name": str, "source": str, "undirected": bool, "num_classes": int}
"""What ``graph.json`` says beside what :class:`gmoe.StoredGraph` checks."""


def stored_task(config: GraphConfig) -> Task:
    """Node classification on a folder that ``experiments.convert`` wrote: ``data_root``, or of
    ogbn-papers100M in it.

    Raises:
        FileNotFoundError: it is not there; says how it is made.
        ValueError: no labels or split, other edges than asked for, ids out of range, an option
            that needs memory.
    """
    folder = stored_folder(config)
    assert folder is not None
    if not (folder / "graph.json").is_file():
        raise FileNotFoundError(
            f"{PAPERS}: {folder} is missing; make it by python -m experiments.convert {PAPERS} "
            f"--from {config.data_root} --to {folder} --half, or give another --data-root"
        )
    for name, got, wanted in (
        ("sampling", config.sampling, "neighbor"),
        ("evaluation", config.evaluation, "sampled"),
    ):
        legal = f"{wanted!r}, since the graph stays on disk"
        check(got == wanted, name, f"{got!r} for {folder}", legal)
    graph = StoredGraph(folder)
    said = graph.info
    missing = [name for name in ("y", *get_args(Split)) if name not in said["arrays"]]
    legal = "them; convert again, and give them"
    check(not missing, "data_root", f"no {', '.join(missing)} in {folder}", legal)
    for name, kind in SAID.items():
        value = said.get(name)
        where = str(folder / "graph.json")
        check(type(value) is kind, where, f"{name}={value!r:.80}", f"of type {kind.__name__}")
    undirected = config.undirected
    legal = f"{said['undirected']}, as it was converted"
    check(undirected is said["undirected"], "undirected", f"{undirected} for {folder}", legal)
    split: Splits = {part: getattr(graph, part) for part in get_args(Split)}
    stored = [("source", graph.source)] if graph.num_edges <= CHECKED else []
    for name, ids in (*split.items(), *stored):
        low, high = (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
        is_inside = 0 <= low <= high < graph.num_nodes
        legal = f"0 to {graph.num_nodes - 1}"
        check(is_inside, f"{folder / name}.npy", f"nodes {low} to {high}", legal)
    _check_classes(graph, split)
    never_falls = not stored or bool((graph.start.diff() >= 0).all())
    check(never_falls, f"{folder / 'start'}.npy", "falling values", "values that never fall")
    if said["source"].startswith("Not OGB's"):
        print(f"{config.dataset}: a planted graph, not OGB's ({folder})", flush=True)

    def loader(
        part: Split, batch_size: int, seed: int | None, shard: Shard = (0, 1)
    ) -> Iterator[Batch]:
        return neighborhoods(graph, config, split[part], batch_size, seed, shard)

    metric_name = config.metric or "accuracy"
    classes = said["num_classes"]
    return Task(
        name=said["name"],
        kind="graph",
        in_channels=graph.x_dim,
        num_classes=classes,
        metric_name=metric_name,
        metric=partial(OGBMetric, PAPERS)
        if config.dataset == PAPERS
        else make_metric(metric_name, classes),
        loader=loader,
        steps=lambda size: -(-len(split["train"]) // size),
        loss=task_loss,
        split=split,
    )


def _check_classes(graph: StoredGraph, split: Splits) -> None:
    """Refuse labels beyond the number of classes, and a number that is merely claimed."""
    classes = graph.info["num_classes"]
    where = str(graph.folder / "graph.json")
    legal = f"2 to {graph.num_nodes}"
    check(2 <= classes <= graph.num_nodes, where, f"num_classes={classes}", legal)
    for part, ids in split.items():
        y = graph.rows("y", ids)
        are_classes = y.dim() == 1 and not y.is_floating_point() and len(y) > 0
        got = f"labels of {part}, {y.dtype} of shape {tuple(y.shape)}"
        check(are_classes, str(graph.folder / "y.npy"), got, "a class of each node, and some nodes")
        low = int(y.min())
        high = int(y.max())
        got = f"labels of {part} from {low} to {high}"
        check(0 <= low <= high < classes, str(graph.folder / "y.npy"), got, f"0 to {classes - 1}")
