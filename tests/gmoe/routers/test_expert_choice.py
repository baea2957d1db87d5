"""Expert choice by hand, and the running means behind its thresholds.

Shapes: T tokens, E experts, C capacity.
"""

from __future__ import annotations

import math

import pytest
import torch

from gmoe import ExpertChoice
from gmoe.routers import expert_choice


@pytest.mark.parametrize(
    ("k", "factor", "expected"), [(1, 1.0, 1.0), (2, 1.5, 3.0), (2, 9.0, 4.0), (1, 0.5, 0.5)]
)
def test_experts_per_token(k: int, factor: float, expected: float) -> None:
    """Whatever the tokens are."""
    router, x = ExpertChoice(4, num_experts=4, k=k, capacity_factor=factor), torch.randn(80, 4)
    x[::7, 1], x[::9, 0] = torch.nan, torch.inf
    assert router.experts_per_token == expected
    assert router(x).load.tolist() == [20 * expected] * 4


# Thresholds: of two experts, each of which takes half of its group's tokens


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch) -> ExpertChoice:
    """A router whose logits are its input."""
    monkeypatch.setattr(expert_choice, "MOMENTUM", 0.5)
    router = ExpertChoice(2, num_experts=2, inference="threshold")
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(2))
    return router


def step(router: ExpertChoice, *probs: float, batch: list[int] | None = None) -> None:
    """Route tokens by the probabilities of the first expert."""
    prob_T = torch.tensor(probs)
    router(torch.stack([prob_T, 1 - prob_T], dim=1).log(), batch and torch.tensor(batch))


def assert_thresholds(router: ExpertChoice, *expected: list[float]) -> None:
    """For each expert, the mean of the logarithms of some probabilities."""
    means = [sum(map(math.log, probs)) / len(probs) for probs in expected]
    assert router.selection.threshold_E.tolist() == pytest.approx(means)


def test_the_threshold_by_hand(router: ExpertChoice) -> None:
    step(router, 0.8, 0.2, 0.6, 0.4)  # the first takes .8 and .6; the second the other two
    assert_thresholds(router, [0.6], [0.6])
    step(router, 0.9, 0.1, 0.7, 0.7)  # cuts .7 and .3; the second step counts half
    assert_thresholds(router, [0.6, 0.7], [0.6, 0.3])
    step(router, 0.5, 0.5, 0.1, 0.1)  # cuts .5 and .9; the momentum .5 is more than 1/3
    assert_thresholds(router, [0.6, 0.7, 0.5, 0.5], [0.6, 0.3, 0.9, 0.9])
    step(router.eval(), 0.9, 0.9, 0.9, 0.9)  # nothing moves in evaluation
    assert_thresholds(router, [0.6, 0.7, 0.5, 0.5], [0.6, 0.3, 0.9, 0.9])


def test_it_is_a_mean_over_groups(router: ExpertChoice) -> None:
    # Group 0: (.9, .3), each expert takes one. Group 1: (.8, .2, .6, .4), each takes two.
    step(router, 0.9, 0.8, 0.2, 0.6, 0.4, 0.3, batch=[0, 1, 1, 1, 1, 0])
    assert_thresholds(router, [0.9, 0.6], [0.7, 0.6])


def test_a_threshold_needs_a_training_step(router: ExpertChoice) -> None:
    for prepare in (lambda: None, lambda: router(torch.randn(0, 2)), router.reset_parameters):
        router.train()
        prepare()
        with pytest.raises(
            RuntimeError, match=r"^inference: got 'threshold' before there are thresholds"
        ):
            router.eval()(torch.randn(4, 2))
        router.train()(torch.randn(4, 2))
        router.eval()(torch.randn(4, 2))
        router.reset_parameters()
