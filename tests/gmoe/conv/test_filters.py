"""Filters, nodes that need no neighbors, and degrees: with PyG's own layers and columns.

Shapes: N nodes, D width, E experts.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn import SGConv, SimpleConv
from torch_geometric.transforms import LocalDegreeProfile

from gmoe import BlockGNN, GNNMoE, LinearExperts, MoE, MoEConv, TokenChoice, moefy
from tests.helpers.equal import assert_same
from tests.helpers.masked import GRAPHS, assert_equals_masked, features, redrawn, weights

pytestmark = pytest.mark.filterwarnings("ignore:.*runs on the whole graph")

NODES, EDGES = GRAPHS["mixed"]
WIDTH = 4
HOPS = [partial(SGConv, K=1), partial(SGConv, K=2), partial(SGConv, K=3)]


class FilterNet(nn.Module):
    """Experts that hear one to three hops, and experts of the node alone, by one decision."""

    def __init__(self) -> None:
        super().__init__()
        self.router = TokenChoice(WIDTH, num_experts=3)
        self.filters = MoEConv(HOPS, WIDTH, 2, router=None, start="plain")
        self.own = MoE(None, LinearExperts(WIDTH, 2, num_experts=3))

    def forward(self, x: Tensor, edge_index: Tensor) -> Any:
        routing = self.router(x)
        own = self.own(x, routing=routing)
        return own + self.filters(x, edge_index, routing=routing), routing


@pytest.mark.parametrize("kind", ["some", "one"])
def test_filters_of_several_hops_are_experts_of_one_layer(kind: str) -> None:
    layer = MoEConv(HOPS, WIDTH, 2, start="plain").double()
    x = features(NODES, WIDTH)
    edge_weight = features(EDGES.size(1), seed=2).abs() + 0.1
    weight_TE = weights(NODES, kind)
    assert_equals_masked(layer, x, EDGES, weight_TE=weight_TE, edge_weight=edge_weight)


def test_filters_stand_beside_linear_experts_by_one_decision() -> None:
    model: Any = redrawn(FilterNet())
    x = features(NODES, WIDTH)
    y, routing = model(x, EDGES)
    weight_TE = routing.to_dense()
    expected = torch.zeros(NODES, 2, dtype=torch.float64)
    for expert in range(3):
        filtered = model.filters.expert(expert)(x, EDGES)
        own = x @ model.own.experts.weight[expert].T + model.own.experts.bias[expert]
        expected = expected + weight_TE[:, expert : expert + 1] * (filtered + own)
    assert_same(y, expected)


def test_a_net_of_pygs_filters_and_linear_layers_starts_as_it_was() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = SGConv(WIDTH, 8, K=2)
            self.lin = nn.Linear(8, 2)

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            y: Tensor = self.lin(self.conv(x, edge_index).relu())
            return y

    net = Net().double()
    x = features(NODES, WIDTH)
    expected = net(x, EDGES)
    model: Any = moefy(net, targets=["conv", "lin"], num_experts=3)
    assert isinstance(model.conv, MoEConv)
    assert isinstance(model.lin, MoE)
    assert_same(model(x, EDGES), expected)


@pytest.mark.parametrize("shared_router", [True, False])
def test_degrees_of_neighbors_are_columns_of_the_input(shared_router: bool) -> None:
    """The router and the model see them, in layer-wise inference, too."""
    x = features(NODES, WIDTH)
    data = LocalDegreeProfile()(Data(x=x, edge_index=EDGES))
    data.x = data.x.double()
    assert_same(data.x[:, :WIDTH], x)
    model = redrawn(
        GNNMoE(data.num_features, 8, 2, num_experts=3, shared_router=shared_router, start="shared")
    )
    logits, routings = model(data.x, EDGES, return_routing=True)
    assert_same(model.inference(data, batch_size=3), logits)
    degree = torch.bincount(EDGES[0], minlength=NODES).double()
    assert_same(data.x[:, WIDTH], degree)
    router = model.shared_router or model.convs[0].router
    assert_same(router(data.x).to_dense(), routings[0].to_dense())


def test_the_mean_of_neighbors_beside_the_node_is_pygs_own_conv() -> None:
    """It has no weights: those of a block are in its feed-forward part."""
    conv = SimpleConv("mean", combine_root="cat")
    x = features(NODES, WIDTH)
    y = conv(x, EDGES)
    assert_same(y[:, :WIDTH], x)
    model: Any = redrawn(
        BlockGNN(
            WIDTH,
            8,
            2,
            3,
            conv=partial(SimpleConv, aggr="mean", combine_root="cat"),
            act="gelu",
            num_experts=3,
        )
    )
    logits = model(x, EDGES)
    assert_same(model.inference(Data(x=x, edge_index=EDGES), batch_size=3), logits)
