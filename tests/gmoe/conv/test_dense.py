"""Convs of experts are folded back to one dense conv."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch_geometric import nn as pyg

import gmoe
from gmoe import MoEConv
from gmoe.layer_groups import groups_of
from gmoe.stack import become, tensors_of
from tests.helpers.equal import assert_same
from tests.helpers.shrunk import CONVS, EDGES, STRAIGHT, WIDTH, X, conv_layer, has_experts, moved

LINEAR = ("gcn", "sage")
"""Kinds whose convs can be added."""


def equal(layer: Any, first: int = 0) -> Any:
    """The layer with experts of the same values."""
    become(layer.experts, tensors_of(layer.experts, first))
    return layer


@pytest.mark.parametrize("start", ["copies", "plain"])
@pytest.mark.parametrize("conv", [name for name in CONVS if isinstance(CONVS[name], str)])
def test_one_conv_that_is_left_is_the_layer(conv: str, start: str) -> None:
    layer = conv_layer(CONVS[conv], start, "token_choice", 1, **STRAIGHT)
    groups_of(layer)[0].keep((3,))
    expected = layer(X, EDGES)
    folded = gmoe.densify(layer)
    assert not has_experts(folded.model)
    assert type(folded.model).__name__.lower().startswith(CONVS[conv])
    assert_same(folded.model(X, EDGES), expected)
    assert "one expert is left" in str(folded)


@pytest.mark.parametrize("conv", LINEAR)
def test_one_conv_beside_a_shared_one_is_added_to_it(conv: str) -> None:
    layer = conv_layer(conv, "shared", "token_choice", 1, **STRAIGHT)
    groups_of(layer)[0].keep((3,))
    expected = layer(X, EDGES)
    folded = gmoe.densify(layer)
    assert_same(folded.model(X, EDGES), expected)
    parameters = sum(parameter.numel() for parameter in folded.model.parameters())
    assert parameters == sum(p.numel() for p in layer.shared_expert.parameters())


@pytest.mark.parametrize("conv", ["gin", "gat", "film"])
def test_convs_that_cannot_be_added_stay(conv: str) -> None:
    layer = conv_layer(conv, "shared", "token_choice", 1)
    groups_of(layer)[0].keep((3,))
    folded = gmoe.densify(layer)
    assert folded.model is layer
    assert str(folded) == "the model itself: stays (experts beside a shared one)"


@pytest.mark.parametrize("start", ["shared", "plain"])
def test_experts_that_see_a_shared_transform_stay(start: Any) -> None:
    torch.manual_seed(0)
    layer = MoEConv("gcn", WIDTH, 3, num_experts=1, start=start, shared_transform=True)
    layer = moved(layer.double())
    assert gmoe.densify(layer).model is layer
    if start == "shared":
        nn.init.zeros_(layer.gain)
        expected = layer(X, EDGES)
        assert_same(gmoe.densify(layer).model(X, EDGES), expected)


@pytest.mark.parametrize("conv", ["gcn", "sage", "gin", "gat", "film"])
def test_a_gain_of_zero_leaves_the_shared_conv(conv: str) -> None:
    layer = conv_layer(conv, "shared", "expert_choice", 2)
    nn.init.zeros_(layer.gain)
    expected = layer(X, EDGES)
    folded = gmoe.densify(layer)
    assert not has_experts(folded.model)
    assert_same(folded.model(X, EDGES), expected)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("start", ["shared", "copies", "plain"])
def test_equal_experts_are_one(start: str, k: int) -> None:
    weight = STRAIGHT if k == 1 else {"weight": "normalized"}
    layer = equal(conv_layer("sage", start, "token_choice", k, **weight))
    expected = layer(X, EDGES)
    folded = gmoe.densify(layer)
    assert not has_experts(folded.model)
    assert_same(folded.model(X, EDGES), expected)
    assert "equal experts" in str(folded)


def test_equal_experts_whose_weights_are_scores_stay() -> None:
    layer = equal(conv_layer("sage", "plain", "token_choice", 1))
    assert has_experts(gmoe.densify(layer).model)
    groups_of(layer)[0].keep((3,))  # the softmax counts the others still
    assert has_experts(gmoe.densify(layer).model)
    only = moved(MoEConv("sage", WIDTH, WIDTH, num_experts=1, start="plain").double())
    expected = only(X, EDGES)
    assert_same(gmoe.densify(only).model(X, EDGES), expected)


@pytest.mark.parametrize("conv", LINEAR)
def test_convs_that_differ_are_not_added(conv: str) -> None:
    layer = conv_layer(conv, "shared", "token_choice", 1, **STRAIGHT)
    folded = gmoe.densify(layer)
    assert folded.model is layer
    assert str(folded) == "the model itself: stays (experts that differ)"


def test_convs_of_several_kinds_are_folded_if_one_is_left() -> None:
    layer = conv_layer(CONVS["several kinds"], "plain", "token_choice", 1, **STRAIGHT)
    assert "several kinds" in str(gmoe.densify(layer))
    groups_of(layer)[0].keep((2,))
    expected = layer(X, EDGES)
    dense = gmoe.densify(layer).model
    assert isinstance(dense, pyg.GATConv)
    assert_same(dense(X, EDGES), expected)
