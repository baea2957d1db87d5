"""Filters and MLPs in the place of convs. That experts of them equal masked convs: ``test_experts.py``."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch_geometric.nn import GCNConv
from torch_geometric.utils import to_dense_adj

from gmoe import FilterConv, Graph, MLPConv, MoEConv
from gmoe.conv.aggregate import FilterExperts, MLPConvExperts
from tests.gmoe.conv.masked import GRAPHS, assert_equals_masked, features, simple_graph

WIDTH = 4


def dense_filter(edge_index: Tensor, num_nodes: int, weight: Tensor | None = None) -> Tensor:
    """D^-1/2 (A + I) D^-1/2, rows are destinations, for graphs without self-loops."""
    adj = to_dense_adj(edge_index, edge_attr=weight, max_num_nodes=num_nodes)[0].T.double()
    adj = adj + torch.eye(num_nodes, dtype=torch.float64)
    scale = adj.sum(dim=1).rsqrt()
    return scale[:, None] * adj * scale


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("hops", [1, 2, 3])
def test_filters_are_what_they_say(hops: int, weighted: bool) -> None:
    num_nodes, edge_index = 7, torch.tensor([[0, 1, 2, 3, 5, 2], [1, 0, 1, 2, 0, 5]])
    x = features(num_nodes, WIDTH)
    weight = features(6, seed=2).abs() + 0.1 if weighted else None
    low = torch.linalg.matrix_power(dense_filter(edge_index, num_nodes, weight), hops) @ x
    for name, expected in (("low_pass", low), ("high_pass", x - low)):
        conv = FilterConv(WIDTH, 3, filter=name, hops=hops).double()  # type: ignore[arg-type]
        torch.testing.assert_close(conv(x, edge_index, weight), expected @ conv.lin.weight.T + conv.bias)
        graph = Graph(edge_index, num_nodes, edge_weight=weight)
        assert torch.equal(conv(x, graph), conv(x, edge_index, weight))
    conv = FilterConv(WIDTH, 3, filter="identity").double()
    torch.testing.assert_close(conv(x, edge_index, weight), x @ conv.lin.weight.T + conv.bias)


def test_one_low_pass_hop_is_gcn() -> None:
    num_nodes, edge_index = GRAPHS["mixed"]
    conv, gcn = FilterConv(WIDTH, 3).double(), GCNConv(WIDTH, 3).double()
    gcn.load_state_dict(conv.state_dict())
    x = features(num_nodes, WIDTH)
    torch.testing.assert_close(conv(x, edge_index), gcn(x, edge_index))


def test_experts_of_several_filters() -> None:
    kinds: list[Any] = ["low_pass", "identity", "high_pass", "two_hop", partial(FilterConv, filter="high_pass", hops=3)]
    layer = MoEConv(kinds, WIDTH, 3, k=2, router_input=("node", "neighbors"), shared_expert=False).double()
    assert isinstance(layer.experts, FilterExperts)
    assert_equals_masked(layer, features(9, WIDTH), simple_graph(9, 9))
    found: list[Any] = [layer.expert(index) for index in range(5)]
    filters = [("low_pass", 1), ("identity", 1), ("high_pass", 1), ("low_pass", 2), ("high_pass", 3)]
    assert [(one.filter, one.hops) for one in found] == filters


def test_no_edges_are_touched_by_the_identity() -> None:
    layer = MoEConv("identity", WIDTH, 3, num_experts=2, shared_expert=False).double()
    x, edge_index = features(5, WIDTH), torch.tensor([[0, 1], [1, 2]])
    assert layer.experts.aggregate(Graph(edge_index, 5), x) is None
    assert_equals_masked(layer, x, edge_index)


def test_mlp_conv_is_an_mlp_of_the_destinations() -> None:
    plain, x = MLPConv((3, WIDTH), 5, hidden_channels=7, bias=False).double(), features(4, WIDTH)
    torch.testing.assert_close(plain((features(6, 3), x)), plain.down(plain.up(x).clamp(min=0)))
    layer = MoEConv(MLPConv, (3, WIDTH), 5, num_experts=3, hidden_channels=7)
    assert isinstance(layer.experts, MLPConvExperts)
    assert layer.experts.expert(0).hidden_channels == 7


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"filter": "band"}, "filter: got 'band'"),
        ({"hops": 0}, "hops: got 0"),
        ({"filter": "identity", "hops": 2}, "hops: got 2 with filter='identity'"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FilterConv(WIDTH, 3, **kwargs)


@pytest.mark.parametrize(("conv", "name"), [("filter", "FilterConv"), ("gcn", "GCNConv")])
def test_bipartite_nodes_are_refused(conv: str, name: str) -> None:
    layer = MoEConv(conv, WIDTH, 3, num_experts=2, shared_expert=False).double()
    with pytest.raises(ValueError, match=f"x: got a tuple .*{name}"):
        layer((features(3, WIDTH), features(2, WIDTH)), torch.tensor([[0], [1]]))
