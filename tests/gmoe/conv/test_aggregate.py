"""The one aggregation that experts share is that of the conv itself.

Experts are compared with PyG's convs in ``test_experts.py``, and composed in ``tests/compose``.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch_geometric import nn as pyg

from gmoe import Graph, MoEConv
from gmoe.conv.aggregate import AggregateOnce
from gmoe.conv.call import Call
from tests.helpers.masked import features, random_graph

NODES, EDGES, WIDTH, OUT = 7, 20, 4, 3


def experts_of(conv: Any, **kwargs: Any) -> AggregateOnce:
    layer = MoEConv(conv, WIDTH, OUT, num_experts=2, start="plain", **kwargs).double()
    assert isinstance(layer.experts, AggregateOnce)
    return layer.experts


def gin(in_channels: int, out_channels: int) -> pyg.GINConv:
    network = nn.Sequential(nn.Linear(in_channels, 5), nn.ReLU(), nn.Linear(5, out_channels))
    return pyg.GINConv(network, train_eps=True)


def test_an_aggregation_that_is_no_product_is_that_of_the_conv() -> None:
    experts = experts_of(pyg.SAGEConv, aggr="max")
    assert experts.make_matrix is None
    edge_index = torch.tensor([[0, 1, 2], [3, 3, 4]])
    x = features(NODES, WIDTH)
    found = experts.aggregate(Call(Graph(edge_index, NODES), x, x))
    assert found is not None
    assert torch.equal(found[3], torch.maximum(x[0], x[1]))
    assert torch.equal(found[4], x[2])
    assert not found[[0, 1, 2, 5, 6]].any()


def test_what_is_stripped_is_a_copy() -> None:
    conv = pyg.SAGEConv(WIDTH, OUT).double()
    before = copy.deepcopy(conv.state_dict())
    layer = MoEConv(pyg.SAGEConv, WIDTH, OUT, num_experts=2, start="plain").double()
    layer.experts.become(conv)
    assert conv.state_dict().keys() == before.keys()
    for name, value in layer.experts.expert(1).state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("conv", ["sage", "gin", "graph"])
def test_an_aggregation_of_pygs_runs_on_the_meta_device_and_under_autocast(conv: str) -> None:
    with torch.device("meta"):
        layer = MoEConv(conv, WIDTH, OUT, num_experts=2, aggr="max")
        out = layer(torch.empty(NODES, WIDTH), torch.empty(2, EDGES, dtype=torch.int64))
    assert out.shape == (NODES, OUT)
    torch.manual_seed(0)
    layer = MoEConv(conv, WIDTH, OUT, num_experts=2, aggr="max").eval()
    x, edge_index = features(NODES, WIDTH).float(), random_graph(NODES, NODES, EDGES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = layer(x, edge_index)
    torch.testing.assert_close(low.float(), layer(x, edge_index), rtol=0.1, atol=0.1)
