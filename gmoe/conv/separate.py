"""Experts that run one by one, for convs that cannot be stacked.

Shapes: T tokens (destinations), S sources, O out width, E experts.

``torch.compile`` runs them in pieces: each conv gets a graph of its own, whose sizes follow the
data.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing

from gmoe.conv.base import Conv, ConvExperts, tokens_of
from gmoe.conv.call import Call
from gmoe.conv.graph import Graph
from gmoe.conv.plain import run, run_on
from gmoe.portable import exported_as
from gmoe.products import combine
from gmoe.routing import Routing


def _run_all_on_all(experts: SeparateExperts, call: Call, routing: Routing) -> Tensor:
    """(T, O) the same, each conv at every token: an export does not know the loads of experts."""
    graph, x_src, x_dst, _ = call
    all_TEO = torch.stack([run(conv, graph, x_src, x_dst) for conv in experts.members], dim=1)
    return (all_TEO * routing.to_dense()[..., None]).sum(dim=1)


class SeparateExperts(ConvExperts):
    """E convs that run one by one.

    A local conv runs on the in-edges of its own destinations only, any other on the whole graph.

    Args:
        convs: the E convs.
        local: for each of them, whether it is local.
    """

    holds_any_conv = True
    """Its parts may be of any class: they are copies of somebody's conv."""

    def __init__(self, convs: Sequence[MessagePassing], local: Sequence[bool]) -> None:
        super().__init__()
        self.members: Any = nn.ModuleList(convs)
        self.is_local = list(local)
        self.flow = convs[0].flow

    @property
    def too_far(self) -> list[MessagePassing]:
        return [conv for conv, local in zip(self.members, self.is_local, strict=True) if not local]

    def reset_parameters(self) -> None:
        for conv in self.members:
            conv.reset_parameters()

    def become(self, conv: MessagePassing) -> None:
        for member in self.members:
            member.load_state_dict(conv.state_dict())

    def keep(self, kept: Sequence[int]) -> None:
        self.members = nn.ModuleList(self.members[expert] for expert in kept)
        self.is_local = [self.is_local[expert] for expert in kept]

    def expert(self, index: int) -> MessagePassing:
        conv = copy.deepcopy(self.members[index])
        conv.zero_grad()  # deepcopy copies gradients too
        return conv

    def convs(self) -> list[MessagePassing]:
        return list(self.members)

    @exported_as(_run_all_on_all)
    def forward(self, call: Call, routing: Routing) -> Tensor:
        graph, x_src, x_dst, _ = call
        outputs: list[Tensor] = []
        idle: list[Tensor] = []  # parameters of experts without a token
        for conv, local, token in zip(self.members, self.is_local, tokens_of(routing), strict=True):
            if not token.numel():
                idle += conv.parameters()
            elif local and not self._needs_whole_graph(conv, graph, token):
                outputs.append(run_on(conv, graph, x_src, x_dst, token))
            else:
                outputs.append(run(conv, graph, x_src, x_dst).index_select(0, token))
        if not outputs:  # no tokens at all: only the shape and the dtype of the output matter
            outputs = [run(self.members[0], graph, x_src, x_dst)[:0]]
        y = combine(torch.cat(outputs), routing)
        if not idle:
            return y
        # Idle experts get zero gradients, not None: DDP would wait for them.
        zero = sum(((parameter * 0).sum() for parameter in idle), y.new_zeros(()))
        return y + zero.to(y.dtype)

    @staticmethod
    def _needs_whole_graph(conv: Conv, graph: Graph, token: Tensor) -> bool:
        """True if a local conv cannot run on a part of the graph, or does not gain from it."""
        # Self-loops that a conv adds to a bipartite graph join nodes of equal index, and a part
        # keeps those indices only if N_src >= N_dst.
        is_misaligned = getattr(conv, "add_self_loops", False) and graph.num_src < graph.num_dst
        # An explainer's mask has an entry for each edge of the whole graph.
        return conv.explain or is_misaligned or token.size(0) == graph.num_dst
