"""Token choice. Shapes: T tokens, D width, E experts, K experts a token."""

from __future__ import annotations

import pytest
import torch

from gmoe import LinearExperts, MoE, TokenChoice
from tests.helpers.reference import with_gate


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("num_experts", [4, 40])
def test_equal_experts_go_to_the_lowest_index(num_experts: int, k: int) -> None:
    router = with_gate(
        TokenChoice(3, num_experts=num_experts, k=k, balance=None), [[0.0] * 3] * num_experts
    )
    assert router(torch.randn(5, 3)).expert.tolist() == [e for e in range(k) for _ in range(5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_far_apart_logits_do_not_tie(dtype: torch.dtype) -> None:
    """The second of (200, 0, 50) is 50, though both probabilities underflow in float32."""
    scale = 1.0 if dtype == torch.float32 else 10.0
    router = with_gate(TokenChoice(3, num_experts=3, k=2, balance=None), torch.eye(3).tolist()).to(
        dtype
    )
    assert router(scale * torch.tensor([[200.0, 0.0, 50.0]], dtype=dtype)).expert.tolist() == [0, 2]


ONE_OF_FOUR = torch.tensor([[1.0, 0], [3, 0], [2, 0], [4, 0]])
"""All prefer expert 0; of two experts a token, either takes ceil(.5 * 2 * 4 / 2) = 2."""


def test_capacity_in_training_only_and_what_it_dropped() -> None:
    router = with_gate(
        TokenChoice(2, num_experts=2, k=2, capacity_factor=0.5, balance=None),
        [[1.0, 0.0], [0.0, 0.0]],
    )
    y, routing = MoE(router, LinearExperts(2, 3, num_experts=2))(ONE_OF_FOUR, return_routing=True)
    assert routing.token.tolist() == [1, 3, 1, 3]  # either expert takes the surest two
    assert y.any(dim=1).tolist() == [False, True, False, True]  # dropped tokens get zero
    assert routing.dropped_T.tolist() == [2, 0, 2, 0]
    assert (routing.dropped, routing.select(slice(2)).dropped) == (4, 2)
    found = router.eval()(ONE_OF_FOUR)
    assert (len(found.token), found.dropped) == (8, 0)


def test_a_bias_does_not_change_the_priority() -> None:
    """Among first choices the highest probability goes first, and a bias is no probability."""
    router = with_gate(
        TokenChoice(2, num_experts=2, noise=False, capacity_factor=0.5), torch.eye(2).tolist()
    )
    # Everyone takes expert 1, which takes one token
    router.next_bias_E.copy_(torch.tensor([0.0, 9.0]))
    x = torch.tensor([[0.9, 0.1], [0.4, 0.6]]).log()
    assert router(x).token.tolist() == [1]


def test_a_rate_of_none_is_no_way_to_have_no_bias() -> None:
    with pytest.raises(ValueError, match=r"^bias_rate: got None, expected a number of at least 0"):
        TokenChoice(3, num_experts=4, bias_rate=None)  # type: ignore[arg-type]


def test_the_repr_names_a_capacity_if_there_is_one() -> None:
    assert "capacity_factor" not in repr(TokenChoice(4, num_experts=2))
    assert "capacity_factor=1.5" in repr(TokenChoice(4, num_experts=2, capacity_factor=1.5))
