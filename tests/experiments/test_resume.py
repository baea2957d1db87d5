"""Going on with a run that was cut off, or that has fewer seeds."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from experiments.checkpoint import Log
from experiments.config import TrainConfig
from experiments.data import Task
from experiments.loop import train_seed
from experiments.run_folder import read_run
from tests.experiments.command import quick, quick_until


@pytest.mark.parametrize("preset", ["digits-graph", "digits"])
def test_resume_after_a_cut_equals_a_run_in_one_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    args = ("--router", "token_choice", "--dropout", "0.2", "--checkpoint-every", "1")
    whole = quick(tmp_path / "whole", *args, preset=preset)
    quick_until(2, monkeypatch, tmp_path / "cut", *args, preset=preset)
    log = tmp_path / "cut" / "seed-0" / "metrics.csv"
    log.write_text(log.read_text() + "2,9,9,9,9,9\n")  # an epoch behind the checkpoint
    resumed = quick(tmp_path / "cut", *args, "--resume", preset=preset)
    assert resumed["val"]["values"] == whole["val"]["values"]
    assert resumed["test"]["values"] == whole["test"]["values"]
    weights = [load_file(tmp_path / name / "seed-0" / "checkpoint" / "best.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    with log.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert rows[-1]["loss"] != "9"


@pytest.mark.parametrize("sampling", ["neighbor", "random_node"])
def test_resume_with_sampled_batches(sampling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = (
        "--sampling", sampling, "--batch-size", "300", "--dropout", "0.2",
        "--checkpoint-every", "1", "--eval-every", "2", "--evaluation", "sampled", "--epochs", "5",
        *(("--fanout", "4", "3") if sampling == "neighbor" else ()),
    )  # fmt: skip
    whole = quick(tmp_path / "whole", *args)
    quick_until(3, monkeypatch, tmp_path / "cut", *args)
    resumed = quick(tmp_path / "cut", *args, "--resume")
    for name in ("val", "test", "best_epoch"):
        assert resumed[name]["values"] == whole[name]["values"]
    logs = []
    for name in ("whole", "cut"):
        with (tmp_path / name / "seed-0" / "metrics.csv").open() as file:
            logs.append([(row["epoch"], row["loss"], row["val"]) for row in csv.DictReader(file)])
    assert logs[0] == logs[1]
    assert [bool(val) for _, _, val in logs[0]] == [False, True, False, True, True]  # the last epoch too
    assert whole["best_epoch"]["values"][0] in (1, 3, 4)


def test_resume_adds_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    first = quick(folder, seeds="1")
    trained: list[int] = []

    def train(config: TrainConfig, task: Task, seed: int, part: Path) -> dict[str, Any]:
        if trained:
            raise KeyboardInterrupt
        trained.append(seed)
        return train_seed(config, task, seed, part)

    monkeypatch.setattr("experiments.runs.train_seed", train)
    with pytest.raises(KeyboardInterrupt):
        quick(folder, "--resume", seeds="0 1 2")
    assert trained == [0]
    with pytest.raises(ValueError, match="not finished"):  # and no summary of one seed is left
        read_run(folder, Path("data"))
    monkeypatch.setattr("experiments.runs.train_seed", train_seed)
    whole = quick(folder, "--resume", seeds="0 1 2")
    assert whole["test"]["n"] == 3
    assert whole["test"]["values"][1:2] == first["test"]["values"]
    assert whole["test"]["values"] == quick(tmp_path / "afresh", seeds="0 1 2")["test"]["values"]
    assert list(read_run(folder, Path("data")).seeds) == [0, 1, 2]
    for seeds in ("0 1", "0 1 3"):
        with pytest.raises(SystemExit):
            quick(folder, "--resume", seeds=seeds)
        assert "seeds=[0, 1, 2]" in capsys.readouterr().err


def test_out_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    first = quick(tmp_path / "run", "--resume")  # nothing there: starts afresh
    with pytest.raises(SystemExit) as stop:
        quick(tmp_path / "run")
    assert stop.value.code == 2
    assert "not empty" in capsys.readouterr().err

    def never(*_: Any) -> Any:
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr("experiments.runs.train_seed", never)
    assert quick(tmp_path / "run", "--resume") == first
    with pytest.raises(SystemExit):
        quick(tmp_path / "run", "--resume", "--lr", "0.5")
    assert "lr" in capsys.readouterr().err


def test_a_log_survives_being_cut_off_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    log = Log(path, keep=0)
    for epoch in range(3):
        log.write({"epoch": epoch, "val": 0.5})
    log.close()
    Log(path, keep=3).write({"epoch": 3, "val": 0.5})  # never flushed, as when the process is killed
    with path.open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)][:3] == ["0", "1", "2"]


def test_a_broken_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick(tmp_path / "run")
    for name in ("summary.json", "seed-0/result.json"):
        (tmp_path / "run" / name).unlink()
    state = tmp_path / "run" / "seed-0" / "checkpoint" / "state.ckpt"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(SystemExit):
        quick(tmp_path / "run", "--resume")
    assert "state.ckpt: cannot be read" in " ".join(capsys.readouterr().err.split())
