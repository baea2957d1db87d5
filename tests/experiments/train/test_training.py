"""What an epoch of training does: schedule, clipping, and what it logs."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric

from experiments.train.build import build_model
from experiments.train.kinds import kind_of
from experiments.train.molecule_gnn import BondGCNConv, MoleculeGNN
from experiments.train.presets import DIGITS
from experiments.train.training import learning_rate, make_optimizer, set_up
from tests.helpers.command import quick, rows

SMALL = replace(DIGITS, layers=2, hidden=8, experts=2, batch_size=300, epochs=2, progress=False)


def model_and_task(**changes: Any) -> tuple[Any, Any, Any]:
    config = replace(SMALL, **changes)
    task = kind_of(config).tasks()(0)
    torch.manual_seed(0)
    return config, build_model(config, task), task


@pytest.mark.parametrize("router", [None, "token_choice"])
def test_what_the_dense_model_does_not_decay_its_experts_do_not(router: Any) -> None:
    model = MoleculeGNN(8, 1, 2, conv=BondGCNConv, router=router)
    optimizer = make_optimizer(replace(SMALL, weight_decay=0.1), model)
    decayed, spared = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    roots = {id(value) for name, value in model.named_parameters() if name.endswith("root")}
    weights = {id(value) for name, value in model.named_parameters() if name.endswith("weight")}
    assert roots <= spared
    assert decayed & weights


def test_steps_follow_the_schedule_and_clip_gradients() -> None:
    config, model, task = model_and_task(clip_norm=1e-3)
    with set_up(Fabric(accelerator="cpu", devices=1), model, config, task) as training:
        for batch in itertools.chain(training.batches("train", 0), training.batches("train", 1)):
            training.step(batch, len(batch.target))
        assert training.scheduler.last_epoch == 2 * task.steps(300) == 6
        assert training.lr == pytest.approx(config.lr * learning_rate(config.schedule, 6, 6, 1))
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
        "switch",
        "--epochs",
        "2",
    )
    summary = quick(tmp_path, *args, preset="digits")
    logged = rows(tmp_path)
    names = {"switch_0", "switch_1"}
    assert set(logged[0]) == {"epoch", "lr", "loss", "aux", "val"} | names
    assert summary["curve"]["epoch"] == [1, 2]
    for figure in ("loss", "val"):
        assert summary["curve"][figure][0] == pytest.approx(
            [float(row[figure]) for row in logged], abs=1e-5
        )
