"""The one aggregation that experts share is that of the conv itself.

Experts are compared with PyG's convs in ``test_experts.py``, and composed in ``tests/compose``.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch_geometric import nn as pyg

from gmoe import MoEConv
from tests.helpers.masked import features, random_graph

NODES, EDGES, WIDTH, OUT = 7, 20, 4, 3


def gin(in_channels: int, out_channels: int) -> pyg.GINConv:
    network = nn.Sequential(nn.Linear(in_channels, 5), nn.ReLU(), nn.Linear(5, out_channels))
    return pyg.GINConv(network, train_eps=True)


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
