"""The command, run briefly."""

from __future__ import annotations

import json
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


def quick_until(epochs: int, monkeypatch: pytest.MonkeyPatch, out: Path, *args: str, **how: str) -> None:
    """Like :func:`quick`, cut off after so many epochs."""
    train_epoch = Training.train_epoch
    done: list[int] = []

    def cut(*arguments: Any) -> Any:
        if len(done) == epochs:
            raise KeyboardInterrupt
        done.append(1)
        return train_epoch(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "train_epoch", cut)
        with pytest.raises(KeyboardInterrupt):
            quick(out, *args, **how)
