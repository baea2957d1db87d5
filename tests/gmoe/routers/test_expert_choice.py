"""Expert choice by hand, and the running means behind its thresholds.

Shapes: T tokens, E experts, C capacity.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from gmoe import ExpertChoice
from gmoe.routers import expert_choice


def identity_gate(num_experts: int, **options: Any) -> ExpertChoice:
    """A router whose logits are its input."""
    router = ExpertChoice(num_experts, num_experts=num_experts, **options)
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(num_experts))
    return router


def test_the_weight_is_capped_at_ten() -> None:
    """One of 20 tokens has nearly all the share.

    That is 20 times the mean; it is cut to 10, and has no gradient above.
    """
    logits = torch.tensor([[10.0]] + [[0.0]] * 19, requires_grad=True)
    weight = identity_gate(1, normalize="tokens")(logits).weight
    share = math.exp(10) / (math.exp(10) + 19)
    assert weight[0].item() == 10.0
    # The mean share is 1 / 20
    assert weight[1].item() == pytest.approx(20 * (1 - share) / 19, rel=1e-5)
    weight[0].backward()
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize(
    ("k", "factor", "expected"), [(1, 1.0, 1.0), (2, 1.5, 3.0), (2, 9.0, 4.0), (1, 0.5, 0.5)]
)
def test_experts_per_token(k: int, factor: float, expected: float) -> None:
    """Whatever the tokens are."""
    router, x = ExpertChoice(4, num_experts=4, k=k, capacity_factor=factor), torch.randn(80, 4)
    x[::7, 1], x[::9, 0] = torch.nan, torch.inf
    assert router.experts_per_token == expected
    assert router(x).load.tolist() == [20 * expected] * 4


# Thresholds: of one expert that takes half of its group's tokens


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch) -> ExpertChoice:
    monkeypatch.setattr(expert_choice, "MOMENTUM", 0.5)
    return identity_gate(1, capacity_factor=0.5, normalize="tokens", inference="threshold")


def step(router: ExpertChoice, *logits: float, batch: list[int] | None = None) -> None:
    router(torch.tensor(logits)[:, None], None if batch is None else torch.tensor(batch))


def logs(*values: float) -> list[float]:
    return [math.log(value) for value in values]


def test_the_threshold_by_hand(router: ExpertChoice) -> None:
    step(router, 4.0, 1.0, 3.0, 2.0)  # takes 4 and 3: the cut is 3
    assert router.selection.threshold_E.tolist() == [3.0]
    step(router, 8.0, 0.0, 7.0, 6.0)  # cut 7; the second step counts half: 5
    assert router.selection.threshold_E.tolist() == [5.0]
    step(router, 1.0, 1.0, 0.0, 0.0)  # cut 1; momentum .5 > 1/3: .5 * 5 + .5 * 1 = 3
    assert router.selection.threshold_E.tolist() == [3.0]
    step(router.eval(), 9.0, 9.0, 9.0, 9.0)
    assert router.selection.threshold_E.tolist() == [3.0]  # nothing moves in evaluation


def test_the_scale_by_hand(router: ExpertChoice) -> None:
    """The divisor of exp(logit): the sum over the group times the mean of the selected shares."""
    step(router, *logs(4, 1, 3, 2))  # sum 10; shares .4 and .3, mean .35: scale 3.5
    assert router.selection.log_scale_E.exp().item() == pytest.approx(3.5)
    # Takes 5 and the first 1: sum 8, mean 3/8: scale 3; the logarithms are averaged
    step(router, *logs(1, 1, 5, 1))
    assert router.selection.log_scale_E.item() == pytest.approx((math.log(3.5) + math.log(3)) / 2)
    assert router.selection.threshold_E.item() == pytest.approx((math.log(3) + math.log(1)) / 2)


def test_both_are_means_over_groups(router: ExpertChoice) -> None:
    step(router, *logs(6, 4, 1, 3, 2, 2), batch=[0, 1, 1, 1, 1, 0])
    # Group 0: (6, 2) takes 6; the sum is 8, the share .75, the scale 6.
    # Group 1: (4, 1, 3, 2) takes 4 and 3; the scale is 3.5, as above.
    assert router.selection.threshold_E.item() == pytest.approx((math.log(6) + math.log(3)) / 2)
    assert router.selection.log_scale_E.item() == pytest.approx((math.log(6) + math.log(3.5)) / 2)


def test_a_threshold_needs_a_training_step(router: ExpertChoice) -> None:
    for prepare in (lambda: None, lambda: router(torch.randn(0, 1)), router.reset_parameters):
        router.train()
        prepare()
        with pytest.raises(
            RuntimeError, match=r"^inference: got 'threshold' before there are thresholds"
        ):
            router.eval()(torch.randn(4, 1))
        router.train()(torch.randn(4, 1))
        router.eval()(torch.randn(4, 1))
        router.reset_parameters()
