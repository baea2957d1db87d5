"""Token choice. Shapes: T tokens, D width, E experts, K experts a token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gmoe import LinearExperts, MoE, MoEConv, TokenChoice
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


def test_a_token_takes_as_few_experts_as_have_the_probability_p() -> None:
    """Of (.5, .3, .15, .05): one for .49, two for .51, three for .9, all for 1; at least K."""
    probs = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    for top_p, k, number in ((0.49, 1, 1), (0.51, 1, 2), (0.9, 1, 3), (1.0, 1, 4), (0.1, 2, 2)):
        router = with_gate(
            TokenChoice(4, num_experts=4, k=k, top_p=top_p, balance=None, weight="score"),
            torch.eye(4).tolist(),
        ).double()
        routing = router(probs.double().log())
        assert routing.expert.tolist() == list(range(number)), (top_p, k)
        torch.testing.assert_close(routing.weight, probs.double()[0, :number])


def test_by_probability_a_router_that_is_sure_of_nothing_takes_most() -> None:
    for top_p, num_experts, k, number in ((0.4, 8, 1, 4), (0.01, 8, 1, 1), (0.3, 8, 5, 5)):
        router = TokenChoice(3, num_experts=num_experts, k=k, top_p=top_p, balance=None)
        even = with_gate(router, [[0.0] * 3] * num_experts)
        assert router.experts_per_token == number
        assert len(even(torch.randn(1, 3)).token) == number
        torch.nn.init.normal_(even.gate.weight, std=9)
        assert len(even(torch.randn(50, 3)).token) <= 50 * number


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 0.0}, "top_p: got 0.0, expected a number above 0"),
        ({"top_p": "a"}, "top_p: got 'a', expected a number above 0"),
        ({"top_p": 1.1}, "top_p: got 1.1, expected a number above 0"),
        ({"top_p": 0.5, "capacity_factor": 1.0}, "top_p: got 0.5, expected None beside"),
        ({"top_p": 0.5, "balance": "importance_load"}, "top_p: got 0.5, expected None beside"),
        ({"entropy_coef": -1.0}, "entropy_coef: got -1.0"),
        ({"bias_rate": None}, "bias_rate: got None, expected a number; balance=None has no bias"),
    ],
)
def test_probabilities_and_what_does_not_go_with_them_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TokenChoice(3, num_experts=4, **options)


def test_copies_take_experts_by_probability_with_weights_that_sum_to_one() -> None:
    layer = MoEConv("gcn", 4, 3, start="copies", router_kwargs={"top_p": 0.5})
    x, edge_index = torch.randn(9, 4), torch.randint(9, (2, 20))
    y, routing = layer(x, edge_index, return_routing=True)
    torch.testing.assert_close(y, layer.expert(0)(x, edge_index))
    assert len(routing.token) > 9
    with pytest.raises(ValueError, match="expected a router whose weights of a token sum to 1"):
        MoEConv("gcn", 4, 3, start="copies", router_kwargs={"top_p": 0.5, "weight": "score"})


def test_the_repr_names_what_limits_the_experts_of_a_token_if_anything_does() -> None:
    assert "capacity_factor" not in repr(TokenChoice(4, num_experts=2))
    assert "capacity_factor=1.5" in repr(TokenChoice(4, num_experts=2, capacity_factor=1.5))
    assert "top_p=0.5" in repr(TokenChoice(4, num_experts=2, top_p=0.5))
