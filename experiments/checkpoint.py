"""What a run keeps on disk while it lasts: its state, a row an epoch, and the wish of whoever stops it."""

from __future__ import annotations

import csv
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning_fabric import Fabric
from lightning_fabric.utilities import rank_zero_only
from safetensors.torch import save_file
from torch import Tensor

from experiments.processes import from_first, numbers_of_all

SECONDS = 60.0
"""At most so much training is lost where a process is killed."""
PARTS = ("progress", "training", "epoch", "best")
"""What a state holds."""


class InterruptedRunError(BaseException):
    """SIGINT or SIGTERM arrived; what was trained is on disk. Not an Exception, as KeyboardInterrupt is none."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        return signal.Signals(self.number).name


class Checkpoint:
    """The state of a seed on disk, replaced in one step by Fabric; the best weights also in safetensors.

    The first process writes and reads; all have to call every method.

    Args:
        fabric: which saves and loads.
        folder: where.
        state: gives the state, a dictionary of :data:`PARTS`; ``"best"`` are the best weights.
    """

    def __init__(self, fabric: Fabric, folder: Path, state: Callable[[], dict[str, Any]]) -> None:
        self.fabric, self.folder, self.state = fabric, folder, state
        self.signal: int | None = None
        self._last = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The state, or ``None`` where there is none.

        Raises:
            ValueError: it cannot be read.
        """
        return from_first(self.fabric, self._load)

    def _load(self) -> dict[str, Any] | None:
        path = self.folder / "state.ckpt"
        if not path.exists():
            return None
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
            return {name: state[name] for name in PARTS} | {"others": state.get("others", [])}
        except Exception as error:  # torch raises what pickle, zip and its own reader raise
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise ValueError(f"{path}: cannot be read ({reason}); delete it to begin this seed anew") from error

    def save(self) -> None:
        """Write the state to a new file that then takes the old one's place."""
        state = self.state()
        if self.fabric.is_global_zero:
            self._write(state)
        self.fabric.barrier()  # or a process might be ended by another that has ended, before it has written
        self._last = time.monotonic()

    def _write(self, state: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        fresh = self.folder / "state.new"
        torch.save(state, fresh)
        best: dict[str, Tensor] = state["best"]
        save_file({name: value.contiguous() for name, value in best.items()}, self.folder / "best.new")
        fresh.replace(self.folder / "state.ckpt")
        (self.folder / "best.new").replace(self.folder / "best.safetensors")

    def tick(self, rows: int = 0) -> int:
        """Call it where the state is whole: saves what is older than a minute, or if a signal arrived.

        Args:
            rows: of this process's next batch; each collective more would let processes wait once more a step.

        Returns:
            the rows of all processes.

        Raises:
            InterruptedRunError: a signal arrived; the state is saved.
        """
        is_due = time.monotonic() - self._last > SECONDS
        signals, due, counts = numbers_of_all(self.signal or 0, is_due, rows)
        if any(signals):
            self.save()
            raise InterruptedRunError(max(signals))
        if any(due):
            self.save()
        return sum(counts)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """SIGINT and SIGTERM wait for the next :meth:`tick`; the second of them does not."""
        if threading.current_thread() is not threading.main_thread():  # which alone gets signals
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def note(number: int, _: Any) -> None:
            self.signal = number
            for known, handler in before.items():
                signal.signal(known, handler)

        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Log:
    """A CSV file of one row or several an epoch, on disk at once; rows behind the checkpoint are cut.

    Args:
        path: of the file, which the first process alone writes.
        keep: epochs whose rows stay.
    """

    @rank_zero_only
    def __init__(self, path: Path, keep: int) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if not keep:
            path.unlink(missing_ok=True)
        if not path.exists():
            return
        rows = pd.read_csv(path, dtype=str, keep_default_na=False, on_bad_lines="skip")  # the last may be half a row
        fresh = path.with_suffix(".new")
        epoch = pd.to_numeric(rows["epoch"], errors="coerce")
        rows[(epoch < keep) & (epoch >= epoch.cummax())].to_csv(fresh, index=False)  # 12 cut off after a digit is no 1
        fresh.replace(path)

    @rank_zero_only
    def write(self, rows: list[dict[str, Any]]) -> None:
        """Add rows, if there are any; a new file gets their names first."""
        if not rows:
            return
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            if file.tell() == 0:
                writer.writeheader()
            writer.writerows(rows)
