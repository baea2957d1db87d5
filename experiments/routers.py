"""One table of routers on images and graphs, a cell a file: ``python -m experiments.sweep routers``.

A cell is a router or a control (a row) on a data set (a column), in ``results/routers/COLUMN/ROW.json``: the summary of
its run, what its routed experts add, and the time of a step beside the dense model's. A cell that is there is skipped.
All rows of a column have its recipe, which was not tuned for any of them: E = 8, K = 1, a router in each layer. All but
``copies`` have a shared expert beside the routed ones, in which every router fits; two rows keep scale and shape apart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

import gmoe
from experiments.benchmark.measure import take_turns
from experiments.build import build_model, example, make_fabric
from experiments.config import GraphConfig, RouterOptions, RunConfig, check
from experiments.data import Task, load_tasks
from experiments.loop import Training, set_up
from experiments.presets import ARXIV, DIGITS, DIGITS_GRAPH, GRAPH, MINESWEEPER, MOSAIC, TEN
from experiments.routing_stats import noting_added, switched_off, switches
from experiments.run_folder import spread
from experiments.studies import SMALL_VIT

THREE = (0, 1, 2)
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {"router": "dense"}),
    "dense-flops": (
        "dense, equal active FLOPs",
        {"router": "dense", "equal": "flops", "equal_to": "token_choice"},
    ),
    "dense-parameters": (
        "dense, equal parameters",
        {"router": "dense", "equal": "parameters", "equal_to": "token_choice"},
    ),
    "token-choice": ("token choice", {"router": "token_choice"}),
    "weight-1": (
        "token choice, weights of 1",
        {"router": "token_choice", "options": RouterOptions(weight="straight_through")},
    ),
    "copies": ("token choice, copies", {"router": "token_choice", "start": "copies"}),
    "expert-choice": ("expert choice", {"router": "expert_choice"}),
    "attention-vote": ("attention votes", {"router": "attention_vote"}),
    "multi-centroid": ("multi-centroid, learned", {"router": "multi_centroid"}),
    "k-means": ("multi-centroid, k-means", {"router": "multi_centroid", "kmeans_init": True}),
    "soft-slots": ("soft slots", {"router": "soft_slots"}),
    "random": ("frozen random", {"router": "random"}),
    "uniform": ("uniform average", {"router": "uniform"}),
}
"""Each row's label, and what it changes. Dense models of equal cost are matched to token choice."""

COLUMNS: dict[str, RunConfig] = {
    "digits": replace(DIGITS, seeds=TEN),
    "cifar10": replace(SMALL_VIT, data_root=Path(), seeds=THREE),
    "imagenette": replace(
        SMALL_VIT,
        dataset="imagenette",
        data_root=Path(),
        image_size=64,
        patch=8,
        epochs=15,
        seeds=THREE,
    ),
    "digits-graph": replace(DIGITS_GRAPH, seeds=TEN),
    "mosaic": replace(MOSAIC, seeds=TEN),
    "minesweeper": replace(
        MINESWEEPER, hidden=16, epochs=200, data_root=Path("heterophilous"), seeds=TEN
    ),
    "facebook": replace(GRAPH, hidden=16, eval_every=5, data_root=Path("facebook.npz"), seeds=TEN),
    "arxiv": replace(
        ARXIV,
        layers=2,
        hidden=64,
        sampling="neighbor",
        fanout=(10, 5),
        epochs=5,
        data_root=Path("planted"),
        seeds=THREE,
    ),
}
"""The configuration of each data set's cells; data roots are inside that of the command line.

Ten seeds or splits, three where a seed takes long. arxiv is planted: ``python -m experiments.planted ogbn-arxiv``.
"""
LONG = ("cifar10", "imagenette")
LEFT_OUT = ("dense-parameters", "k-means", "soft-slots", "uniform")
"""Rows that the long columns leave out."""


