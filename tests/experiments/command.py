"""The command, run briefly."""

from __future__ import annotations

import json
import os
import signal
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
