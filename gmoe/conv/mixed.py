"""Experts of several kinds under one router. Shapes: T tokens, O width."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch_geometric.nn import MessagePassing

from gmoe.conv.experts import ConvExperts
from gmoe.conv.graph import Graph
from gmoe.conv.pieces import Pieces
from gmoe.routing import Routing


class MixedExperts(ConvExperts):
    """Groups of experts, each run in its own way on the pairs of its experts.

    Args:
        groups: the groups.
        members: for each group, the indices of its experts.
    """

    def __init__(self, groups: Sequence[ConvExperts], members: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.groups = nn.ModuleList(groups)
        self.members = [tuple(indices) for indices in members]

    def prototypes(self) -> list[MessagePassing]:
        return [prototype for group in self._groups() for prototype in group.prototypes()]

    def reset_parameters(self) -> None:
        for group in self._groups():
            group.reset_parameters()

    def expert(self, index: int) -> MessagePassing:
        for group, indices in zip(self._groups(), self.members, strict=True):
            if index in indices:
                return group.expert(indices.index(index))
        raise IndexError(index)

    def forward(self, x_src: Tensor, x_dst: Tensor, aggregate: Tensor | None, graph: Graph, routing: Routing) -> Tensor:
        outs = []
        for group, indices in zip(self._groups(), self.members, strict=True):
            own = graph.with_args_of(group.prototypes())
            near = group.aggregate(x_src, own)
            outs.append(group(x_src, x_dst, near, own, routing.of_experts(indices)))
        return sum(outs[1:], outs[0])

    def by_pieces(self, x: Tensor, aggregate: Tensor | None, pieces: Pieces, routing: Routing) -> Tensor:
        pairs = zip(self._groups(), self.members, strict=True)
        outs = [group.by_pieces(x, None, pieces, routing.of_experts(indices)) for group, indices in pairs]
        return sum(outs[1:], outs[0])

    def _groups(self) -> list[ConvExperts]:
        return [group for group in self.groups if isinstance(group, ConvExperts)]
