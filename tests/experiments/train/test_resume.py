"""Stopping a run at any moment, continuing it, and what a folder that is taken means."""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.train import checkpoint
from experiments.train.command import main, parse
from experiments.train.config import RunConfig
from experiments.train.data.task import Task
from experiments.train.loop import run, train_seed
from experiments.train.run_folder import read_run
from experiments.train.training import Training
from tests.helpers.command import QUICK, full_disk, quick, refused, rows, run_until
from tests.helpers.made_images import write_images
from tests.helpers.run_folders import assert_same

TINY = "--patch 4 --dim 8 --vit-heads 2 --hidden 8 --layers 2 --batch-size 8"
AUGMENTED = "--scale None --augment standard --dropout 0.1"
SMALL = "--layers 2 --hidden 16 --batch-size 200"
SAMPLED = "--sampling neighbor --fanout 4 3 --eval-every 2"
RUNS: dict[str, str] = {
    "graph": "digits-graph --router token_choice --dropout 0.2",
    "choice": "digits-graph --router expert_choice --schedule cosine --conv gcn sage "
    "--router-input node degree --start plain --jk last --clip-norm 1",
    "votes": "digits-graph --precision bf16-mixed --router attention_vote --scope neighbors",
    "neighbors": f"digits-graph {SAMPLED} --batch-size 300 --dropout 0.2 "
    "--balance switch --router token_choice",
    "layers": f"digits-graph {SAMPLED} --batch-size 300 --evaluation layerwise --precision 64-true",
    "images": f"digits --router token_choice --balance bias --dropout 0.1 {SMALL}",
    "folder": f"images --router token_choice {TINY} {AUGMENTED}",
}
"""One batch an epoch (graph to votes), or several; everything that draws or remembers."""


@pytest.mark.parametrize("name", RUNS)
def test_a_run_stopped_three_times_equals_one_in_one_go(
    name: str, tmp_path: Path, capsys: Any
) -> None:
    preset, *args = RUNS[name].split()
    if preset == "images":
        args += ["--data-root", str(write_images(tmp_path / "data"))]
    whole, cut = quick(tmp_path / "whole", *args, preset=preset), tmp_path / "cut off"
    assert whole["steps"] == 1 or whole["steps"] > 2
    command = [preset, *QUICK, *args, "--seeds", "0", "--out", str(cut)]
    run_until(1, command)
    for steps in (1, whole["steps"]):  # inside an epoch, and over its end
        run_until(steps, [*command, "--resume"])
    log = cut / "seed-0" / "metrics.csv"
    # Behind the checkpoint, and half a row of a process that was killed
    log.write_text(log.read_text() + "2,9,9\n0")
    *_, line = capsys.readouterr().err.splitlines()
    main(shlex.split(line.partition("continue with: python -m experiments.train ")[2]))
    assert_same(tmp_path / "whole", cut)


