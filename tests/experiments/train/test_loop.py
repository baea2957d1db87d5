"""What an epoch of training does: schedule, clipping, and what it logs."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric

from experiments.train.build import build_model
from experiments.train.config import restore
from experiments.train.data.load import load_tasks
from experiments.train.loop import WARMUP, Progress, learning_rate, set_up
from experiments.train.presets import DIGITS, DIGITS_GRAPH
from experiments.train.run_folder import differences_of
from tests.experiments.command import quick, rows

SMALL = replace(DIGITS, layers=2, hidden=8, experts=2, batch_size=300, epochs=2, progress=False)


def model_and_task(**changes: Any) -> tuple[Any, Any, Any]:
    config = replace(SMALL, **changes)
    task = load_tasks(config)(0)
    torch.manual_seed(0)
    return config, build_model(config, task), task


def test_cosine_warms_up_by_steps_and_ends_near_zero() -> None:
    factors = [learning_rate(SMALL, step, 100) for step in range(100)]
    warm = round(WARMUP * 100)
    assert factors[:warm] == pytest.approx([(step + 1) / warm for step in range(warm)])
    assert factors[warm] == 1.0
    assert factors[55] == pytest.approx(0.5)
    assert all(a > b for a, b in itertools.pairwise(factors[warm:]))
    assert 0 < factors[-1] < 0.01
    assert learning_rate(replace(SMALL, schedule="constant"), 3, 50) == 1.0


def test_steps_follow_the_schedule_and_clip_gradients() -> None:
    config, model, task = model_and_task(clip_norm=1e-3)
    with set_up(Fabric(accelerator="cpu", devices=1), model, config, task) as training:
        for batch in itertools.chain(training.batches("train", 0), training.batches("train", 1)):
            training.step(batch, len(batch.target))
        assert training.scheduler.last_epoch == 2 * task.steps(300) == 6
        assert training.lr == pytest.approx(config.lr * learning_rate(config, 6, 6))
    norm = math.sqrt(sum(float(parameter.grad.square().sum()) for parameter in model.parameters()))
    assert norm == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(("precision", "fused"), [("32-true", True), ("bf16-mixed", False)])
def test_bf16_on_the_cpu_does_without_the_fused_attention(precision: Any, fused: bool) -> None:
    config, model, task = model_and_task(precision=precision)
    with set_up(
        Fabric(accelerator="cpu", devices=1, precision=precision), model, config, task
    ) as training:
        training.step(next(iter(training.batches("train", 0))), 300)
        assert torch.backends.cuda.flash_sdp_enabled() is fused
    assert torch.backends.cuda.flash_sdp_enabled()


def test_losses_are_logged_layer_by_layer(tmp_path: Path) -> None:
    args = (
        "--router",
        "token_choice",
        "--balance",
        "importance_load",
        "--balance-coef",
        "0.1",
        "--epochs",
        "2",
    )
    summary = quick(tmp_path, *args, preset="digits")
    logged = rows(tmp_path)
    names = {f"{name}_{layer}" for name in ("importance", "load") for layer in (0, 1)}
    assert set(logged[0]) == {"epoch", "lr", "loss", "aux", "val"} | names
    assert summary["curve"]["epoch"] == [1, 2]
    for figure in ("loss", "val"):
        assert summary["curve"][figure][0] == pytest.approx(
            [float(row[figure]) for row in logged], abs=1e-5
        )


def test_configurations_of_older_versions() -> None:
    there = DIGITS_GRAPH.science()
    del there["shared_router"]  # which had the default
    old = there | {"ema": 0.0, "tie_routers": False, "patch": None}
    assert restore(old, DIGITS_GRAPH.data_root) == DIGITS_GRAPH
    assert differences_of(DIGITS_GRAPH, old | {"k": 2}) == {"k": (2, 1)}
    with pytest.raises(ValueError, match=r"ema: got 0\.9, expected 0\.0"):
        restore(old | {"ema": 0.9}, DIGITS_GRAPH.data_root)


def test_every_committed_run_is_still_read() -> None:
    found = [
        json.loads(path.read_text())
        for path in (Path(__file__).parents[3] / "results").glob("*.json")
    ]
    variants = [
        variant for study in found for variant in study.get("variants", []) if "config" in variant
    ]
    gone = 0
    for variant in variants:
        config = variant["config"]
        beside = (
            config.get("shared_expert", False) is not False and config.get("dense_start") is False
        )
        if beside and config["router"] != "dense":
            gone += 1
            with pytest.raises(ValueError, match=r"^dense_start: got False beside a shared expert"):
                restore(config, Path())
            continue
        differences = differences_of(restore(config, Path()), config)
        assert set(differences) <= {"file", "digest"}  # the data are not here
    assert len(variants) > 100
    assert gone == 16


def test_progress_in_a_file_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(6)
    progress.skip(1)
    progress.show("a seed 0", 2, 3, "loss 1")  # soon after the start
    progress.show("a seed 0", 3, 3, "loss 1")
    progress.finish(3)
    progress.show("a seed 1", 3, 3, "loss 2")
    progress.finish(3)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(";")[0] for line in lines] == [
        f"a seed {n}: epoch 3 of 3, loss {n + 1}" for n in (0, 1)
    ]
