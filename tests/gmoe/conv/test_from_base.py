"""Convs that share a base give what independent convs of the sums give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch_geometric.nn import GCNConv, SAGEConv

from gmoe import Graph, MoEConv
from gmoe.conv.call import Call
from gmoe.conv.from_base import ConvsFromBase
from tests.gmoe.conv.masked import assert_equals_masked, features
from tests.gmoe.conv.test_experts import ids
from tests.gmoe.models.test_gnn import assert_same
from tests.gmoe.test_from_base import CONVS, EDGES, EXPERTS, NODES, WIDTH, trained


@pytest.mark.parametrize("conv", CONVS, ids=ids)
def test_outputs_and_gradients_are_those_of_the_sums(conv: Any) -> None:
    layer = trained(conv).eval()
    assert_equals_masked(layer, features(NODES, WIDTH), EDGES)


def test_the_base_takes_the_state_of_a_dense_conv() -> None:
    dense = GCNConv(WIDTH, WIDTH).double()
    layer: Any = MoEConv(GCNConv, WIDTH, WIDTH, num_experts=EXPERTS, start="copies").double()
    layer.experts.become(dense)
    x = features(NODES, WIDTH)
    assert_same(layer.eval()(x, EDGES), dense(x, EDGES))


def test_the_aggregate_is_that_of_the_differences() -> None:
    """It has no parameters, so base and differences would give the same."""
    experts = trained(SAGEConv).experts
    graph = Graph(EDGES, NODES)
    x = features(NODES, WIDTH)
    assert isinstance(experts, ConvsFromBase)
    assert experts.aggregate_width == experts.differences.aggregate_width == WIDTH
    aggregate = experts.aggregate(Call(graph, x, x))
    assert aggregate is not None
    assert torch.equal(aggregate, graph.mean(x))


def test_an_expert_is_the_sum_of_the_base_and_its_difference() -> None:
    experts = trained().experts
    base = experts.base.expert(0).lin.weight
    for index in range(EXPERTS):
        difference = experts.differences.expert(index).lin.weight
        torch.testing.assert_close(experts.expert(index).lin.weight, base + difference)