def test_a_signal_while_the_last_epoch_ends_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is stopped before the test set is read, and is whole when it goes on."""
    end_epoch, args = Training.end_epoch, ["digits-graph", *QUICK, "--seeds", "0"]

    def interrupted(training: Training, seed: int) -> Any:
        row = end_epoch(training, seed)
        if training.reached.epochs == training.config.epochs:
            signal.raise_signal(signal.SIGTERM)
        return row

    monkeypatch.setattr(Training, "end_epoch", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main([*args, "--out", str(tmp_path / "cut")])
    assert stopped.value.code == 128 + signal.SIGTERM
    assert not (tmp_path / "cut" / "seed-0" / "result.json").exists()
    monkeypatch.setattr(Training, "end_epoch", end_epoch)
    main([*args, "--out", str(tmp_path / "cut"), "--resume"])
    main([*args, "--out", str(tmp_path / "whole")])
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_processes_that_draw_neighborhoods_are_part_of_a_run(tmp_path: Path, capsys: Any) -> None:
    sampled = ["digits-graph", *QUICK, "--seeds", "0", "--sampling", "neighbor"]
    sampled += ["--fanout", "2", "2", "--out", str(tmp_path / "run")]
    main(sampled)
    again = [*sampled, "--seeds", "0", "1", "--resume", "--workers", "2"]
    assert "workers" in refused(again, capsys)
    whole = parse(["digits-graph", "--workers", "2"])
    assert "workers" not in whole.science()


def test_a_process_that_is_killed_loses_a_minute_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS", 0)  # between two of them, in place of 60
    args = ["images", *QUICK, "--seeds", "0", *TINY.split()]
    args += ["--data-root", str(write_images(tmp_path / "data"))]
    process = multiprocessing.get_context("fork").Process(
        target=main, args=([*args, "--out", str(tmp_path / "cut")],)
    )
    process.start()
    wait_for_checkpoint(tmp_path / "cut", process.is_alive)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    main([*args, "--out", str(tmp_path / "cut"), "--resume"])
    main([*args, "--out", str(tmp_path / "whole")])
    assert_same(tmp_path / "whole", tmp_path / "cut", exact=False)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "workers"), [(signal.SIGKILL, 0), (signal.SIGINT, 2)])
def test_a_command_that_is_killed_or_stopped_from_the_keyboard(
    number: int, workers: int, tmp_path: Path
) -> None:
    """Ctrl-C in a terminal reaches the processes that load images too."""
    args = ["images", *QUICK, "--seeds", "0", *TINY.split(), "--workers", str(workers)]
    args += ["--data-root", str(write_images(tmp_path / "data"))]
    code = (
        "from experiments.train import checkpoint, command; checkpoint.SECONDS = 0; command.main()"
    )
    command = [sys.executable, "-c", code, *args, "--out", str(tmp_path / "cut")]
    process = subprocess.Popen(
        command, cwd=Path(__file__).parents[3], start_new_session=True, stderr=subprocess.PIPE
    )
    wait_for_checkpoint(tmp_path / "cut", lambda: process.poll() is None)
    os.killpg(process.pid, number)
    _, error = process.communicate()
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert b"Traceback" not in error
    assert (b"continue with" in error) is (number == signal.SIGINT)
    main([*args, "--out", str(tmp_path / "cut"), "--resume"])
    main([*args, "--out", str(tmp_path / "whole")])
    assert_same(tmp_path / "whole", tmp_path / "cut", exact=False)


def wait_for_checkpoint(run: Path, is_alive: Callable[[], bool]) -> None:
    """Of the first seed, as long as its process lives."""
    state = run / "seed-0" / "checkpoint" / "state.ckpt"
    give_up = time.monotonic() + 120
    while not state.exists() and is_alive() and time.monotonic() < give_up:
        time.sleep(0.01)


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    run_until(2, ["digits-graph", *QUICK, "--seeds", "0", "--out", str(tmp_path)], times=2)
    assert len(rows(tmp_path)) == 1
    assert not (tmp_path / "seed-0" / "checkpoint").exists()


def test_the_same_command_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["digits-graph", *QUICK, "--seeds", "0", "--epochs", "1"]
    for _ in range(3):
        main(args)
    main([*args, "--resume"])  # the last of them, which is finished
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == [f"digits-graph-token_choice{number}" for number in ("", "-2", "-3")]
    taken = refused([*args, "--out", "runs/digits-graph-token_choice"], capsys)
    assert "out: got runs/digits-graph-token_choice, which holds files" in taken


def test_a_seed_is_trained_by_one_process_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse(
        ["digits-graph", *QUICK, "--seeds", "0", "--resume", "--out", str(tmp_path / "run")]
    )
    step, tried = Training.step, list[int]()

    def twice(*arguments: Any) -> None:
        with pytest.raises(ValueError, match=r"out: .*seed-0 is being trained by another process"):
            run(config)
        tried.append(1)
        step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "step", twice)
        run(config)
    assert len(tried) == len(rows(tmp_path / "run")) == 3
    run(replace(config, seeds=(0, 1)))  # the lock is let go


def test_resume_adds_seeds_and_repeats_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder, trained = tmp_path / "run", list[int]()
    first = quick(folder, "--resume", seeds="1")  # nothing there: starts afresh

    def train(fabric: Any, config: RunConfig, task: Task, seed: int, progress: Any) -> Any:
        trained.append(seed)
        if seed == 2 and len(trained) == 2:
            raise KeyboardInterrupt
        return train_seed(fabric, config, task, seed, progress)

    monkeypatch.setattr("experiments.train.loop.train_seed", train)
    assert quick(folder, "--resume", seeds="1") == first
    with pytest.raises(SystemExit):
        quick(folder, "--resume", seeds="0 1 2")
    with pytest.raises(ValueError, match="unfinished"):  # and no summary of one seed is left
        read_run(folder, Path("data"))
    whole = quick(folder, "--resume", seeds="0 1 2")
    assert trained == [0, 2, 2]
    assert whole["test"]["values"][1:2] == first["test"]["values"]
    assert whole["test"]["values"] == quick(tmp_path / "afresh", seeds="0 1 2")["test"]["values"]
    for args, message in ((["--seeds", "0", "1"], "seeds=(0, 1, 2)"), (["--lr", "0.5"], "lr=0.01")):
        command = f"digits-graph --out {folder} --resume --seeds 0 1 2"
        assert message in refused([*command.split(), *QUICK, *args], capsys)


def test_a_configuration_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = quick(tmp_path / "run", "--router", "token_choice", "--lr", "0.02")
    own = str(tmp_path / "run" / "config.json")
    assert quick(tmp_path / "same", "--config", own)["test"] == first["test"]
    assert parse(["--config", own, "--k", "2"]).k == 2
    assert parse(["--config", own]).data_root == Path("data")
    partial = tmp_path / "partial.json"
    partial.write_text(
        '{"lr": 1, "seeds": [4, 5], "options": {"balance": "switch", "scope": null}, "out": "a"}'
    )
    config = parse(["digits", f"--config={partial}", "--epochs", "7"])
    assert (config.lr, config.seeds, config.out) == (1.0, (4, 5), Path("a"))
    assert (config.epochs, config.hidden) == (7, 96)
    assert config.options.given() == {"balance": "switch"}


def test_a_run_on_a_full_disk_names_the_file_and_goes_on_later(tmp_path: Path, capsys: Any) -> None:
    command = ["digits-graph", *QUICK, "--seeds", "0", "--out", str(tmp_path / "cut"), "--resume"]
    with full_disk(10_000):
        message = refused(command, capsys)
    state = tmp_path / "cut" / "seed-0" / "checkpoint" / "state.ckpt"
    assert f"error: {state}: cannot be written (" in message
    assert "; continue with: python -m experiments.train digits-graph" in message
    main(command)
    quick(tmp_path / "whole")
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_a_broken_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick(tmp_path / "run")
    for name in ("summary.json", "seed-0/result.json"):
        (tmp_path / "run" / name).unlink()
    state = tmp_path / "run" / "seed-0" / "checkpoint" / "state.ckpt"
    whole = torch.load(state)
    command = ["digits-graph", *QUICK, "--seeds", "0", "--out", str(tmp_path / "run"), "--resume"]
    states: list[Any] = [whole | {"model": {}}, whole | {"processes": []}, {}, torch.zeros(3)]
    for broken in states:
        torch.save(broken, state)
        assert f"error: {state}: cannot be read" in refused(command, capsys)
    state.write_bytes(state.read_bytes()[:100])
    assert f"error: {state}: cannot be read" in refused(command, capsys)


def test_a_result_that_does_not_fit_the_others_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick(tmp_path / "run")
    command = ["digits-graph", *QUICK, "--seeds", "0", "1", "--out", str(tmp_path / "run")]
    path = tmp_path / "run" / "seed-0" / "result.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"val": "0.5"}))
    assert f"error: {path}: cannot be read (val: got '0.5'" in refused(
        [*command, "--resume"], capsys
    )
    path.write_text(json.dumps(whole | {"routing": []}))
    assert f"error: {tmp_path / 'run'}: got results of seeds with other MoE layers" in refused(
        [*command, "--resume"], capsys
    )
