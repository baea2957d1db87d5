"""Parts of training: where an epoch's time goes, and sampling from a graph on disk beside the same graph in memory."""

from __future__ import annotations

import itertools
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch_geometric.data import Data
from tqdm import tqdm

from experiments.benchmark.measure import Benchmark, Steps, spread, wait_for
from experiments.build import build_model
from experiments.checkpoint import make_fabric
from experiments.data import Batch, load_tasks
from experiments.loop import Training, set_up
from experiments.presets import PRESETS
from gmoe import StoredGraph, neighbor_loader


@dataclass(frozen=True, kw_only=True)
class TrainBenchmark(Benchmark):
    """One epoch of each preset whose data are at hand, in the loop that trains it."""

    presets: tuple[str, ...] = tuple(PRESETS)
    """Names of presets."""
    batches: int = 20
    """At most so many batches of an epoch."""
    repeats: int = 3
    """Timed epochs, after one that is not."""
    data_root: Path = Path("data")
    """Root folder of the data. Nothing is downloaded."""

    SMALL: ClassVar = {"repeats": 1, "batches": 5, "presets": ("digits", "digits-graph", "mosaic")}

    def measured(self) -> dict[str, Any]:
        """By preset, ``wall``, and ``parts``: the seconds of the median epoch by part; ``share``, those over the
        epoch's; ``batches``. The rest is logging, losses of the routers, and the loop itself."""
        self.check_counts("batches")
        unknown = sorted(set(self.presets) - set(PRESETS))
        if unknown:
            raise ValueError(f"presets: got {', '.join(unknown)}, expected some of {', '.join(PRESETS)}")
        self.torch_device()
        found = {}
        for name in tqdm(self.presets, desc="preset", leave=False):
            try:
                found[name] = self._preset(name)
            except (FileNotFoundError, ValueError) as error:
                tqdm.write(f"{name} is left out: {str(error).splitlines()[0]}", file=sys.stderr)
        if not found:
            raise ValueError("presets: got none whose data are at hand")
        return found

    def _preset(self, name: str) -> dict[str, Any]:
        config = PRESETS[name][1]
        root = self.data_root / config.data_root if config.dataset == "graph" else self.data_root
        config = replace(config, data_root=root, offline=True, device=self.device, epochs=self.repeats + 1)
        task, fabric = load_tasks(config)(0), make_fabric(config)
        fabric.seed_everything(0, verbose=False)
        epochs = []
        with set_up(fabric, build_model(config, task), config, task) as training:
            for epoch in range(self.repeats + 1):
                with timed_parts(training, self.batches) as seconds:
                    started = time.perf_counter()
                    training.train_epoch(epoch)
                    wait_for(fabric.device)
                    epochs.append((time.perf_counter() - started, seconds))
            batches = training.epoch.batches
        timed = sorted(epochs[1:], key=lambda epoch: epoch[0])
        total, seconds = timed[(len(timed) - 1) // 2]
        parts = seconds | {"rest": total - sum(seconds.values())}
        return {
            "wall": spread([wall for wall, _ in epochs[1:]]),
            "batches": batches,
            "parts": parts,
            "share": {part: seconds / total for part, seconds in parts.items()},
        }


@contextmanager
def timed_parts(training: Training, batches: int) -> Iterator[dict[str, float]]:
    """Time what the loop calls, and end an epoch after so many batches; the seconds by part, which grow."""
    task, fabric, optimizer = training.task, training.fabric, training.optimizer
    seconds = dict.fromkeys(("data", "forward", "backward", "optimizer"), 0.0)

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed_call(*args: Any, **kwargs: Any) -> Any:
            wait_for(fabric.device)
            started = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                wait_for(fabric.device)
                seconds[part] += time.perf_counter() - started

        return timed_call

    def loader(*args: Any) -> Iterator[Batch]:
        drawn = iter(timed("data", task.loader)(*args))
        return itertools.islice(iter(timed("data", lambda: next(drawn, None)), None), batches)

    places = (
        (training, "forward", "forward"),
        (fabric, "to_device", "data"),
        (fabric, "backward", "backward"),
        (fabric, "clip_gradients", "optimizer"),
        (optimizer, "step", "optimizer"),
        (optimizer, "zero_grad", "optimizer"),
        (training.scheduler, "step", "optimizer"),
    )
    with ExitStack() as stack:
        timed_task = replace(task, loader=loader, loss=timed("forward", task.loss))
        stack.enter_context(patch.object(training, "task", timed_task))
        for owner, name, part in places:
            stack.enter_context(patch.object(owner, name, timed(part, getattr(owner, name))))
        yield seconds


@dataclass(frozen=True, kw_only=True)
class StoredBenchmark(Benchmark):
    """Batches of 1,024 seeds with 15, 10 and 5 neighbors a hop; variants are by place and number of worker processes.
    Files are cached by the first round."""

    folder: Path = Path("data/stored")
    """Folder that `experiments.convert` wrote, of a graph that fits in memory."""
    batches: int = 5
    """Batches a run."""

    SMALL: ClassVar = {"repeats": 2, "batches": 2}

    def groups(self) -> Iterator[Steps]:
        self.check_counts("batches")
        disk, size = StoredGraph(self.folder), 1024
        memory = Data(x=disk.rows("x", slice(None)), edge_index=torch.stack(disk.in_edges(slice(None))))
        seeds = torch.randint(disk.num_nodes, (self.batches * size,))
        for workers in (0, 2):
            options: dict[str, Any] = {"batch_size": size, "is_sorted": True, "num_workers": workers, "backend": "gmoe"}
            places = {"memory": memory, "disk": disk}
            loaders = {place: neighbor_loader(data, [15, 10, 5], seeds, **options) for place, data in places.items()}
            yield {f"{place}, {workers} workers": partial(deque, loader, maxlen=0) for place, loader in loaders.items()}
