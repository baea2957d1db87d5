"""What a layer on tokens can be folded to, and whether the dense module equals it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import gmoe
from gmoe.candidates import (
    are_equal,
    candidate_of_tokens,
    mean_share,
    reason_of,
    weights_sum_to_one,
)
from tests.gmoe.shrunk import EXPERTS, WIDTH, X, assert_same


def test_a_mean_of_experts_is_by_load_unless_one_is_enough() -> None:
    load_E = torch.tensor([0.25, 0.0, 0.75], dtype=torch.float64)
    assert torch.equal(mean_share(3, load_E, are_same=False), load_E)
    for load, are_same in ((load_E, True), (torch.zeros(3), False)):
        assert mean_share(3, load, are_same).tolist() == [1, 0, 0]


def test_experts_are_equal_by_their_values_only() -> None:
    experts = gmoe.LinearExperts(WIDTH, 3, num_experts=EXPERTS)
    assert not are_equal(experts)
    with torch.no_grad():
        for value in experts.parameters():
            value.copy_(value[:1].expand_as(value))
    assert are_equal(experts)
    *_, last = experts.parameters()
    with torch.no_grad():
        last[-1, -1] += 1e-6
    assert not are_equal(experts)


@pytest.mark.parametrize(
    ("router", "expected"),
    [
        (None, False),
        (gmoe.TokenChoice(WIDTH, num_experts=EXPERTS), False),
        (gmoe.TokenChoice(WIDTH, num_experts=EXPERTS, weight="straight_through"), True),
        (gmoe.TokenChoice(WIDTH, num_experts=1), True),  # the softmax of one score
        (gmoe.ExpertChoice(WIDTH, num_experts=EXPERTS), False),
        (gmoe.UniformRouter(WIDTH, num_experts=EXPERTS), True),
    ],
)
def test_weights_of_a_token_sum_to_one_by_construction(router: Any, expected: bool) -> None:
    assert weights_sum_to_one(router) is expected


def test_a_softmax_that_still_counts_removed_experts_does_not_sum_to_one() -> None:
    layer: Any = gmoe.MoE(
        gmoe.TokenChoice(WIDTH, num_experts=EXPERTS),
        gmoe.LinearExperts(WIDTH, 3, num_experts=EXPERTS),
    ).double()
    gmoe.prune(layer, X, keep=1)
    assert layer.num_experts == 1
    assert not weights_sum_to_one(layer.router)


def test_reasons_say_what_the_dense_module_is_and_whether_it_equals_the_layer() -> None:
    assert reason_of(True, True, True) == ("one expert is left", True)
    assert reason_of(False, True, False) == ("equal experts", False)
    assert reason_of(False, False, True) == ("the mean of the experts by load", False)


def test_the_mean_of_linear_experts_by_load_is_the_mean_of_their_outputs() -> None:
    experts = gmoe.LinearExperts(WIDTH, 3, num_experts=2).double()
    layer = gmoe.MoE(gmoe.UniformRouter(WIDTH, num_experts=2), experts).double()
    found = candidate_of_tokens(layer, torch.tensor([0.5, 0.5]))
    assert type(found.module) is nn.Linear
    assert not found.is_exact  # by construction it is not: the router might weigh otherwise
    assert_same(found.module(X), layer(X))
