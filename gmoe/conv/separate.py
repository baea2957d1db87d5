"""Experts that are run one by one. Shapes: T tokens (destinations), O width, E experts."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing

from gmoe.conv.base import ConvExperts, MakeConv, NodeChunks, of_one_width, tokens_of, too_far
from gmoe.conv.graph import Graph
from gmoe.dispatch import combine
from gmoe.routing import Routing


class SeparateExperts(ConvExperts):
    """E convs run one by one, each on the in-edges of its own destinations where it is local, else on the whole graph.

    Args:
        make: makes the conv of an expert.
        num_experts: E.
        local: for each expert, whether its conv is local.
    """

    def __init__(self, make: MakeConv, num_experts: int, local: list[bool]) -> None:
        super().__init__()
        self.members: Any = nn.ModuleList(make(expert) for expert in range(num_experts))
        self.is_local = local

    def fill(self, convs: list[Any]) -> None:
        self.members = nn.ModuleList(convs)

    def reset_parameters(self) -> None:
        for conv in self.members:
            conv.reset_parameters()

    def expert(self, index: int) -> MessagePassing:
        conv: MessagePassing = copy.deepcopy(self.members[index])
        conv.zero_grad()  # the copy takes gradients along
        return conv

    def convs(self) -> list[MessagePassing]:
        return list(self.members)

    def forward_chunked(self, x: Tensor, chunks: NodeChunks, h: Any, routing: Routing) -> Tensor:
        if not all(self.is_local):
            raise too_far(conv for conv, local in zip(self.members, self.is_local, strict=True) if not local)
        return super().forward_chunked(x, chunks, h, routing)

    def forward(self, graph: Graph, x_src: Tensor, x_dst: Tensor, h: Any, routing: Routing) -> Tensor:
        tokens = list(tokens_of(routing))
        outs: list[Tensor | None] = [None] * len(tokens)
        for index, (conv, token) in enumerate(zip(self.members, tokens, strict=True)):
            if token.numel():
                # a mask is of the whole graph's edges
                near = self.is_local[index] and not conv.explain and not _loops_misalign(conv, graph)
                outs[index] = (run_on_destinations if near else run_on_all)(conv, x_src, x_dst, graph, token)
        done = [out for out in outs if out is not None]
        if not done:
            done = [run_on_all(self.members[0], x_src, x_dst, graph, tokens[0])]
        y = combine(torch.cat(of_one_width(done)), routing)
        # experts without a token get zero gradients, not None, or DDP would wait for them
        idle = [p for out, conv in zip(outs, self.members, strict=True) if out is None for p in conv.parameters()]
        return y + sum(((p * 0).sum() for p in idle), y.new_zeros(())).to(y.dtype) if idle else y


def run_on_all(conv: Any, x_src: Tensor, x_dst: Tensor, graph: Graph, token: Tensor) -> Tensor:
    """The conv on the whole graph, and of its output the rows of ``token``."""
    x = x_src if x_src is x_dst else (x_src, x_dst)
    out: Tensor = conv(x, graph.adj, **graph.args_for(conv))
    return out.index_select(0, token)


def run_on_destinations(conv: Any, x_src: Tensor, x_dst: Tensor, graph: Graph, token: Tensor) -> Tensor:
    """The conv on the in-edges of ``token`` only, its destinations first among the sources."""
    nodes, part = graph.part(token)
    x: Any = x_src.index_select(0, nodes)
    if x_src is not x_dst:
        x = x, x_dst.index_select(0, nodes if graph.num_src == graph.num_dst else part.destinations)
    out: Tensor = conv(x, part.adj, **part.args_for(conv))
    return out[: token.numel()]


def _loops_misalign(conv: Any, graph: Graph) -> bool:
    """Self-loops of a bipartite graph join nodes of equal index, which a sub-graph keeps only where N_src >= N_dst."""
    return bool(getattr(conv, "add_self_loops", False)) and graph.num_src < graph.num_dst
