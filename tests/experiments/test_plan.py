"""What a run takes is foreseen."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import plan
from experiments.build import build_model, num_parameters
from experiments.data import load_tasks
from experiments.train import main as train
from experiments.train import parse
from tests.experiments.made_graph import make_config, make_task

SAMPLED = ["digits-graph", "--sampling", "neighbor", "--fanout", "4", "3", "--batch-size", "300"]


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "SECONDS", 0.2)


def planned(path: Path, *args: str) -> dict[str, Any]:
    plan.main([*args, "--json", str(path / "plan.json")])
    found: dict[str, Any] = json.loads((path / "plan.json").read_text())
    return found


def test_one_process_moves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(tmp_path, *SAMPLED, "--evaluation", "sampled", "--eval-every", "5")
    config = parse(SAMPLED)
    parameters = 4 * num_parameters(build_model(config, load_tasks(config)(0)))
    memory, seconds = found["memory"], found["seconds"]
    assert found["steps"] == 3  # 898 nodes
    assert memory["parameters"] == memory["gradients"] == parameters
    assert 2 * parameters <= memory["optimizer"] < 2.1 * parameters  # and a counter a tensor
    assert sum(value for name, value in memory.items() if name != "peak") == memory["peak"] > 100 * 2**20
    assert [found["bytes"]["step"][name] for name in ("gradients", "routers", "buffers")] == [0, 0, 0]
    assert found["bytes"]["epoch"]["batch"] == 3 * found["bytes"]["step"]["batch"] > 3 * 300 * 64 * 4
    assert seconds["all_reduce"] == 0
    assert seconds["epoch"] == pytest.approx(3 * seconds["step"] + seconds["evaluation"])
    assert found["calibration"]["steps"] >= 3
    told = capsys.readouterr().out
    assert "digits-graph: 3 steps of 300 / 1" in told
    assert "network: none" in told


def test_four_processes_move_gradients_sums_and_buffers(tmp_path: Path) -> None:
    args = ["digits", "--router", "token_choice", "--balance", "switch", "--devices", "2", "--nodes", "2"]
    found = planned(tmp_path, *args, "--bandwidth", "2")
    config = parse(["digits", "--router", "token_choice", "--balance", "switch"])
    model = build_model(config, load_tasks(config)(0))
    moved, memory = found["bytes"]["step"], found["memory"]
    assert memory["gradients"] == 2 * memory["parameters"] == 8 * num_parameters(model)
    assert moved["gradients"] == 1.5 * memory["parameters"]
    assert moved["routers"] == 1.5 * 2 * 4 * (2 * 8 + 1)  # of two layers: loads, probabilities, tokens
    assert moved["buffers"] == sum(buffer.nbytes for buffer in model.buffers())
    assert moved["batch"] == pytest.approx(8 * (64 * 4 + 8), rel=0.2)  # 8 of 32 images, fewer of the last batch
    sent = moved["gradients"] + moved["routers"] + moved["buffers"]
    assert found["seconds"]["all_reduce"] == pytest.approx(sent / 2e9)
    assert found["network"] == "assumed, 2 GB/s"
    assert (found["processes"], found["steps"]) == (4, 29)
    assert {"devices", "nodes"} <= set(found["config"])


def test_time_is_that_of_those_who_use_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(plan, "SECONDS", 20.0)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    task = make_task(make_config(sampling="neighbor", evaluation="sampled"))
    share = plan.Share(task, 2, torch.device("cpu"))

    def epoch(shard: Any) -> int:
        count = 0
        for count, _ in enumerate(share("train", 4, 0, shard), 1):  # noqa: B007
            now[0] += 2.0
        now[0] += 7.0  # an evaluation
        return count

    batches = epoch(None)
    assert (share.began, share.laps["train"]) == ([], [])  # neither timed nor cut off, and whole
    now[0] = 0.0
    assert epoch((0, 1)) == epoch((0, 1)) == 3 < batches  # 5 s, a quarter of 20, are over
    with pytest.raises(plan.EnoughError):
        epoch((0, 1))
    assert [lap for lap, _, _ in share.laps["train"]] == [2.0] * 6
    assert {rows for _, rows, _ in share.laps["train"]} == {2}  # the first half of four
    assert (share.began, share.ended) == ([0.0, 13.0, 26.0], [6.0, 19.0])


def test_validation_that_is_cut_off_takes_its_whole_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "SECONDS", 11.0)
    monkeypatch.setattr(time, "perf_counter", partial(next, itertools.count()))  # a second a look
    found = planned(tmp_path, "digits", "--eval-every", "2")
    assert found["calibration"]["steps"] < 29
    assert 15 <= 2 * found["seconds"]["evaluation"] < 19  # batches of validation, of which three were evaluated


@pytest.mark.parametrize("args", [["cora", "--devices", "2"], ["digits", "--devices", "3"], ["digits", "--lr", "0"]])
def test_refusals_are_those_of_training(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for command in (train, plan.main):
        with pytest.raises(SystemExit) as stop:
            command(args)
        assert stop.value.code == 2
        said.append(" ".join(capsys.readouterr().err.split()))
    assert said[0] == said[1] != ""


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["digits", "--devices", "2", "--bandwidth", "0"], "bandwidth: got 0.0, expected GB/s"),
        (["nothing"], "invalid choice: 'nothing'"),
        (["digits", "--nothing", "1"], "nothing"),
    ],
)
def test_wrong_options_are_named(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        plan.main(args)
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_memory_and_time_are_those_of_training(tmp_path: Path) -> None:
    """Of the whole process, from its start; on a machine without other load."""
    modules = [sys.executable, "-m"]
    path = tmp_path / "plan.json"
    subprocess.run([*modules, "experiments.plan", "digits", "--json", str(path)], check=True)
    args = ["digits", "--epochs", "10", "--seeds", "0", "--no-progress", "--out", str(tmp_path / "run")]
    subprocess.run([*modules, "experiments.train", *args], check=True)
    found, summary = json.loads(path.read_text()), json.loads((tmp_path / "run" / "summary.json").read_text())
    assert found["memory"]["peak"] / 2**20 == pytest.approx(summary["peak_memory"], rel=0.25)
    assert 10 * found["seconds"]["epoch"] == pytest.approx(summary["seconds"]["mean"], rel=0.5)


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two processes want two cores")
def test_network_of_this_machine_is_measured(tmp_path: Path) -> None:
    found = planned(tmp_path, "digits", "--devices", "2")
    assert found["network"] == "measured, gloo"
    assert 1e-5 < found["seconds"]["all_reduce"] < 1
