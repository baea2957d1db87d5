"""What an epoch of training does: schedule, clipping, moving average, and what it logs."""

from __future__ import annotations

import copy
import csv
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from lightning_fabric import Fabric

from experiments.build import build_model, matched_ratio
from experiments.data import load_tasks
from experiments.loop import learning_rate, set_up
from experiments.presets import DIGITS, DIGITS_GRAPH
from experiments.train import main

SMALL = replace(DIGITS, layers=2, hidden=8, experts=2, batch_size=300, epochs=2, progress=False)


def model_and_task(**changes: Any) -> tuple[Any, Any, Any]:
    config = replace(SMALL, **changes)
    task = load_tasks(config)(0)
    torch.manual_seed(0)
    return config, build_model(config, task), task


def test_cosine_warms_up_by_steps_and_ends_near_zero() -> None:
    config = replace(SMALL, schedule="cosine", warmup=0.2)
    factors = [learning_rate(config, step, 50) for step in range(50)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == 1.0
    assert factors[30] == pytest.approx(0.5)
    assert all(a > b for a, b in itertools.pairwise(factors[10:]))
    assert 0 < factors[-1] < 0.01
    assert learning_rate(replace(config, warmup=0.0), 0, 50) == 1.0
    assert learning_rate(replace(config, schedule="constant"), 3, 50) == 1.0


def test_the_schedule_runs_over_all_steps() -> None:
    config, model, task = model_and_task()
    with set_up(Fabric(accelerator="cpu", devices=1), model, config, task) as training:
        assert task.steps(300) == len(list(task.loader("train", 300, 0))) == 3
        rates = []
        for epoch in range(2):
            training.train_epoch(epoch)
            rates.append(training.scheduler.get_last_lr()[0])
        assert training.scheduler.last_epoch == 6
    assert rates[-1] == pytest.approx(config.lr * learning_rate(config, 6, 6))


def test_the_average_is_that_of_the_weights_after_each_step() -> None:
    config, model, task = model_and_task(ema=0.8)
    with set_up(Fabric(accelerator="cpu", devices=1), model, config, task) as training:
        steps: list[dict[str, Any]] = []
        step = training.optimizer.step

        def watch(*args: Any, **kwargs: Any) -> None:
            step(*args, **kwargs)
            steps.append({name: p.detach().clone() for name, p in model.named_parameters()})

        training.optimizer.step = watch
        training.train_epoch(0)
        expected = steps[0]
        for later in steps[1:]:
            expected = {name: 0.8 * value + 0.2 * later[name] for name, value in expected.items()}
        found = training.weights()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)
        before = copy.deepcopy(model.state_dict())
        averaged = training.evaluate("val")[0]
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        training.use(found)
        assert training.evaluate("val")[0] == averaged


@pytest.mark.parametrize(("precision", "fused"), [("32-true", True), ("bf16-mixed", False)])
def test_bf16_on_the_cpu_does_without_the_fused_attention(
    precision: Literal["32-true", "bf16-mixed"], fused: bool
) -> None:
    config, model, task = model_and_task(precision=precision)
    with set_up(Fabric(accelerator="cpu", devices=1, precision=precision), model, config, task) as training:
        training.train_epoch(0)
        assert torch.backends.cuda.flash_sdp_enabled() is fused
    assert torch.backends.cuda.flash_sdp_enabled()


def test_gradients_are_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    norms: dict[float, list[float]] = {}
    for clip in (0.0, 1e-3):
        config, model, task = model_and_task(clip_norm=clip, optimizer="adamw")
        norms[clip] = []
        with set_up(Fabric(accelerator="cpu", devices=1), model, config, task) as training:
            step = training.optimizer.step

            def watch(*_: Any, clip: float = clip, model: Any = model, step: Any = step) -> None:
                norms[clip].append(math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters())))
                step()

            monkeypatch.setattr(training.optimizer, "step", watch)
            training.train_epoch(0)
    assert min(norms[0.0]) > 1e-2
    assert norms[1e-3] == pytest.approx([1e-3] * 3, rel=1e-3)