def cells(columns: Sequence[str], rows: Sequence[str], root: Path) -> dict[str, RunConfig]:
    """The cells of some columns and rows, all where none are named: ``COLUMN/ROW`` and configuration."""
    for kind, names, known in (("columns", columns, COLUMNS), ("rows", rows, ROWS)):
        if unknown := [name for name in names if name not in known]:
            raise ValueError(
                f"{kind}: got {', '.join(unknown)}, expected some of {', '.join(known)}"
            )
    found = {}
    for column, row in product(columns or COLUMNS, rows or ROWS):
        base = COLUMNS[column]
        on_graph = isinstance(base, GraphConfig)
        if (column in LONG and row in LEFT_OUT) or (on_graph and row == "soft-slots"):
            continue
        changes = dict(ROWS[row][1])
        if changes["router"] != "dense":
            changes.setdefault("start", "shared")
        if on_graph and row == "copies":
            changes["shared_router"] = False
        config = replace(base, **changes, data_root=root / base.data_root)
        if on_graph and row == "attention-vote":  # votes of all nodes for all would be N x N
            config = replace(config, options=RouterOptions(scope="neighbors"))
        found[f"{column}/{row}"] = config
    check(found, "rows", ", ".join(rows), f"some that {', '.join(columns)} has")
    return found


def measured(config: RunConfig) -> dict[str, Any]:
    """Of a finished run, what a cell holds beside its summary: what the routed experts add, and step times."""
    task_of = load_tasks(config)
    found = [routed_part(config, task_of(seed), seed) for seed in config.seeds]
    shares = [spread(list(values)) for values in zip(*(share for _, share in found), strict=True)]
    routed = {"off": spread([off for off, _ in found]), "share": shares} if shares else None
    return {"routed": routed, "time": step_times(config, task_of(config.seeds[0]))}


def routed_part(config: RunConfig, task: Task, seed: int) -> tuple[float, list[float]]:
    """What the routed experts of a trained seed do on the test set: the metric with these switched off, and by layer
    the norm of what they add over that of the layer's output."""
    model = build_model(config, task)
    model.load_state_dict(
        load_file(config.folder() / f"seed-{seed}" / "checkpoint" / "best.safetensors")
    )
    sums = defaultdict[nn.Module, list[float]](lambda: [0.0, 0.0])

    def count(layer: nn.Module, *values: Tensor) -> None:
        for place, value in enumerate(values):
            sums[layer][place] += float(value.square().sum())

    off = 0.0
    for tested in (noting_added(model, count), switched_off(model)) if switches(model) else ():
        with set_up(make_fabric(config), tested, config, task) as training:
            off, _ = training.evaluate("test")
    return off, [(added / whole) ** 0.5 for added, whole in sums.values()]


def step_times(config: RunConfig, task: Task, repeats: int = 15) -> dict[str, Any]:
    """Seconds of a training step of the cell and of the dense model, in turns; of graphs on ``edge_index``, and
    ``dense-csr`` is the dense model on a matrix, where it runs on one."""
    dense = replace(config, router="dense", equal=None, kmeans_init=False, options=RouterOptions())
    arms = {"dense": (dense, task), "cell": (config, task)}
    if isinstance(config, GraphConfig) and config.sampling == "full":
        kinds: dict[str, Any] = {
            "dense": (dense, "edge_index"),
            "cell": (config, "edge_index"),
            "dense-csr": (dense, "auto"),
        }
        for name, (own, adjacency) in kinds.items():
            own = replace(own, adjacency=adjacency)
            arms[name] = (own, load_tasks(own)(config.seeds[0]))
        if not example(*arms["dense-csr"])[1].is_sparse_csr:
            del arms["dense-csr"]
    fabric = make_fabric(config)
    with ExitStack() as stack:
        steps: dict[str, Callable[[], None]] = {}
        for name, (own, data) in arms.items():
            training = stack.enter_context(set_up(fabric, build_model(own, data), own, data))
            batch = fabric.to_device(next(iter(data.loader("train", own.batch_size, 0))))
            steps[name] = partial(train_step, training, batch)
        return take_turns(steps, repeats, fabric.device, warmup=3)


def train_step(training: Training, batch: Any) -> None:
    """Forward, loss, backward and optimizer, without the counts that a run keeps."""
    training.model.train()
    training.optimizer.zero_grad()
    loss = training.task.loss(batch.counted(training.forward(batch.inputs)), batch.target)
    training.fabric.backward(loss + gmoe.aux_loss(training.routings))
    training.optimizer.step()
