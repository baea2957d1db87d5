"""The in-edges of pairs, and self-loops as PyG has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_geometric.utils import add_self_loops, remove_self_loops

from gmoe.conv.graph import Graph
from gmoe.conv.pair_graph import PairGraph, with_self_loops
from tests.gmoe.conv.masked import features, random_graph, routing_of


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_messages_are_the_in_edges_of_the_pairs(data: st.DataObject) -> None:
    num_src, num_dst, num_experts = (data.draw(st.integers(1, 5), label=n) for n in ("sources", "tokens", "experts"))
    end = st.tuples(st.integers(0, num_src - 1), st.integers(0, num_dst - 1))
    edges = data.draw(st.lists(end, max_size=10), label="edges")
    row = st.lists(st.sampled_from([0.0, 1.0]), min_size=num_experts, max_size=num_experts)
    routing = routing_of(torch.tensor(data.draw(st.lists(row, min_size=num_dst, max_size=num_dst), label="weights")))
    edge_index = torch.tensor(edges, dtype=torch.long).reshape(-1, 2).T
    attr = features(len(edges), 2)
    pairs = PairGraph(Graph(edge_index, num_src, num_dst, {"edge_attr": attr}), routing)

    ends = list(zip(routing.token.tolist(), routing.expert.tolist(), strict=True))
    expected = [
        (pair, expert, edge, source)
        for pair, (token, expert) in enumerate(ends)
        for edge, (source, destination) in enumerate(edges)
        if destination == token
    ]
    found = (pairs.pair, pairs.expert, pairs.edge, pairs.source)
    assert list(zip(*(part.tolist() for part in found), strict=True)) == expected
    heard = sorted({(expert, source) for _, expert, _, source in expected})
    assert pairs.heard.tolist() == [source for _, source in heard]
    assert pairs.heard_offsets.tolist() == [sum(e <= expert for e, _ in heard) for expert in range(num_experts)]
    assert pairs.offsets.tolist() == [sum(e <= expert for _, e, *_ in expected) for expert in range(num_experts)]
    assert pairs.messages.sender.tolist() == [heard.index((expert, source)) for _, expert, _, source in expected]
    assert pairs.messages.receiver.tolist() == [pair for pair, *_ in expected]
    assert (pairs.messages.num_senders, pairs.messages.num_receivers) == (len(heard), len(ends))
    assert pairs.edge_attr is not None
    assert torch.equal(pairs.edge_attr, attr[[edge for _, _, edge, _ in expected]])
    assert pairs.start.tolist() == [sum(p < pair for p, *_ in expected) for pair in range(len(ends) + 1)]
    assert pairs.node_messages.sender.tolist() == pairs.source.tolist()
    assert pairs.edge_messages.sender.tolist() == list(range(len(expected)))


@pytest.mark.parametrize("fill_value", ["mean", "max", 0.5, torch.tensor([1.0, 2.0])])
@pytest.mark.parametrize("sizes", [(7, 7), (7, 4)], ids=str)
def test_self_loops_are_those_of_pyg(sizes: tuple[int, int], fill_value: Any) -> None:
    edge_index, attr = random_graph(*sizes, 20), features(20, 2)
    graph = with_self_loops(Graph(edge_index, *sizes, {"edge_attr": attr}), fill_value)
    expected = add_self_loops(*remove_self_loops(edge_index, attr), fill_value, min(sizes))
    assert torch.equal(graph.edge_index, expected[0])
    assert torch.equal(graph.edge_args["edge_attr"], expected[1])
    bare = with_self_loops(Graph(edge_index, *sizes, {}), fill_value)
    assert torch.equal(bare.edge_index, expected[0])
    assert bare.edge_args == {}
    assert PairGraph(bare, routing_of(torch.ones(sizes[1], 1))).edge_attr is None
