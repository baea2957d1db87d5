"""A disk that is full: the file is named, and what was there before stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric

from experiments.show.report_page import Page
from experiments.study.advise import keep_routing
from experiments.train.checkpoint import Checkpoint
from experiments.train.logs import Log
from experiments.train.results import write_json
from tests.helpers.command import full_disk

LARGE = np.random.default_rng(0).standard_normal((1_000, 3))
REPLACED: dict[str, Callable[[Path], object]] = {
    "a.json": lambda path: write_json(path, LARGE.tolist()),
    "index.html": Page(["<p>"] * 1_000).write,
    "routing.npy": lambda path: keep_routing(path, np.arange(1_000)),
}

CPU = Fabric(accelerator="cpu", devices=1)
STATE = {"best": {"weight": torch.tensor(LARGE)}}
NAMED: dict[str, Callable[[Path], object]] = {
    "a.csv": lambda path: Log(path, keep=0).write([{"loss": loss} for loss in LARGE[:, 0]]),
    "state.ckpt": lambda path: Checkpoint(CPU, path.parent, lambda: STATE).save(),
    "best.safetensors": lambda path: Checkpoint(CPU, path.parent, lambda: STATE).save(),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_full_disk_names_the_file(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    if name == "best.safetensors":  # which is written after the state
        monkeypatch.setattr(CPU, "save", lambda *_: None)
    with full_disk(), pytest.raises(OSError, match=rf"^{tmp_path / name}: cannot be written \("):
        NAMED[name](tmp_path / name)


@pytest.mark.parametrize("name", REPLACED)
def test_a_full_disk_leaves_the_file_that_was_there(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text("of before")
    with full_disk(), pytest.raises(OSError, match=f"^{path}: cannot be written"):
        REPLACED[name](path)
    assert path.read_text() == "of before"
    assert list(tmp_path.iterdir()) == [path]
    REPLACED[name](path)
    assert path.stat().st_size > 2_000
