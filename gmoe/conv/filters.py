"""Filter experts: each sees the graph through its own filter. Shapes: T tokens, D in, O out, E experts, P pairs."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from gmoe.conv.experts import StackedExperts, tokens_of
from gmoe.conv.filter_conv import FilterConv
from gmoe.conv.graph import Graph, aggregated
from gmoe.conv.pieces import Piece, Pieces
from gmoe.dispatch import Backend, combine
from gmoe.experts import LinearExperts
from gmoe.routing import Routing


class FilterExperts(StackedExperts):
    """E FilterConvs, whose filters may differ: every power of the adjacency is applied once, whoever looks at it."""

    prototype: FilterConv

    @staticmethod
    def accepts(conv: Any) -> bool:
        return True

    def _build(self, template: Any, backend: Backend) -> None:
        self.prototype = copy.deepcopy(template)
        self.prototype.lin = nn.Identity()
        self.prototype.bias = None
        self.linear = LinearExperts(
            template.in_channels,
            template.out_channels,
            self.num_experts,
            bias=template.bias is not None,
            backend=backend,
        )

    @torch.no_grad()
    def _fill(self, convs: list[Any]) -> None:
        self.filters = [(conv.filter, conv.hops) for conv in convs]
        for expert, conv in enumerate(convs):
            self.linear.weight[expert] = conv.lin.weight.T
            if self.linear.bias is not None:
                self.linear.bias[expert] = conv.bias

    @torch.no_grad()
    def _unfill(self, conv: Any, index: int) -> None:
        conv.lin.weight.copy_(self.linear.weight[index].T)
        if self.linear.bias is not None:
            conv.bias.copy_(self.linear.bias[index])

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.prototype._cached = None

    @property
    def hops(self) -> int:
        """How far the experts see."""
        return max((hops for name, hops in self.filters if name != "identity"), default=0)

    def powers(self, x_src: Tensor, graph: Graph) -> list[Tensor]:
        """x, and A x, A² x, ... as far as an expert looks, each (T, D)."""
        if graph.bipartite:
            raise ValueError(
                "x: got a tuple of source and destination nodes, expected one tensor, since FilterConv takes no "
                "bipartite input (SAGEConv and GraphConv do)"
            )
        powers = [x_src]
        if self.hops:
            adj, edge_weight = self.prototype.norm(x_src, graph.adj, graph.edge_args.get("edge_weight"))
            for _ in range(self.hops):
                powers.append(aggregated(adj, powers[-1], lambda x: self.prototype.hop(x, adj, edge_weight)))
        return powers

    def aggregate(self, x_src: Tensor, graph: Graph) -> Tensor | None:
        powers = self.powers(x_src, graph)
        return torch.cat(powers[1:], dim=-1) if self.hops else None

    def aggregate_by_pieces(self, x: Tensor, pieces: Pieces) -> Tensor | None:
        powers = [x]
        with pieces.of(self.prototype) as own:
            for _ in range(self.hops):
                powers.append(own.map(self._hop, powers[-1]))
        return torch.cat(powers[1:], dim=-1) if self.hops else None

    def _hop(self, x: Tensor, piece: Piece) -> Tensor:
        return self.prototype.hop(x, piece.graph.adj, piece.graph.edge_args.get("edge_weight"))

    def by_pieces(self, x: Tensor, aggregate: Tensor | None, pieces: Pieces, routing: Routing) -> Tensor:
        if aggregate is None:
            aggregate = self.aggregate_by_pieces(x, pieces)
        return self._rows_by_pieces(x, aggregate, pieces, routing)

    def forward(self, x_src: Tensor, x_dst: Tensor, aggregate: Tensor | None, graph: Graph, routing: Routing) -> Tensor:
        powers = [x_dst]
        if aggregate is not None:
            powers += aggregate.split(x_dst.size(1), dim=1)
        rows = []
        for (name, hops), token in zip(self.filters, tokens_of(routing), strict=True):
            if name == "high_pass":
                rows.append(x_dst.index_select(0, token) - powers[hops].index_select(0, token))
            else:
                rows.append(powers[0 if name == "identity" else hops].index_select(0, token))
        return combine(self.linear(torch.cat(rows), routing.offsets), routing)
