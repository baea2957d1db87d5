"""The command, run briefly."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments.loop import Training
from experiments.train import main

QUICK = ["--epochs", "3", "--no-progress"]


def quick(out: Path, *args: str, preset: str = "digits-graph", seeds: str = "0") -> dict[str, Any]:
    """Run the command, and read what it wrote."""
    main([preset, *QUICK, "--out", str(out), "--seeds", *seeds.split(), *args])
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


def quick_until(steps: int, monkeypatch: pytest.MonkeyPatch, out: Path, *args: str, **how: str) -> None:
    """Like :func:`quick`, stopped by SIGTERM in a step, which is finished and saved."""
    step, done = Training.step, list[int]()

    def signalled(*arguments: Any) -> None:
        done.append(1)
        if len(done) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "step", signalled)
        with pytest.raises(SystemExit) as stop:
            quick(out, *args, **how)
    assert stop.value.code == 128 + signal.SIGTERM


def refused(args: Sequence[str], capsys: Any) -> str:
    """The error of a command that is refused, in one line."""
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    shown = capsys.readouterr()
    return " ".join((shown.out + shown.err).replace("│", " ").split())
