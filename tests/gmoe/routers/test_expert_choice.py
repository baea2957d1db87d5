"""Expert choice. Shapes: T tokens, D width, E experts, C capacity."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from gmoe import ExpertChoice


def identity_gate(num_experts: int, **options: Any) -> ExpertChoice:
    """A router whose logits are its input."""
    router = ExpertChoice(num_experts, num_experts, **options)
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(num_experts))
    return router


def test_the_weight_is_capped_at_ten() -> None:
    """One of 20 tokens has nearly all the share: 20 times the mean, cut to 10, with no gradient above."""
    logits = torch.tensor([[10.0]] + [[0.0]] * 19, requires_grad=True)
    weight = identity_gate(1, normalize="tokens")(logits).weight
    share = math.exp(10) / (math.exp(10) + 19)
    assert weight[0].item() == 10.0
    assert weight[1].item() == pytest.approx(20 * (1 - share) / 19, rel=1e-5)  # the mean share is 1 / 20
    weight[0].backward()
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize(("k", "factor", "expected"), [(1, 1.0, 1.0), (2, 1.5, 3.0), (2, 9.0, 4.0), (1, 0.5, 0.5)])
def test_experts_per_token(k: int, factor: float, expected: float) -> None:
    router = ExpertChoice(4, 4, k=k, capacity_factor=factor)
    assert router.experts_per_token == expected
    assert router(torch.randn(80, 4)).token.numel() == 80 * expected


@pytest.mark.parametrize("normalize", ["experts", "tokens"])
def test_threshold_at_evaluation_decides_by_the_last_score_taken(normalize: Any) -> None:
    """One training step on the same tokens: the last token that was taken is the threshold, so the same are taken."""
    torch.manual_seed(0)
    router, x = ExpertChoice(5, 3, normalize=normalize, inference="threshold").double(), torch.randn(17, 5).double()
    trained = router(x)
    router.eval()
    found = router(x)
    assert torch.equal(found.to_dense() != 0, trained.to_dense() != 0)
    torch.testing.assert_close(found.weight, trained.weight, atol=1e-6, rtol=1e-6)


def test_threshold_needs_a_training_step() -> None:
    router = ExpertChoice(5, 3, inference="threshold")
    for prepare in (lambda: None, lambda: router(torch.randn(0, 5)), router.reset_parameters):
        router.train()
        prepare()
        with pytest.raises(RuntimeError, match="no thresholds yet: run a training step"):
            router.eval()(torch.randn(4, 5))
        router.train()(torch.randn(4, 5))
        router.eval()(torch.randn(4, 5))
        router.reset_parameters()
