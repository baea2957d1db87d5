"""Seeds side by side: what a signal does to one of their processes, and to all."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from multiprocessing import active_children
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest

from experiments.train import command as train
from experiments.train import jobs
from tests.helpers.run_folders import assert_same

ARGS = [
    "digits-graph",
    "--router",
    "token_choice",
    "--dropout",
    "0.2",
    "--epochs",
    "40",
]
ARGS += ["--seeds", "0", "1", "--jobs", "2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one go and by one process."""
    folder = tmp_path_factory.mktemp("jobs") / "whole"
    train.main([*ARGS, "--jobs", "1", "--no-progress", "--out", str(folder)])
    return folder


def stopped(out: Path, act: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> int:
    """The status of the command.

    ``act`` was called as soon as both seeds were in training.
    """
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


@pytest.mark.slow
def test_a_seed_that_is_killed_leaves_the_other_alone(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        stopped(
            tmp_path,
            lambda: {one.name: one for one in active_children()}["seed 1"].kill(),
            monkeypatch,
        )
        == 1
    )
    error = capsys.readouterr().err
    assert "2 of 2 seeds ended" in error
    assert "seed 1 ended with status -9: " in error
    assert "continue with: python -m experiments.train digits-graph" in error
    assert [(tmp_path / f"seed-{seed}" / "result.json").exists() for seed in (0, 1)] == [
        True,
        False,
    ]
    train.main([*ARGS, "--no-progress", "--resume", "--out", str(tmp_path)])
    assert_same(whole, tmp_path)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_ends_all_processes_which_save(
    number: int,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def act() -> None:
        # Ctrl-C reaches only this one
        assert all(os.getpgid(one.pid or 0) == one.pid for one in active_children())
        signal.raise_signal(number)

    # Shells let background jobs ignore it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert stopped(tmp_path, act, monkeypatch) == 128 + number
    finally:
        signal.signal(signal.SIGINT, before)
    assert "stopped; continue with: python -m experiments.train" in capsys.readouterr().err
    assert all(
        (tmp_path / f"seed-{seed}" / "checkpoint" / "state.ckpt").exists() for seed in (0, 1)
    )
    assert not list(tmp_path.glob("seed-*/result.json"))
    train.main([*ARGS, "--no-progress", "--resume", "--out", str(tmp_path)])
    assert_same(whole, tmp_path)


@pytest.mark.slow
def test_seeds_side_by_side_may_have_workers_that_draw_neighborhoods(tmp_path: Path) -> None:
    """Workers of a process that was not forked are not forked, either."""
    sampled = ["--sampling", "neighbor", "--fanout", "3", "2", "--batch-size", "300"]
    args = [*ARGS, *sampled, "--evaluation", "full", "--epochs", "2", "--workers", "1"]
    for jobs_at_once in ("1", "2"):
        train.main([*args, "--jobs", jobs_at_once, "--out", str(tmp_path / jobs_at_once)])
    assert_same(tmp_path / "1", tmp_path / "2")
