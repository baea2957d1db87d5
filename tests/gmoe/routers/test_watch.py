"""A router that does no work says so, once, and what to do. Shapes: T tokens, D width, E experts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from gmoe import LinearExperts, MoE, RandomRouter, TokenChoice, UniformRouter, aux_loss
from gmoe.routers.watch import STEPS

D, E = 4, 8


def said(layer: Any, steps: int, loss: Callable[..., Any], x: Any = None) -> list[str]:
    x = torch.randn(32, D) if x is None else x
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            loss(*layer(x, return_routing=True)).backward()
    return [str(warning.message) for warning in caught]


def layer(**options: Any) -> MoE:
    torch.manual_seed(0)
    return MoE(TokenChoice(D, E, **options), LinearExperts(D, D, E))


def task(y: Any, _: Any) -> Any:
    return y.square().sum()


def collapsed(**options: Any) -> Any:
    found: Any = layer(balance=None, **options)
    with torch.no_grad():
        found.router.gate.weight[0] = 9.0
    return found


def test_collapsed_experts_are_told_of_once() -> None:
    x = torch.rand(32, D)
    assert said(collapsed(), STEPS - 1, task, x) == []
    (text,) = said(collapsed(), 3 * STEPS, task, x)
    assert "went to 2 of 8 experts" in text
    assert "'balance': 'bias'" in text


def test_nothing_is_said_of_routers_that_work() -> None:
    assert said(layer(), 2 * STEPS, task) == []
    assert said(MoE(UniformRouter(D, E), LinearExperts(D, D, E)), 2 * STEPS, task) == []
    assert said(MoE(RandomRouter(D, 1), LinearExperts(D, D, 1)), 2 * STEPS, task) == []


def test_nothing_is_counted_in_evaluation() -> None:
    assert said(collapsed().eval(), 2 * STEPS, task, torch.rand(32, D)) == []


def test_a_short_collapse_is_no_collapse() -> None:
    found, x = collapsed(), torch.rand(32, D)
    assert said(found, STEPS - 5, task, x) == []
    assert said(found, STEPS - 5, task) == []  # of both signs
    assert said(found, 5, task, x) == []


@pytest.mark.parametrize("options", [{"balance": "switch"}, {"balance": "importance_load"}, {"z_coef": 0.1}], ids=str)
def test_losses_that_nobody_trains_on_are_told_of_once(options: dict[str, Any]) -> None:
    (text,) = said(layer(**options), 3 * STEPS, task)
    assert "no backward pass reached the losses" in text
    assert "gmoe.aux_loss" in text
    assert said(layer(**options), 2 * STEPS, lambda y, routing: task(y, routing) + aux_loss(routing)) == []


def test_losses_of_several_forwards_before_a_backward_are_read() -> None:
    found, x = layer(balance="switch"), torch.randn(32, D)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(STEPS):
            pairs = [found(x, return_routing=True) for _ in range(3)]
            sum(task(y, r) + aux_loss(r) for y, r in pairs).backward()


def test_fake_tensors_are_not_counted() -> None:
    found = layer()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        found(mode.from_tensor(torch.randn(32, D)))
    assert said(found, STEPS + 1, task) == []


def test_under_checkpointing_a_step_counts_once() -> None:
    found, x = collapsed(), torch.rand(32, D, requires_grad=True)
    for _ in range(3):
        checkpoint(found, x, use_reentrant=False).sum().backward()
    assert found.router.watch.steps == 3
