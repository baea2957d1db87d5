"""Stacked tensors of experts, with and without a base. Shapes: N nodes, E experts."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch_geometric import nn as pyg
from torch_geometric.nn import GATConv, GCNConv, SAGEConv

import gmoe
from gmoe import MoEConv
from gmoe.conv.base import tensors_in
from gmoe.stack import fill, tensors_of
from tests.helpers.conv_cases import ids
from tests.helpers.equal import assert_same
from tests.helpers.folded import fold
from tests.helpers.masked import GRAPHS, features

NODES, EDGES = GRAPHS["mixed"]
WIDTH = 4
EXPERTS = 3

CONVS: list[Any] = [
    GCNConv,
    partial(GATConv, heads=2, concat=False),
    "gin",
    partial(pyg.GATv2Conv, heads=2),
    partial(SAGEConv, normalize=True),
    pyg.GraphConv,
]


def trained(conv: Any = GCNConv, **options: Any) -> Any:
    """A layer whose differences are not zero, in float64."""
    torch.manual_seed(1)
    layer = MoEConv(conv, WIDTH, WIDTH, num_experts=EXPERTS, start="copies", **options).double()
    with torch.no_grad():
        for parameter in layer.routed_parameters():
            parameter.normal_(std=0.3)
    return layer


@pytest.mark.parametrize("conv", CONVS, ids=ids)
def test_an_expert_is_filled_and_read_with_and_without_a_base(conv: Any) -> None:
    layer = trained(conv)
    given = layer.experts.expert(2)
    for parameter in given.parameters():
        nn.init.normal_(parameter)
    others = tensors_of(layer.experts, 0)
    for stacked in (layer.experts, fold(copy.deepcopy(layer)).experts):
        fill(stacked, 2, tensors_in(given))
        for name, value in tensors_in(stacked.expert(2)).items():
            torch.testing.assert_close(value, tensors_in(given)[name])
        for name, value in tensors_of(stacked, 0).items():
            torch.testing.assert_close(value, others[name])


class Scaled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 0.5 * weight


@pytest.mark.parametrize("how", ["pruned", "parametrized"])
def test_a_sum_cannot_be_changed_and_its_parts_can(how: str) -> None:
    """What computes with an expert's weights would compute with a difference alone."""

    def change(linear: nn.Module, name: str) -> None:
        if how == "pruned":
            prune.l1_unstructured(linear, name, 0.5)
        else:
            parametrize.register_parametrization(linear, name, Scaled())

    x = features(NODES, WIDTH)
    layer = trained()
    with pytest.raises((ValueError, TypeError), match="weight"):  # torch's
        change(copy.deepcopy(layer).experts.lin, "weight")
    folded = fold(copy.deepcopy(layer))
    change(folded.experts.lin, "weight")
    change(layer.experts.lin, "weight_difference")
    linear = layer.experts.lin
    assert_same(linear.weight, linear.weight_base + linear.weight_difference)
    for changed in (layer, folded):
        changed(x, EDGES).sum().backward()
    with pytest.raises(ValueError, match="parametrized weight, expected a plain one"):
        layer.experts.lin.keep([0, 1])


def test_a_token_uses_a_share_of_the_differences_and_the_whole_base() -> None:
    layer = trained(router="uniform")
    layer.router.experts_per_token = 1.0
    layer.take_costs(layer.router)
    dense = sum(parameter.numel() for parameter in GCNConv(WIDTH, WIDTH).parameters())
    assert sum(parameter.numel() for parameter in layer.routed_parameters()) == EXPERTS * dense
    assert gmoe.active_parameters(layer.experts) == (EXPERTS + 1) * dense  # no layer around it
    assert gmoe.active_parameters(layer) == 2 * dense


class Adapted(nn.Module):
    """A layer and weights beside it, as a library for fine-tuning wraps one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.added = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, *args: Any) -> Any:
        return self.layer(*args) + self.added


def test_a_part_of_copies_may_be_wrapped() -> None:
    """Whatever runs around it, the part itself adds the base."""
    layer = trained().eval()
    x = features(NODES, WIDTH)
    expected = layer(x, EDGES)
    layer.experts.lin = Adapted(layer.experts.lin).double()
    assert_same(layer(x, EDGES), expected)
    with pytest.raises(ValueError, match=r"^experts: got parameters .*lin.layer.weight.*adapters"):
        layer.expert(0)
    with torch.no_grad():
        layer.experts.lin.added.fill_(1)
    adapted = layer(x, EDGES)
    assert not torch.equal(adapted, expected)
    assert_same(fold(layer)(x, EDGES), adapted)
