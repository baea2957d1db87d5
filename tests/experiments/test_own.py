"""Routers, models and loggers that are named on the command line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments.config import load_object
from experiments.train import main
from tests.experiments import own_parts
from tests.experiments.command import QUICK, quick

MINE = own_parts.__name__


@pytest.mark.parametrize("preset", ["digits-graph", "digits"])
def test_a_router(preset: str, tmp_path: Path) -> None:
    args = ("--router", f"{MINE}:FirstBits", "--experts", "4", "--layers", "2", "--hidden", "16")
    summary = quick(tmp_path / "run", *args, preset=preset)
    assert summary["config"]["router"] == f"{MINE}:FirstBits"
    assert all(layer["dead"]["mean"] == 2 for layer in summary["routing"])
    assert all(layer["experts_per_token"]["mean"] == 1 for layer in summary["routing"])


def test_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another folder than the working directory, and with a name that a module has."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    shutil.copy(own_parts.__file__, folder / "json.py")
    monkeypatch.chdir(tmp_path)
    main(["digits-graph", "--router", "elsewhere/json.py:FirstBits", *QUICK, "--seeds", "0"])
    assert (tmp_path / "runs" / "digits-graph-json.FirstBits" / "summary.json").exists()
    assert load_object("model", f"{folder}/json.py:sage") is load_object("model", "elsewhere/json.py:sage")


@pytest.mark.parametrize(
    ("preset", "name", "layers"), [("digits-graph", "sage", 0), ("digits-graph", "moe", 1), ("digits", "flat", 0)]
)
def test_a_model(preset: str, name: str, layers: int, tmp_path: Path) -> None:
    summary = quick(tmp_path / "run", "--model", f"{MINE}:{name}", preset=preset)
    assert len(summary["routing"]) == layers
    assert summary["test"]["mean"] > 0.05


def test_tensorboard_gets_figures_and_routing(tmp_path: Path) -> None:
    quick(tmp_path / "run", "--logger", "tensorboard", "--router", "expert_choice", "--hidden", "16")
    events = EventAccumulator(str(tmp_path / "run" / "seed-0" / "tensorboard")).Reload()
    assert {"loss", "val", "lr", "layer_0/load_0", "layer_0/entropy"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("val")] == [0, 1, 2]
