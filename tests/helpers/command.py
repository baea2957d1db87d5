"""The command, run briefly."""

from __future__ import annotations

import csv
import json
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from experiments.train.command import main
from experiments.train.results import commit
from experiments.train.training import Training

QUICK = ["--epochs", "3", "--no-progress"]


def quick(out: Path, *args: str, preset: str = "digits-graph", seeds: str = "0") -> dict[str, Any]:
    """Run the command, and read what it wrote."""
    main([preset, *QUICK, "--out", str(out), "--seeds", *seeds.split(), *args])
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


def rows(folder: Path, name: str = "metrics.csv", seed: int = 0) -> list[dict[str, str]]:
    """The rows of a log, without the clock."""
    with (folder / f"seed-{seed}" / name).open() as file:
        return [
            {key: value for key, value in row.items() if key != "seconds"}
            for row in csv.DictReader(file)
        ]


def run_until(
    steps: int, args: Sequence[str], rank: str = "0", number: int = signal.SIGTERM, times: int = 1
) -> None:
    """The command, of which a process gets a signal in a step.

    After one SIGTERM the step is finished and saved.
    """
    step, done = Training.step, list[int]()

    def signalled(*arguments: Any) -> None:
        done.append(1)
        if len(done) == steps and os.environ.get("RANK", "0") == rank:
            for _ in range(times):
                os.kill(os.getpid(), number)
                time.sleep(0.01)
        step(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "step", signalled)
        with pytest.raises(SystemExit) as stop:
            main(args)
    assert stop.value.code == 128 + signal.SIGTERM


@contextmanager
def full_disk(room: int = 2_000) -> Iterator[None]:
    """No file grows beyond ``room`` bytes; the error is a full disk's, but for its number."""
    # Read now: git would be stopped while it writes the index, and leave the checkout locked.
    commit()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refused(args: Sequence[str], capsys: Any, main: Callable[[Sequence[str]], None] = main) -> str:
    """The error of a command that is refused, in one line."""
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    shown = capsys.readouterr()
    return " ".join((shown.out + shown.err).replace("│", " ").split())
