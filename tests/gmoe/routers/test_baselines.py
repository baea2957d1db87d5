"""The controls: random, uniform and oracle routers. Shapes: T tokens, D width, E experts."""

from __future__ import annotations

import pytest
import torch

from gmoe import LinearExperts, MoE, OracleRouter, RandomRouter, UniformRouter

# Random


def test_random_has_nothing_to_learn() -> None:
    router = RandomRouter(4, 3)
    assert not list(router.parameters())
    assert "projection_DE" in router.state_dict()


def test_random_is_a_function_of_the_token() -> None:
    router, x = RandomRouter(6, 5), torch.randn(40, 6)
    dense = router(x).to_dense()
    order = torch.randperm(40)
    assert torch.equal(router(x[order]).to_dense(), dense[order])
    assert torch.equal(router(torch.cat([x, x])).to_dense(), torch.cat([dense, dense]))


def test_random_weights() -> None:
    assert set(RandomRouter(4, 3)(torch.randn(9, 4)).weight.tolist()) == {1.0}
    torch.testing.assert_close(RandomRouter(4, 3, k=2)(torch.randn(9, 4)).to_dense().sum(-1), torch.ones(9))
    assert RandomRouter(4, 3).weight == "straight_through"
    assert RandomRouter(4, 3, k=2).weight == "normalized"


def test_random_projection_has_unit_scale() -> None:
    torch.manual_seed(0)
    projection = RandomRouter(400, 100).projection_DE
    assert projection.std().item() == pytest.approx(400**-0.5, rel=0.02)


# Uniform


def test_uniform_is_the_average_of_all_experts() -> None:
    layer, x = MoE(UniformRouter(4, 3), LinearExperts(4, 2, 3)), torch.randn(5, 4)
    assert isinstance(layer.experts, LinearExperts)
    assert layer.experts.bias is not None
    expected = x @ layer.experts.weight.mean(0) + layer.experts.bias.mean(0)
    torch.testing.assert_close(layer(x), expected)
    routing = layer.router(x)
    assert routing.load.tolist() == [5, 5, 5]
    assert layer.experts_per_token == 3


def test_uniform_of_one_expert() -> None:
    assert UniformRouter(4, 1)(torch.randn(5, 4)).weight.tolist() == [1.0] * 5


# Oracle


def test_oracle_follows_the_assignment() -> None:
    router = OracleRouter(4, 3, torch.tensor([2, 0, 0, 2, 1]))
    routing = router(torch.randn(5, 4))
    assert routing.to_dense().argmax(-1).tolist() == [2, 0, 0, 2, 1]
    assert routing.weight.tolist() == [1.0] * 5
    assert routing.expert.tolist() == [0, 0, 1, 2, 2]
    assert router(torch.randn(1, 5, 4)).num_tokens == 5


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8], ids=str)
def test_oracle_takes_any_integers(dtype: torch.dtype) -> None:
    assert OracleRouter(4, 3, torch.tensor([2, 0], dtype=dtype))(torch.randn(2, 4)).load.tolist() == [1, 0, 1]


def test_oracle_refuses_bad_assignments() -> None:
    with pytest.raises(ValueError, match=r"assignment: got values in 0..3, expected 0..num_experts-1=2"):
        OracleRouter(4, 3, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"assignment: got values in -1..0, expected 0..num_experts-1=2"):
        OracleRouter(4, 3, torch.tensor([0, -1]))
    with pytest.raises(ValueError, match=r"assignment: got shape \(2,\) of torch.float32, expected \(T,\) integers"):
        OracleRouter(4, 3, torch.zeros(2))
    with pytest.raises(ValueError, match=r"assignment: got shape \(2, 1\) .*, expected \(T,\) integers"):
        OracleRouter(4, 3, torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="x: got 3 tokens, expected the 2 assigned ones"):
        OracleRouter(4, 3, torch.tensor([0, 1]))(torch.randn(3, 4))
