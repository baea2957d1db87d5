"""What a seed in training needs to go on, on disk."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from safetensors.torch import save_file

from experiments.train.files import read_tensors, writing
from experiments.train.processes import from_first
from experiments.train.signals import interrupt
from gmoe.distributed import world_sum

SECONDS = 60.0
"""At most so much training is lost where a process is killed."""


class Checkpoint:
    """What ``state`` gives, on disk, replaced in one step; its ``"best"`` weights also in
    safetensors.

    The first process writes, all read, and all have to call every method. Several machines need
    the same folder. As a context, it lets SIGINT and SIGTERM wait for the next :meth:`tick`;
    the second of them does not.
    """

    def __init__(self, fabric: Fabric, folder: Path, state: Callable[[], dict[str, Any]]) -> None:
        self.fabric = fabric
        self.folder = folder
        self.state = state
        self.path = folder / "state.ckpt"
        self.signal: int | None = None
        self._before: dict[int, Any] = {}
        self._last = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The state, or ``None`` where there is none."""
        if not from_first(self.fabric, self.path.exists):
            return None
        return read_tensors(self.path)

    def save(self) -> None:
        """Write the state to a new file that then takes the old one's place."""
        state = self.state()
        self.folder.mkdir(parents=True, exist_ok=True)
        with writing(self.path):
            self.fabric.save(self.folder / "state.new", state)
        if self.fabric.is_global_zero:
            best = {name: value.contiguous() for name, value in state["best"].items()}
            with writing(self.folder / "best.safetensors"):
                save_file(best, self.folder / "best.new")
            # The state comes last: behind that of the last epoch, nothing would write the weights
            (self.folder / "best.new").replace(self.folder / "best.safetensors")
            (self.folder / "state.new").replace(self.path)
        # Or a process might be ended by another that has ended, before it has written
        self.fabric.barrier()
        self._last = time.monotonic()

    def tick(self, rows: int = 0) -> int:
        """Call it where the state is whole: saves what is older than a minute, or if a signal
        arrived, which it raises.

        Returns the sum over processes of ``rows``, of the next batch: another collective would
        be one more to wait for.
        """
        is_due = time.monotonic() - self._last > SECONDS
        signals, due, total = world_sum(
            torch.tensor([self.signal is not None, is_due, rows])
        ).tolist()
        if signals or due:
            self.save()
        if signals:
            interrupt(self.signal or signal.SIGTERM)
        return int(total)

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():  # which alone gets signals
            self._before = {
                number: signal.signal(number, self._note)
                for number in (signal.SIGINT, signal.SIGTERM)
            }

    def _note(self, number: int, _: Any) -> None:
        self.signal = number
        self.__exit__()

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