def test_losses_are_logged_layer_by_layer(tmp_path: Path) -> None:
    args = ["--epochs", "2", "--seeds", "0", "--no-progress", "--balance", "importance_load"]
    main(
        [
            "digits",
            "--router",
            "token_choice",
            *args,
            "--balance-coef",
            "0.1",
            "--z-coef",
            "0.01",
            "--out",
            str(tmp_path),
        ]
    )
    with (tmp_path / "seed-0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    named = [name for name in rows[0] if name not in ("epoch", "lr", "loss", "aux", "val", "seconds")]
    assert {name.rsplit("_", 1)[1] for name in named} == {"0", "1"}
    assert len(named) == 6  # importance, load and z of two layers
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["curve"]["epoch"] == [1, 2]
    assert summary["curve"]["val"][0] == pytest.approx([float(row["val"]) for row in rows], abs=1e-5)
    assert summary["curve"]["loss"][0] == pytest.approx([float(row["loss"]) for row in rows], abs=1e-5)


@pytest.mark.slow
def test_compiled_training_gives_the_same_curve(tmp_path: Path) -> None:
    args = ["digits", "--epochs", "2", "--seeds", "0", "--layers", "2", "--no-progress", "--no-check-finite"]
    main([*args, "--out", str(tmp_path / "eager")])
    main([*args, "--out", str(tmp_path / "compiled"), "--compile"])
    curves = [json.loads((tmp_path / n / "summary.json").read_text())["curve"] for n in ("eager", "compiled")]
    assert curves[0]["loss"][0] == pytest.approx(curves[1]["loss"][0], rel=0.02)


@pytest.mark.parametrize(
    ("preset", "args", "message"),
    [
        ("digits", ["--moe-blocks", "1", "--router", "dense"], "moe_blocks: got (1,) with router='dense'"),
        ("digits", ["--moe-blocks", "0", "9"], "blocks: got (0, 9), expected some of -4 to 3"),
        ("digits", ["--ema", "1.0"], "ema: got 1.0, expected a number in [0, 1)"),
        ("digits", ["--patch", "3"], "image_size: got 8, expected a multiple of patch_size=3"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    preset: str, args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([preset, "--epochs", "1", "--no-progress", "--out", str(tmp_path / "run"), *args])
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_blocks_by_number(tmp_path: Path) -> None:
    config = replace(DIGITS, moe_blocks=(0, 3), out=tmp_path)
    model = build_model(config, load_tasks(config)(0))
    kinds = [type(block.mlp).__name__ for block in model.encoder.layers]  # type: ignore[union-attr]
    assert kinds == ["TokenMoE", "MLPBlock", "MLPBlock", "TokenMoE"]


def test_a_baseline_of_chosen_blocks() -> None:
    config = replace(DIGITS, moe_blocks=(0, 3), router="dense", equal="parameters", equal_to="expert_choice")
    task = load_tasks(config)(0)
    ratio = matched_ratio(config, task, build_model(config, task))
    assert ratio == pytest.approx(1, abs=0.01)


def test_older_runs_had_the_defaults() -> None:
    there = DIGITS_GRAPH.science()
    del there["ema"], there["shared_router"]
    assert replace(DIGITS_GRAPH).differences(there) == {}
    assert replace(DIGITS_GRAPH, ema=0.5).differences(there) == {"ema": (0.0, 0.5)}
    assert replace(DIGITS_GRAPH).differences(there | {"k": 2, "patch": None}) == {"k": (2, 1)}


@pytest.mark.parametrize(
    ("preset", "option"),
    [("digits", "--conv"), ("digits", "--tie-routers"), ("digits", "--augment"), ("cora", "--patch")],
)
def test_options_of_other_data_are_unknown(preset: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([preset, option, "1"])
    captured = capsys.readouterr()
    assert f"{option}: unknown option of {preset}" in captured.err + captured.out
