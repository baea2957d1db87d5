"""Layers of experts are folded back to dense ones: exactly, or where data shows no difference."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.layers.mlp import GluMlp, SwiGLU
from torch import nn
from torch_geometric import nn as pyg
from torch_geometric.nn import GCNConv

import gmoe
from gmoe import MoEConv
from gmoe.dense import MLP
from gmoe.from_base import FromBase
from gmoe.shrink import groups_of
from tests.gmoe.test_convert import images, timm_vit
from tests.gmoe.test_pruning import (
    CONVS,
    EDGES,
    EXPERTS,
    WIDTH,
    X,
    assert_same,
    conv_layer,
    moefied,
    moved,
)

LINEAR = ("gcn", "sage", "filter")
"""Kinds whose convs can be added."""

STRAIGHT = {"weight": "straight_through"}


def has_experts(model: nn.Module) -> bool:
    return any(isinstance(part, gmoe.MoELayer) for part in model.modules())


def equal(layer: Any, first: int = 0) -> Any:
    """The layer with experts of the same values."""
    routed = layer.experts.differences if isinstance(layer.experts, FromBase) else layer.experts
    with torch.no_grad():
        for parameter in routed.parameters():
            parameter.copy_(parameter[first : first + 1].expand_as(parameter))
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


@pytest.mark.parametrize("conv", ["gin", "gat", "mlp", "film"])
def test_convs_that_cannot_be_added_stay(conv: str) -> None:
    layer = conv_layer(conv, "shared", "token_choice", 1)
    groups_of(layer)[0].keep((3,))
    folded = gmoe.densify(layer)
    assert folded.model is layer
    assert str(folded) == "the model itself: stays (the shared expert alone)"


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


def test_convs_of_several_kinds_are_folded_if_one_is_left() -> None:
    layer = conv_layer(CONVS["several kinds"], "plain", "token_choice", 1, **STRAIGHT)
    assert "several kinds" in str(gmoe.densify(layer))
    groups_of(layer)[0].keep((2,))
    expected = layer(X, EDGES)
    dense = gmoe.densify(layer).model
    assert isinstance(dense, pyg.GATConv)
    assert_same(dense(X, EDGES), expected)


@pytest.mark.parametrize("mlp", [None, GluMlp, SwiGLU])
def test_one_mlp_that_is_left_is_the_layer(mlp: Any) -> None:
    torch.manual_seed(0)
    vit = timm_vit(2)
    if mlp is not None:
        vit.blocks[1].mlp = mlp(16, 24).double()
    model = moved(gmoe.moefy(vit, every=1, num_experts=EXPERTS, start="copies"))
    for group in groups_of(model):
        group.keep((5,))
    expected = model(images())
    folded = gmoe.densify(model)
    assert not has_experts(model)
    assert all(isinstance(block.mlp, MLP) for block in model.blocks)
    assert_same(folded.model(images()), expected)
    folded.model.train()(images()).sum().backward()


def test_experts_beside_a_shared_mlp_go_if_they_are_zero() -> None:
    model: Any = gmoe.moefy(timm_vit(4), num_experts=EXPERTS)
    shared = model.blocks[1].mlp.shared_expert
    moved(model.blocks[3])
    expected = model(images())
    folded = gmoe.densify(model)
    assert [layer.is_dense for layer in folded.layers] == [True, False]
    assert model.blocks[1].mlp is shared
    assert_same(model(images()), expected)


@pytest.mark.parametrize("start", ["shared", "copies"])
def test_data_decides_which_layers_are_worth_something(start: Any) -> None:
    """One layer hardly changes the outputs, the other does."""
    model: Any = moefied(start=start)
    with torch.no_grad():
        weak = model.blocks[0].mlp.experts
        of_expert = weak.differences.parameters() if start == "copies" else weak.down.parameters()
        for parameter in of_expert:
            parameter *= 1e-3
    expected = model(images())
    assert not any(layer.is_dense for layer in gmoe.densify(model).layers)
    folded = gmoe.densify(model, images())
    assert [layer.is_dense for layer in folded.layers] == [True, False]
    assert_same(gmoe.densify(model, images(), tolerance=0).model(images()), model(images()))
    change = (model(images()) - expected).norm() / expected.norm()
    assert folded.layers[0].change == pytest.approx(float(change))
    assert 0 < folded.layers[0].change < 0.01 < folded.layers[1].change  # type: ignore[operator]


def test_a_model_that_passes_more_than_a_dense_layer_takes_keeps_its_layer() -> None:
    layer = conv_layer("gcn", "shared", "token_choice", 1)
    batch = torch.zeros(len(X), dtype=torch.long)
    data = {"x": X, "edge_index": EDGES, "batch": batch}
    folded = gmoe.densify(layer, data, tolerance=1)
    assert folded.model is layer
    assert "with which the model fails" in str(folded)


def test_a_gnn_that_routes_once_becomes_dense_and_trains() -> None:
    torch.manual_seed(0)
    model: Any = gmoe.GNNMoE(WIDTH, 6, 3, 3, conv="sage", num_experts=EXPERTS).double().eval()
    expected = model(X, EDGES)
    folded = gmoe.densify(model)
    assert not has_experts(model)
    assert model.shared_router is None
    assert_same(model(X, EDGES), expected)
    assert str(folded).count("equal experts") == 2
    model.train()(X, EDGES).sum().backward()


def test_a_moefied_gnn_gets_its_convs_back() -> None:
    torch.manual_seed(0)
    dense = pyg.models.GCN(WIDTH, 6, 3, 3).double().eval()
    model: Any = gmoe.moefy(copy.deepcopy(dense), num_experts=4, start="copies")
    assert_same(model(X, EDGES), dense(X, EDGES))
    gmoe.densify(model)
    assert all(isinstance(conv, GCNConv) for conv in model.convs)
    assert model.state_dict().keys() == dense.state_dict().keys()
    assert_same(model(X, EDGES), dense(X, EDGES))


def test_what_cannot_be_folded_is_named() -> None:
    experts = gmoe.MLPExperts(WIDTH, 6, WIDTH, num_experts=EXPERTS)
    soft = gmoe.SoftMoE(gmoe.SoftSlots(WIDTH, num_experts=EXPERTS), experts)
    metadata = (["a"], [("a", "to", "a")])
    model = nn.ModuleList([soft, gmoe.HeteroMoEConv(WIDTH, WIDTH, metadata)])
    text = str(gmoe.densify(model))
    assert "SoftMoE is not folded" in text
    assert "HeteroMoEConv is not folded" in text
    with pytest.raises(ValueError, match=r"^model: got Linear"):
        gmoe.densify(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"^tolerance: got -1"):
        gmoe.densify(soft, tolerance=-1)


def test_linear_experts_become_a_linear_layer() -> None:
    layer = gmoe.MoE(
        gmoe.TokenChoice(WIDTH, num_experts=1, weight="straight_through"),
        gmoe.LinearExperts(WIDTH, 3, num_experts=1),
    ).double()
    expected = layer(X)
    dense = gmoe.densify(layer).model
    assert type(dense) is nn.Linear
    assert_same(dense(X), expected)
