"""What a routing makes of edges: messages, and the rows that send them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch_geometric import nn as pyg

from gmoe import Graph, MoEConv
from gmoe.conv import messages
from tests.helpers.masked import GRAPHS

EXPERTS, SOURCES, MESSAGES, WIDTH = 4, 6, 20, 3
NODES, EDGES = GRAPHS["mixed"]


def ends() -> tuple[Tensor, Tensor]:
    """The expert of each message, ascending, and its source; two experts have none."""
    generator = torch.Generator().manual_seed(0)
    expert = torch.arange(MESSAGES) * 2 // MESSAGES + 1
    return expert, torch.randint(SOURCES, (MESSAGES,), generator=generator)


def test_rows_left_over_are_copies_of_the_last_one() -> None:
    """Where the host does not wait for their number."""
    expert, source = ends()
    exact = messages.Rows(*messages.find_rows(expert, source, EXPERTS, SOURCES, None))
    found = messages.Rows(*messages.find_rows(expert, source, EXPERTS, SOURCES, MESSAGES))
    number = len(exact.source)
    assert number < MESSAGES
    for name in ("expert", "source"):
        ours, theirs = getattr(found, name), getattr(exact, name)
        assert torch.equal(ours[:number], theirs)
        assert (ours[number:] == theirs[-1]).all()
    assert torch.equal(found.place[expert, source], exact.place[expert, source])
    assert found.offsets.tolist() == found.expert.bincount(minlength=EXPERTS).cumsum(0).tolist()


def test_no_messages_have_no_rows() -> None:
    none = torch.empty(0, dtype=torch.long)
    for number in (None, 0):
        rows = messages.Rows(*messages.find_rows(none, none, EXPERTS, SOURCES, number))
        assert (len(rows.source), rows.offsets.tolist()) == (0, [0] * EXPERTS)


def test_attention_of_a_dense_conv_is_in_the_graphs_own_order() -> None:
    """So that the transpose of its edges, which the graph keeps, serves all calls."""
    layer: Any = MoEConv("gatv2", WIDTH, WIDTH, num_experts=2, start="shared")
    graph = Graph(EDGES, NODES)
    assert layer.shared_expert is not None
    layer(torch.randn(NODES, WIDTH), graph).sum().backward()
    looped = graph.with_loops(fill_value=layer.shared_expert.prototype.fill_value)
    assert "transpose" in vars(looped.edges)
    assert isinstance(layer.shared_expert.prototype, pyg.GATv2Conv)
