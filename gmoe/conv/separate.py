"""Experts that are run one by one. Shapes: T tokens (destinations), S sources, O width, E
experts.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing

from gmoe.conv.base import ConvExperts, tokens_of
from gmoe.conv.graph import Graph
from gmoe.dispatch import combine
from gmoe.routing import Routing


class SeparateExperts(ConvExperts):
    """E convs run one by one, each on the in-edges of its own destinations where it is local, else
    on the whole graph.

    Args:
        convs: the E convs.
        local: for each of them, if it is local.
    """

    def __init__(self, convs: Sequence[MessagePassing], local: Sequence[bool]) -> None:
        super().__init__()
        self.members: Any = nn.ModuleList(convs)
        self.is_local = list(local)

    @property
    def too_far(self) -> list[MessagePassing]:
        return [conv for conv, local in zip(self.members, self.is_local, strict=True) if not local]

    def reset_parameters(self) -> None:
        for conv in self.members:
            conv.reset_parameters()

    def become(self, conv: MessagePassing) -> None:
        for member in self.members:
            member.load_state_dict(conv.state_dict())

    def expert(self, index: int) -> MessagePassing:
        conv = copy.deepcopy(self.members[index])
        conv.zero_grad()  # the copy takes gradients along
        return conv

    def convs(self) -> list[MessagePassing]:
        return list(self.members)

    def forward(
        self, graph: Graph, x_src: Tensor, x_dst: Tensor, h: Any, routing: Routing
    ) -> Tensor:
        outs, idle = list[Tensor](), list[Tensor]()
        for conv, local, token in zip(self.members, self.is_local, tokens_of(routing), strict=True):
            # loops of a bipartite graph join nodes of equal index, which a part keeps only where
            # N_src >= N_dst
            misaligned = getattr(conv, "add_self_loops", False) and graph.num_src < graph.num_dst
            if not token.numel():
                idle += conv.parameters()
            elif not local or conv.explain or misaligned or len(token) == graph.num_dst:
                # a mask is of the whole graph's edges
                outs.append(run(conv, graph, x_src, x_dst).index_select(0, token))
            else:
                outs.append(run_on(conv, graph, x_src, x_dst, token))
        outs = outs or [run(self.members[0], graph, x_src, x_dst)[:0]]
        y = combine(torch.cat(outs), routing)
        # experts without a token get zero gradients, not None, or DDP would wait for them
        return y + sum(((p * 0).sum() for p in idle), y.new_zeros(())).to(y.dtype) if idle else y


def run(conv: Any, graph: Graph, x_src: Tensor, x_dst: Tensor) -> Tensor:
    """(T, O) PyG's conv on a graph."""
    x = (x_src, x_dst) if _are_two(graph, x_src, x_dst) else x_src
    return conv(x, graph.adj, **graph.args_for(conv))[: graph.num_dst]


def run_on(conv: Any, graph: Graph, x_src: Tensor, x_dst: Tensor, token: Tensor) -> Tensor:
    """(n, O) PyG's conv on the in-edges of ``token`` only, the destinations first among the
    sources.
    """
    nodes, part = graph.part(token)
    x: Any = x_src.index_select(0, nodes)
    if _are_two(graph, x_src, x_dst):
        x = (
            x,
            x_dst.index_select(0, nodes if graph.num_src == graph.num_rows else part.destinations),
        )
    return conv(x, part.adj, **part.args_for(conv))[: token.numel()]


def _are_two(graph: Graph, x_src: Tensor, x_dst: Tensor) -> bool:
    """False where the destinations are the first of the sources."""
    return x_src is not x_dst and graph.num_rows == graph.num_dst
