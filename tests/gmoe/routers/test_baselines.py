"""The baselines: random, uniform and oracle routers. Shapes: T tokens, D width, E experts."""

from __future__ import annotations

import pytest
import torch

from gmoe import LinearExperts, MoE, OracleRouter, RandomRouter, UniformRouter


def test_random_is_a_frozen_function_of_the_token() -> None:
    router, x = RandomRouter(6, 5), torch.randn(40, 6)
    assert not list(router.parameters())
    assert "projection_DE" in router.state_dict()
    assert torch.equal(router(torch.cat([x, x])).to_dense(), router(x).to_dense().repeat(2, 1))


def test_random_weights() -> None:
    assert set(RandomRouter(4, 3)(torch.randn(9, 4)).weight.tolist()) == {1.0}
    torch.testing.assert_close(RandomRouter(4, 3, k=2)(torch.randn(9, 4)).to_dense().sum(-1), torch.ones(9))


def test_random_projection_has_unit_scale() -> None:
    torch.manual_seed(0)
    assert RandomRouter(400, 100).projection_DE.std().item() == pytest.approx(400**-0.5, rel=0.02)


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


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (torch.tensor([0, 3]), r"assignment: got values in 0..3, expected 0..num_experts-1=2"),
        (torch.tensor([0, -1]), r"assignment: got values in -1..0"),
        (torch.zeros(2), r"assignment: got shape \(2,\) of torch.float32, expected \(T,\) integers"),
        (torch.zeros(2, 1, dtype=torch.long), r"assignment: got shape \(2, 1\)"),
        (torch.tensor([0, 1]), "x: got 3 tokens, expected the 2 assigned ones"),
    ],
)
def test_oracle_refuses_what_does_not_fit(assignment: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OracleRouter(4, 3, assignment)(torch.randn(3, 4))
