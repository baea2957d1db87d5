"""The baselines: random, uniform and oracle routers. Shapes: T tokens, D width, E experts."""

from __future__ import annotations

import pytest
import torch

from gmoe import LinearExperts, MoE, OracleRouter, UniformRouter


@pytest.mark.parametrize("num_experts", [1, 3])
def test_uniform_is_the_average_of_all_experts(num_experts: int) -> None:
    experts, x = LinearExperts(4, 2, num_experts), torch.randn(5, 4)
    layer = MoE(UniformRouter(4, num_experts), experts)
    assert experts.bias is not None
    torch.testing.assert_close(layer(x), x @ experts.weight.mean(0) + experts.bias.mean(0))
    assert layer.router(x).load.tolist() == [5] * num_experts
    assert layer.experts_per_token == num_experts


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_oracle_follows_the_assignment(dtype: torch.dtype) -> None:
    router = OracleRouter(4, 3, torch.tensor([2, 0, 0, 2, 1], dtype=dtype))
    routing = router(torch.randn(5, 4))
    assert routing.to_dense().argmax(-1).tolist() == [2, 0, 0, 2, 1]
    assert routing.weight.tolist() == [1.0] * 5
    assert router(torch.randn(1, 5, 4)).num_tokens == 5


@pytest.mark.parametrize("assignment", [[0, 3, 0], [0, -1, 0], [0.0, 0.0, 0.0], [[0], [1], [2]]], ids=str)
def test_oracle_refuses_what_does_not_fit(assignment: list[int]) -> None:
    with pytest.raises(ValueError, match="assignment: got"):
        OracleRouter(4, 3, torch.tensor(assignment))
    with pytest.raises(ValueError, match="x: got 3 tokens"):
        OracleRouter(4, 3, torch.tensor([0, 1]))(torch.randn(3, 4))
