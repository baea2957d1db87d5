"""Layers of experts are folded back to dense ones that equal them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.layers.mlp import GluMlp, SwiGLU
from torch import Tensor, nn
from torch_geometric import nn as pyg
from torch_geometric.nn import GCNConv

import gmoe
from gmoe.layer_groups import groups_of
from gmoe.merging import MLP
from tests.helpers.equal import assert_same
from tests.helpers.shrunk import EDGES, EXPERTS, WIDTH, X, conv_layer, has_experts, moefied, moved
from tests.helpers.vits import images, timm_vit


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
def test_experts_that_add_something_stay_however_little(start: Any) -> None:
    model: Any = moefied(start=start)
    with torch.no_grad():
        weak = model.blocks[0].mlp.experts
        of_expert = weak.routed_parameters() if start == "copies" else weak.down.parameters()
        for parameter in of_expert:
            parameter *= 1e-9
    expected = model(images())
    folded = gmoe.densify(model)
    assert folded.model is model
    assert not any(layer.is_dense for layer in folded.layers)
    reason = "experts that differ" if start == "copies" else "experts beside a shared one"
    assert str(folded).count(f"stays ({reason})") == 2
    assert torch.equal(model(images()), expected)


@pytest.mark.parametrize("kind", ["gcn", "gat", "gin"])
def test_unstacked_convs_stay_with_the_line_to_call(kind: str) -> None:
    layer = gmoe.unstack(conv_layer(kind, "copies", "token_choice", 1))
    folded = gmoe.densify(layer)
    assert "gmoe.restack before" in str(folded)
    assert [one.is_dense for one in folded.layers] == [False]


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


class Residual(gmoe.MLPExperts):
    """Experts of one's own that add what they see."""

    def rows(self, x_PI: Tensor, offsets: Tensor) -> Tensor:
        return x_PI + super().rows(x_PI, offsets)


class Doubled(gmoe.TokenChoice):
    """A router of one's own, whose weights need not sum to 1."""


def test_subclasses_are_not_taken_for_their_bases() -> None:
    own = gmoe.MoE(gmoe.TokenChoice(WIDTH, num_experts=1), Residual(WIDTH, 6, WIDTH, num_experts=1))
    assert "Residual is not folded" in str(gmoe.densify(nn.Sequential(own)))
    experts = gmoe.MLPExperts(WIDTH, 6, WIDTH, num_experts=1)
    doubled = gmoe.MoE(Doubled(WIDTH, num_experts=1, weight="score"), experts)
    assert not gmoe.densify(nn.Sequential(doubled)).layers[0].is_dense


def test_what_cannot_be_folded_is_named() -> None:
    experts = gmoe.MLPExperts(WIDTH, 6, WIDTH, num_experts=EXPERTS)
    soft = gmoe.SoftMoE(gmoe.SoftSlots(WIDTH, num_experts=EXPERTS), experts)
    assert "SoftMoE is not folded" in str(gmoe.densify(nn.ModuleList([soft])))
    with pytest.raises(ValueError, match=r"^model: got Linear"):
        gmoe.densify(nn.Linear(2, 2))


def test_linear_experts_become_a_linear_layer() -> None:
    layer = gmoe.MoE(
        gmoe.TokenChoice(WIDTH, num_experts=1, weight="straight_through"),
        gmoe.LinearExperts(WIDTH, 3, num_experts=1),
    ).double()
    expected = layer(X)
    dense = gmoe.densify(layer).model
    assert type(dense) is nn.Linear
    assert_same(dense(X), expected)


def test_what_was_frozen_stays_frozen_whatever_the_router_learns() -> None:
    frozen = pyg.GCN(6, 8, 2, 3).requires_grad_(False)
    model = gmoe.moefy(frozen, num_experts=3, start="shared")
    gmoe.densify(model)
    assert not any(isinstance(part, gmoe.MoEConv) for part in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
