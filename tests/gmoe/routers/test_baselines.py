"""Routers that learn nothing."""

from __future__ import annotations

import pytest
import torch

from gmoe import OracleRouter, RandomRouter


def test_a_random_router_gives_equal_tokens_equal_experts_and_learns_nothing() -> None:
    torch.manual_seed(0)
    router, x = RandomRouter(4, num_experts=8, k=2), torch.randn(20, 4)
    order = torch.randperm(20)
    assert torch.equal(router(x[order]).to_dense(), router(x).to_dense()[order])
    assert len(set(router(x).token.split(router(x).load.tolist()))) > 1
    assert list(router.parameters()) == []


def test_an_oracle_on_no_device_gets_its_assignment_back_when_it_is_reset() -> None:
    router = (
        OracleRouter(3, num_experts=3, assignment=torch.tensor([2, 0, 1]))
        .to("meta")
        .to_empty(device="cpu")
    )
    router.reset_parameters()
    assert router.assignment_T.tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    "assignment", [[0, 3, 0], [0, -1, 0], [0.0, 0.0, 0.0], [[0], [1], [2]], [0, 1]], ids=str
)
def test_an_oracle_refuses_what_does_not_fit(assignment: list[int]) -> None:
    with pytest.raises(ValueError, match=r"assignment: got|x: got 3 tokens"):
        OracleRouter(4, num_experts=3, assignment=torch.tensor(assignment))(torch.randn(3, 4))


def test_projections_are_drawn_with_the_inverse_root_of_the_width() -> None:
    torch.manual_seed(0)
    router = RandomRouter(400, num_experts=16)
    assert float(router.projection_DE.std()) == pytest.approx(0.05, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_an_assignment_is_copied(dtype: torch.dtype) -> None:
    given = torch.tensor([0, 1, 0, 1], dtype=dtype)
    router = OracleRouter(3, num_experts=2, assignment=given)
    router.load_state_dict({"assignment_T": torch.ones(4, dtype=torch.int64)})
    assert router(torch.ones(4, 3)).load.tolist() == [0, 4]
    assert given.tolist() == [0, 1, 0, 1]
    given.zero_()
    router.reset_parameters()
    assert router(torch.ones(4, 3)).load.tolist() == [2, 2]
