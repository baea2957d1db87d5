"""Seeds side by side: what a signal does to one of their processes, and to all."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import active_children
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import jobs, train
from tests.experiments.command import refused
from tests.experiments.test_resume import assert_same

ARGS = ["digits-graph", "--router", "token_choice", "--dropout", "0.2", "--noise", "True", "--epochs", "40"]
ARGS += ["--seeds", "0", "1", "--jobs", "2"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one go, and by one process."""
    folder = tmp_path_factory.mktemp("jobs") / "whole"
    train.main([*ARGS, "--jobs", "1", "--no-progress", "--out", str(folder)])
    return folder


def stopped(out: Path, act: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> int:
    """The status of the command, in which ``act`` was called as soon as both seeds were in training."""
    left = [act]

    def look(pipes: Sequence[Any]) -> Any:
        if left and all((out / f"seed-{seed}" / "metrics.csv").exists() for seed in (0, 1)):
            left.pop()()
        return wait(pipes, 0.01)

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "wait", look)
        with pytest.raises(SystemExit) as stop:
            train.main([*ARGS, "--out", str(out)])
    assert not left
    assert not active_children()
    return int(str(stop.value.code))


def finish(out: Path, whole: Path) -> None:
    train.main([*ARGS, "--no-progress", "--resume", "--out", str(out)])
    for seed in ("seed-0", "seed-1"):
        assert_same(whole, out, seed=seed)


def test_a_seed_that_is_killed_leaves_the_other_alone(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stopped(tmp_path, lambda: {one.name: one for one in active_children()}["seed 1"].kill(), monkeypatch) == 1
    error = capsys.readouterr().err
    assert "2 of 2 seeds done" in error
    assert "seed 1 ended with status -9: " in error
    assert "continue with: python -m experiments.train digits-graph" in error
    assert [(tmp_path / f"seed-{seed}" / "result.json").exists() for seed in (0, 1)] == [True, False]
    finish(tmp_path, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_processes_which_save(
    number: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def act() -> None:
        assert all(os.getpgid(one.pid or 0) == one.pid for one in active_children())  # Ctrl-C reaches only this one
        signal.raise_signal(number)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background jobs ignore it
    try:
        assert stopped(tmp_path, act, monkeypatch) == 128 + number
    finally:
        signal.signal(signal.SIGINT, before)
    assert "stopped; continue with: python -m experiments.train" in capsys.readouterr().err
    assert all((tmp_path / f"seed-{seed}" / "checkpoint" / "state.ckpt").exists() for seed in (0, 1))
    assert not list(tmp_path.glob("seed-*/result.json"))
    finish(tmp_path, whole)


def test_why_a_seed_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main([*ARGS, "--kmeans-init", "--out", str(tmp_path)])
    assert stop.value.code == 1
    error = capsys.readouterr().err
    for seed in (0, 1):
        assert f"seed {seed} ended with status 2: error: kmeans_init: got True" in error
    assert "nothing was trained yet" in error


def test_jobs_out_of_range(capsys: pytest.CaptureFixture[str]) -> None:
    assert "jobs: got 0, expected at least 1" in refused(["digits-graph", "--jobs", "0"], capsys)
    command = ["digits", "--jobs", "2", "--devices", "2"]
    assert "jobs: got 2 with 2 processes a seed" in refused(command, capsys)


def test_where_it_runs_is_no_part_of_the_run(whole: Path) -> None:
    assert "jobs" not in json.loads((whole / "config.json").read_text())
