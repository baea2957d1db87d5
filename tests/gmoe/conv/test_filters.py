"""Filter experts: what each filter is, and that experts of several filters equal separate convs masked."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch_geometric.nn import GCNConv
from torch_geometric.utils import to_dense_adj, to_torch_csr_tensor

from gmoe import FilterConv, MoEConv
from gmoe.conv.aggregate import FilterExperts
from gmoe.conv.graph import Graph
from tests.gmoe.conv.masked import GRAPHS, assert_equals_masked, features, random_graph, routing_of

WIDTH = 4
KINDS: list[Any] = ["low_pass", "identity", "high_pass", "two_hop", partial(FilterConv, filter="high_pass", hops=3)]


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
    filt = dense_filter(edge_index, num_nodes, weight)
    low = torch.linalg.matrix_power(filt, hops) @ x
    for name, expected in (("low_pass", low), ("high_pass", x - low)):
        conv = FilterConv(WIDTH, 3, filter=name, hops=hops).double()  # type: ignore[arg-type]
        torch.testing.assert_close(conv(x, edge_index, weight), expected @ conv.lin.weight.T + conv.bias)
    conv = FilterConv(WIDTH, 3, filter="identity").double()
    torch.testing.assert_close(conv(x, edge_index, weight), x @ conv.lin.weight.T + conv.bias)


def test_one_low_pass_hop_is_gcn() -> None:
    num_nodes, edge_index = GRAPHS["mixed"]
    conv, gcn = FilterConv(WIDTH, 3).double(), GCNConv(WIDTH, 3).double()
    gcn.load_state_dict(conv.state_dict())
    x = features(num_nodes, WIDTH)
    torch.testing.assert_close(conv(x, edge_index), gcn(x, edge_index))


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("bias", [True, False])
def test_experts_of_several_filters_equal_masked(graph: str, bias: bool) -> None:
    num_nodes, edge_index = GRAPHS[graph]
    conv = MoEConv(KINDS, WIDTH, 3, router=None, bias=bias).double()
    assert isinstance(conv.experts, FilterExperts)
    assert conv.num_experts == 5
    weight_TE = features(num_nodes, 5, seed=3)
    weight_TE[:, 3] = 0
    weight_TE[::3] = 0
    args = {"edge_weight": features(edge_index.size(1), seed=7).abs() + 0.1}
    assert_equals_masked(conv, features(num_nodes, WIDTH), edge_index, weight_TE=weight_TE)
    assert_equals_masked(conv, features(num_nodes, WIDTH), edge_index, weight_TE=weight_TE, **args)


@pytest.mark.parametrize("router_input", ["input", "both", ("input", "degree")])
@pytest.mark.parametrize("form", ["edge_index", "csr"])
def test_with_a_router(router_input: Any, form: str) -> None:
    edge_index = random_graph(9, 9, 30).unique(dim=1)
    adj = edge_index if form == "edge_index" else to_torch_csr_tensor(edge_index.flip(0), size=(9, 9)).double()
    conv = MoEConv(KINDS, WIDTH, 3, k=2, router_input=router_input).double()
    assert_equals_masked(conv, features(9, WIDTH), adj)


def test_no_edges_are_touched_by_the_identity() -> None:
    conv = MoEConv("identity", WIDTH, 3, num_experts=2, router_input=("node", "neighbors")).double()
    x = features(5, WIDTH)
    edge_index = torch.tensor([[0, 1], [1, 2]])
    assert conv.experts.aggregate(x, Graph(edge_index, 5, 5, {})) is None
    assert_equals_masked(conv, x, edge_index)


def test_cached_keeps_the_first_graph_until_reset() -> None:
    first, second = torch.tensor([[0], [1]]), torch.tensor([[2], [1]])
    x = features(3, WIDTH)
    conv = MoEConv(["low_pass", "high_pass"], WIDTH, 3, cached=True).double()
    y = conv(x, first)
    torch.testing.assert_close(conv(x, second), y)
    conv.experts.reset_parameters()
    assert isinstance(conv.experts, FilterExperts)
    assert conv.experts.prototype._cached is None
    plain = FilterConv(WIDTH, 3, cached=True).double()
    y = plain(x, first)
    torch.testing.assert_close(plain(x, second), y)
    plain.reset_parameters()
    plain(x, second)
    assert plain._cached is not None


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1_000), num_nodes=st.integers(1, 8), num_edges=st.integers(0, 20))
def test_permutation_of_nodes(seed: int, num_nodes: int, num_edges: int) -> None:
    torch.manual_seed(seed)
    conv = MoEConv(KINDS, WIDTH, 3, router_input=("both", "degree")).double()
    x, edge_index = features(num_nodes, WIDTH, seed=seed), random_graph(num_nodes, num_nodes, num_edges, seed)
    order = torch.randperm(num_nodes)
    place = order.argsort()
    torch.testing.assert_close(conv(x[order], place[edge_index]), conv(x, edge_index)[order])


def test_experts_are_initialised_as_separate_convs() -> None:
    torch.manual_seed(0)
    conv = MoEConv("filter", 64, 32, num_experts=4, router=None)
    spread = torch.stack([FilterConv(64, 32).lin.weight.detach().std() for _ in range(20)]).mean()
    assert isinstance(conv.experts, FilterExperts)
    assert float(conv.experts.linear.weight.detach().std()) == pytest.approx(float(spread), rel=0.05)
    assert not conv.experts.linear.bias.any()  # type: ignore[union-attr]
    before = conv.experts.linear.weight.clone()
    conv.reset_parameters()
    assert not torch.equal(before, conv.experts.linear.weight)


def test_expert_is_a_plain_conv_of_its_filter() -> None:
    conv = MoEConv(KINDS, WIDTH, 3, router=None)
    found = [conv.expert(index) for index in range(5)]
    assert [(one.filter, one.hops) for one in found] == [
        ("low_pass", 1),
        ("identity", 1),
        ("high_pass", 1),
        ("low_pass", 2),
        ("high_pass", 3),
    ]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"filter": "band"}, "filter: got 'band', expected one of 'identity', 'low_pass', 'high_pass'"),
        ({"hops": 0}, "hops: got 0, expected at least 1"),
        ({"filter": "identity", "hops": 2}, "hops: got 2 with filter='identity', expected 1"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FilterConv(WIDTH, 3, **kwargs)


def test_bipartite_is_refused() -> None:
    conv = MoEConv("filter", WIDTH, 3, num_experts=2).double()
    with pytest.raises(ValueError, match="FilterConv takes no bipartite input"):
        conv((features(3, WIDTH), features(2, WIDTH)), torch.tensor([[0], [1]]))


def test_routing_of_everyone_follows_the_bf16_of_autocast() -> None:
    conv = MoEConv(KINDS, WIDTH, 3, shared_expert=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(features(5, WIDTH).float(), torch.tensor([[0, 1], [1, 2]]))
    assert y.isfinite().all()
    assert routing_of(torch.ones(2, 2)).num_tokens == 2
