"""The graph as (token, expert) pairs see it. Shapes: N sources, E experts, P pairs, M messages, U rows, F width."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor
from torch_geometric.utils import add_self_loops, remove_self_loops
from torch_geometric.utils.sparse import index2ptr

from gmoe.conv.graph import Graph
from gmoe.conv.segment import Messages
from gmoe.routing import Routing

EDGE_ATTR = frozenset({"edge_attr"})

FillValue: TypeAlias = float | Tensor | str
"""What PyG's ``add_self_loops`` takes for the edge features of loops."""


@dataclass(frozen=True)
class PairGraph:
    """The in-edges of each pair of a routing, pair by pair: one message an edge and expert of its destination.

    Args:
        graph: the edges, self-loops included.
        routing: the pairs.
    """

    graph: Graph
    routing: Routing

    @cached_property
    def _in_edges(self) -> tuple[Tensor, Tensor]:
        return self.graph.in_edges(self.routing.token)

    @property
    def edge(self) -> Tensor:
        """(M,) the edge that each message runs along."""
        return self._in_edges[0]

    @property
    def pair(self) -> Tensor:
        """(M,) the pair that hears it, ascending."""
        return self._in_edges[1]

    @cached_property
    def start(self) -> Tensor:
        """(P + 1,) where the messages of each pair start."""
        return index2ptr(self.pair, len(self.routing.token))

    @cached_property
    def expert(self) -> Tensor:
        """(M,) the expert of that pair, ascending."""
        return self.routing.expert.index_select(0, self.pair)

    @cached_property
    def source(self) -> Tensor:
        """(M,) the node that sends it."""
        return self.graph.edge_index[0].index_select(0, self.edge)

    @cached_property
    def offsets(self) -> Tensor:
        """(E,) int32, cumulative ends of each expert's messages."""
        return self.start[self.routing.offsets.long()].to(torch.int32)

    @cached_property
    def edge_attr(self) -> Tensor | None:
        """(M, F) the features of the edge of each message, where the graph has some."""
        attr = self.graph.args_of(self.edge, EDGE_ATTR).get("edge_attr")
        return attr if attr is None or attr.dim() > 1 else attr[:, None]

    @cached_property
    def _is_heard(self) -> Tensor:
        """(E N,) whether some token of the expert has an edge from the source."""
        heard = self.pair.new_zeros(self.routing.num_experts * self.graph.num_src, dtype=torch.bool)
        heard[self.expert * self.graph.num_src + self.source] = True
        return heard

    @cached_property
    def heard(self) -> Tensor:
        """(U,) the sources that each expert hears, in order, expert by expert."""
        return self._is_heard.nonzero().view(-1) % max(self.graph.num_src, 1)

    @cached_property
    def heard_offsets(self) -> Tensor:
        """(E,) int32, cumulative ends of what each expert hears."""
        return self._is_heard.view(self.routing.num_experts, -1).sum(dim=1).cumsum(0).to(torch.int32)

    @cached_property
    def messages(self) -> Messages:
        """From the heard rows to the pairs."""
        place = self._is_heard.cumsum(0) - 1
        sender = place[self.expert * self.graph.num_src + self.source]
        return Messages(sender, self.pair, len(self.heard), len(self.routing.token))

    @cached_property
    def node_messages(self) -> Messages:
        """From the nodes to the pairs."""
        return Messages(self.source, self.pair, self.graph.num_src, len(self.routing.token))

    @cached_property
    def edge_messages(self) -> Messages:
        """To each pair, from its edges, in the order of :attr:`edge_attr`."""
        sender = torch.arange(len(self.pair), device=self.pair.device)
        return Messages(sender, self.pair, len(self.pair), len(self.routing.token))


def with_self_loops(graph: Graph, fill_value: FillValue) -> Graph:
    """The graph with one loop at each node that is source and destination, in the place of those it had.

    Args:
        graph: any form of edges.
        fill_value: the loops' edge features, see ``torch_geometric.utils.add_self_loops``.
    """
    every = torch.arange(graph.edge_index.size(1), device=graph.device)
    edge_index, kept = remove_self_loops(graph.edge_index, every)
    edge_attr = graph.args_of(kept, EDGE_ATTR).get("edge_attr")
    num_nodes = min(graph.num_src, graph.num_dst)
    edge_index, edge_attr = add_self_loops(edge_index, edge_attr, fill_value, num_nodes)
    edge_args = {} if edge_attr is None else {"edge_attr": edge_attr}
    return Graph(edge_index, graph.num_src, graph.num_dst, edge_args, bipartite=graph.bipartite)
