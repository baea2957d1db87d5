"""Processes that train one model together, beside as many that train alone at the same time."""

from __future__ import annotations

import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.benchmark.measure import Benchmark, spread, told
from experiments.train import parse


@dataclass(frozen=True, kw_only=True)
class ProcessesBenchmark(Benchmark):
    """An epoch of a preset by `torchrun`, beside processes that each go through it alone.

    A process alone has the batch that it has together, so it takes as many times the steps as there are processes. All
    together therefore do the work of one of those alone, and the ratio of their times times their number is 1 where
    nothing is lost.
    """

    preset: str = "digits"
    """A preset with batches."""
    options: str = ""
    """Further options of `experiments.train`, as one text."""
    processes: int = 2
    """So many; each should have a core of its own."""
    epochs: int = 5
    """Epochs of a run, of which the first and the last are not counted."""
    threads: int = 1
    """CPU threads of each."""
    repeats: int = 3
    """Runs of each variant, in turns."""

    def measured(self) -> dict[str, Any]:
        """Seconds an epoch, ``alone`` and ``together``; ``ratio`` of the latter is 1 where nothing is lost, and their
        number where together they are no faster than one.

        Raises:
            ValueError: what cannot be run on so many processes, fewer than three epochs, or a run that fails.
        """
        together = ["--devices", str(self.processes)]
        config = parse([self.preset, *shlex.split(self.options), *together])
        batch = config.batch_size // self.processes
        for name, got, least in (("epochs", self.epochs, 3), ("repeats", self.repeats, 1)):
            if got < least:
                raise ValueError(f"{name}: got {got}, expected at least {least}")
        values: dict[str, list[float]] = {"alone": [], "together": []}
        for _ in told(range(self.repeats), "round"):
            alone = ["--batch-size", str(batch)]
            values["alone"].append(statistics.mean(self._seconds([(["-m"], alone)] * self.processes)))
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes), "-m"]
            values["together"] += self._seconds([(launcher, together)])
        found: dict[str, Any] = {name: {"wall": spread(seconds)} for name, seconds in values.items()}
        for figures in found.values():
            share = figures["wall"]["median"] / found["alone"]["wall"]["median"]
            figures["ratio"] = {"wall": share * (1 if figures is found["alone"] else self.processes)}
        return found

    def _seconds(self, runs: list[tuple[list[str], list[str]]]) -> list[float]:
        """An epoch's median seconds of each of the runs, which go on at the same time."""
        with tempfile.TemporaryDirectory() as root:
            started = []
            for number, (launcher, own) in enumerate(runs):
                options = ["--epochs", str(self.epochs), "--eval-every", str(self.epochs), "--seeds", str(self.seed)]
                options += ["--device", self.device, "--no-progress", "--out", f"{root}/{number}"]
                rest = [*shlex.split(self.options), *options, *own]  # of an option that is there twice the last counts
                command = [sys.executable, *launcher, "experiments.train", self.preset, *rest]
                env = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
                pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
                started.append(subprocess.Popen(command, env=env, **pipes))
            try:
                printed = [process.communicate()[0] for process in started]
            finally:
                for process in started:
                    process.terminate()
            for process, text in zip(started, printed, strict=True):
                if process.returncode:
                    raise ValueError(f"preset: got {self.preset} {self.options}, which failed: {text.strip()[-2000:]}")
            logs = [Path(root, str(number), f"seed-{self.seed}", "metrics.csv") for number in range(len(runs))]
            return [float(pd.read_csv(log)["seconds"].diff()[1:-1].median()) for log in logs]
