"""Where an epoch's time goes: data, forward, backward, optimizer, and the rest."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from tqdm import tqdm

from experiments.benchmark.measure import Benchmark, spread, told, wait_for
from experiments.build import build_model, make_fabric
from experiments.data import Batch, load_tasks
from experiments.loop import Training, set_up
from experiments.presets import PRESETS

PARTS = ("data", "forward", "backward", "optimizer")


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
        for name, value in (("repeats", self.repeats), ("batches", self.batches)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        unknown = sorted(set(self.presets) - set(PRESETS))
        if unknown:
            raise ValueError(f"presets: got {', '.join(unknown)}, expected some of {', '.join(PRESETS)}")
        self.torch_device()
        found = {}
        for name in told(self.presets, "preset"):
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
        task = load_tasks(config)(self.seed)
        fabric = make_fabric(config)
        fabric.seed_everything(self.seed, verbose=False)
        epochs = []
        with set_up(fabric, build_model(config, task), config, task) as training:
            for epoch in range(self.repeats + 1):
                with Clock(fabric.device).on(training, self.batches) as clock:
                    started = clock.now()
                    training.train_epoch(epoch)
                    epochs.append((clock.now() - started, clock))
        timed = sorted(epochs[1:], key=lambda epoch: epoch[0])
        total, clock = timed[(len(timed) - 1) // 2]
        parts = clock.seconds | {"rest": total - sum(clock.seconds.values())}
        return {
            "wall": spread([epoch[0] for epoch in epochs[1:]]),
            "batches": clock.batches,
            "parts": parts,
            "share": {part: seconds / total for part, seconds in parts.items()},
        }


@dataclass
class Clock:
    """Seconds by part of an epoch.

    Args:
        device: whose work is waited for before the clock is read.
    """

    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    batches: int = 0

    def now(self) -> float:
        """Seconds, once all work is done."""
        wait_for(self.device)
        return time.perf_counter()

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, whose time is that of ``part``."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = self.now()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[part] += self.now() - started

        return timed

    @contextmanager
    def on(self, training: Training, batches: int) -> Iterator[Clock]:
        """Time what the loop calls, and end an epoch after so many batches."""
        task, fabric, optimizer = training.task, training.fabric, training.optimizer

        def timed_loader(*args: Any) -> Iterator[Batch]:
            drawn = iter(self.timed("data", task.loader)(*args))
            following = self.timed("data", lambda: next(drawn, None))
            for batch in itertools.islice(iter(following, None), batches):
                self.batches += 1
                yield batch

        places = (
            (training, "forward", "forward"),
            (fabric, "to_device", "data"),
            (fabric, "backward", "backward"),
            (fabric, "clip_gradients", "optimizer"),
            (optimizer, "step", "optimizer"),
            (optimizer, "zero_grad", "optimizer"),
            (training.scheduler, "step", "optimizer"),
        )
        timed_task = replace(task, loader=timed_loader, loss=self.timed("forward", task.loss))
        with ExitStack() as stack:
            stack.enter_context(patch.object(training, "task", timed_task))
            for owner, name, part in places:
                stack.enter_context(patch.object(owner, name, self.timed(part, getattr(owner, name))))
            yield self
