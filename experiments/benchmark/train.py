"""Parts of training: where the time of an epoch goes, and sampling.

Sampling is from a graph on disk beside the same graph in memory.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch_geometric.data import Data

from experiments.benchmark.measure import Benchmark, Steps, spread, wait_for
from experiments.train.build import build_model
from experiments.train.data.load import load_tasks
from experiments.train.data.task import Batch
from experiments.train.presets import PRESETS
from experiments.train.processes import make_fabric
from experiments.train.training import Training, set_up
from gmoe import StoredGraph, neighbor_loader
from gmoe._checks import check, check_choice


@dataclass(frozen=True, kw_only=True)
class TrainBenchmark(Benchmark):
    """One epoch of each preset, in the loop that trains it."""

    presets: tuple[str, ...] = ("digits", "digits-graph", "mosaic")
    """Names of presets; those by default need no data."""
    batches: int = 20
    """At most so many batches of an epoch."""
    repeats: int = 3
    """Timed epochs, after one that is not."""
    data_root: Path = Path("data")
    """Root folder of the data. Nothing is downloaded."""

    def measured(self) -> dict[str, Any]:
        """By preset ``wall``, ``batches``, ``parts`` and ``share``.

        Parts are the seconds of the median epoch, shares these over their sum.
        """
        for name in self.presets:
            check_choice("presets", name, PRESETS)
        return {name: self._preset(name) for name in self.presets}

    def _preset(self, name: str) -> dict[str, Any]:
        config = PRESETS[name][1]
        config = replace(
            config,
            data_root=self.data_root,
            offline=True,
            device=self.device,
            epochs=self.repeats + 1,
        )
        task = load_tasks(config)(0)
        fabric = make_fabric(config)
        epochs = []
        fabric.seed_everything(0, verbose=False)
        with set_up(fabric, build_model(config, task), config, task) as training:
            for epoch in range(config.epochs):
                with timed_parts(training, self.batches) as parts:
                    for batch in training.batches("train", epoch):
                        training.step(batch, len(batch.target))
                epochs.append(parts)
        timed = sorted(epochs[1:], key=lambda parts: sum(parts.values()))
        walls = [sum(parts.values()) for parts in epochs[1:]]
        parts = timed[(len(timed) - 1) // 2]
        share = {part: seconds / sum(parts.values()) for part, seconds in parts.items()}
        batches = training.epoch.batches // config.epochs
        return {"wall": spread(walls), "batches": batches, "parts": parts, "share": share}


@contextmanager
def timed_parts(training: Training, batches: int) -> Iterator[dict[str, float]]:
    """Time an epoch of the loop, and end it after so many batches; the seconds by part.

    Each part ends where the loop calls what comes next: the forward pass with the loss where it
    calls the backward pass, the optimizer with clipping and schedule.
    """
    seconds = dict.fromkeys(("data", "forward", "backward", "optimizer", "rest"), 0.0)
    fabric = training.fabric
    draw = training.batches
    last = time.perf_counter()

    def mark(part: str) -> None:
        nonlocal last
        wait_for(fabric.device)
        now = time.perf_counter()
        seconds[part] += now - last
        last = now

    def marked(call: Callable[..., Any], before: str, after: str) -> Callable[..., Any]:
        def marked_call(*args: Any) -> Any:
            mark(before)
            result = call(*args)
            mark(after)
            return result

        return marked_call

    def drawn(*args: Any) -> Iterator[Batch]:
        for batch in itertools.islice(draw(*args), batches):
            mark("data")
            yield batch
            mark("rest")

    with (
        patch.object(training, "batches", drawn),
        patch.object(fabric, "to_device", marked(fabric.to_device, "data", "data")),
        patch.object(fabric, "backward", marked(fabric.backward, "forward", "backward")),
        patch.object(
            training.scheduler, "step", marked(training.scheduler.step, "optimizer", "optimizer")
        ),
    ):
        yield seconds
        mark("rest")


@dataclass(frozen=True, kw_only=True)
class StoredBenchmark(Benchmark):
    """Batches of 1,024 seeds with 15, 10 and 5 neighbors a hop, from memory and files.

    The first round caches the files.
    """

    folder: Path = Path("data/stored")
    """Folder that `experiments.convert` wrote, of a graph that fits in memory."""
    batches: int = 5
    """Batches a run."""

    def groups(self) -> Iterator[Steps]:
        is_stored = (self.folder / "graph.json").exists()
        check(is_stored, "folder", self.folder, "one that experiments.convert wrote")
        disk = StoredGraph(self.folder)
        memory = Data(
            x=disk.rows("x", slice(None)), edge_index=torch.stack(disk.in_edges(slice(None)))
        )
        seeds = torch.randint(disk.num_nodes, (self.batches * 1024,))
        places = {"memory": memory, "disk": disk}
        for workers in (0, 2):
            options: dict[str, Any] = {
                "batch_size": 1024,
                "is_sorted": True,
                "num_workers": workers,
                "backend": "gmoe",
            }
            loaders = {
                place: neighbor_loader(data, [15, 10, 5], seeds, **options)
                for place, data in places.items()
            }
            yield {
                f"{place}, {workers} workers": partial(deque, loader, maxlen=0)
                for place, loader in loaders.items()
            }
