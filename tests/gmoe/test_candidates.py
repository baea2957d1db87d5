"""What a layer on tokens can be folded to, and whether the dense module equals it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import gmoe
from gmoe.candidates import candidate_of_tokens, verdict_of, weights_sum_to_one
from gmoe.stack import are_equal
from tests.helpers.equal import assert_same
from tests.helpers.shrunk import EXPERTS, WIDTH, X


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


def test_a_softmax_over_experts_that_are_gone_does_not_sum_to_one() -> None:
    layer: Any = gmoe.MoE(
        gmoe.TokenChoice(WIDTH, num_experts=EXPERTS),
        gmoe.LinearExperts(WIDTH, 3, num_experts=EXPERTS),
    ).double()
    gmoe.prune(layer, X, keep=1)
    assert layer.num_experts == 1
    assert not weights_sum_to_one(layer.router)


@pytest.mark.parametrize(
    ("num_experts", "are_same", "router", "expected"),
    [
        (1, True, gmoe.UniformRouter(WIDTH, num_experts=1), ("one expert is left", True)),
        (2, True, gmoe.UniformRouter(WIDTH, num_experts=2), ("equal experts", True)),
        (2, False, gmoe.UniformRouter(WIDTH, num_experts=2), ("experts that differ", False)),
        (2, True, None, ("equal experts, whose weights do not always sum to 1", False)),
        (1, True, None, ("one expert is left, whose weights do not always sum to 1", False)),
    ],
)
def test_a_verdict_says_what_experts_are_and_whether_one_equals_all(
    num_experts: int, are_same: bool, router: Any, expected: tuple[str, bool]
) -> None:
    assert verdict_of(num_experts, are_same, router) == expected


def test_experts_that_differ_are_no_dense_layer_however_little() -> None:
    experts = gmoe.LinearExperts(WIDTH, 3, num_experts=2).double()
    with torch.no_grad():
        for value in experts.parameters():
            value[1] = value[0]
    layer = gmoe.MoE(gmoe.UniformRouter(WIDTH, num_experts=2), experts).double()
    found = candidate_of_tokens(layer, layer.router)
    assert type(found.module) is nn.Linear
    assert found.is_exact
    assert_same(found.module(X), layer(X))
    with torch.no_grad():
        experts.weight[1, 0, 0] += 1e-9
    assert not candidate_of_tokens(layer, layer.router).is_exact
