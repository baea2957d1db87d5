"""A graph in pieces: some destinations at a time, with their in-edges. N nodes; n destinations, S nodes of a piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.nn import GCNConv
from torch_geometric.nn.conv.gcn_conv import gcn_norm
from torch_geometric.utils import is_sparse, to_torch_csr_tensor

from gmoe.conv.filter_conv import FilterConv
from gmoe.conv.graph import Graph
from gmoe.routing import Routing


@dataclass(frozen=True)
class Piece:
    """Some destinations and all that sends messages to them.

    Args:
        nodes: (S,) the nodes; the destinations come first, in order.
        start, end: the destinations, as a range.
        graph: their in-edges, renumbered.
    """

    nodes: Tensor
    start: int
    end: int
    graph: Graph

    @property
    def size(self) -> int:
        """n."""
        return self.end - self.start

    def routing(self, whole: Routing) -> Routing:
        """Of the decisions on all nodes, those on the destinations; the other nodes of the piece have no expert."""
        return whole.between(self.start, self.end).padded(len(self.nodes))


class Pieces:
    """The pieces of a graph, whose in-edges are complete, so that a conv that looks one hop far is exact on them.

    Args:
        data: edge_index, and perhaps edge_weight and edge_attr; the pieces of a sparse matrix with values are such
            matrices.
        batch_size: destinations a piece.
        device: where pieces are computed.
        keep: hold the pieces, in place of making them anew for every layer.
    """

    def __init__(self, data: Data, batch_size: int, device: torch.device, keep: bool = False) -> None:
        self.num_nodes = int(data.num_nodes or 0)
        self.dtype = torch.get_default_dtype() if data.x is None else data.x.dtype
        self.batch_size = batch_size
        self.device = device
        self.keep = keep
        edge_args = {name: data[name] for name in ("edge_weight", "edge_attr") if data.get(name) is not None}
        self.graph = Graph(data.edge_index, self.num_nodes, self.num_nodes, edge_args)
        self._kept: list[Piece] | None = None
        self._normed: dict[tuple[bool, bool], Pieces] = {}

    def __iter__(self) -> Iterator[Piece]:
        if self._kept is not None:
            yield from self._kept
            return
        made = []
        for start in range(0, max(self.num_nodes, 1), self.batch_size):  # of no nodes, one empty piece
            end = min(start + self.batch_size, self.num_nodes)
            nodes, edge_index, edge = self.graph.neighbourhood(torch.arange(start, end, device=self.graph.device))
            args = {name: value[edge].to(self.device) for name, value in self.graph.edge_args.items()}
            adj = edge_index.to(self.device)
            if self.graph.values is not None:
                ends, size = adj.flip(0), (len(nodes), len(nodes))
                adj = to_torch_csr_tensor(ends, self.graph.values[edge].to(self.device), size=size)
            piece = Piece(nodes, start, end, Graph(adj, len(nodes), len(nodes), args))
            if self.keep:
                made.append(piece)
            yield piece
        if self.keep:
            self._kept = made

    def map(self, compute: Callable[[Tensor, Piece], Tensor], x: Tensor) -> Tensor:
        """(N, O) the outputs of all destinations; ``compute(x of the piece's nodes, piece)`` gives (at least n, O)."""
        outs = []
        for piece in self:
            out = compute(x[piece.nodes.to(x.device)].to(self.device), piece)
            outs.append(out[: piece.size].to(x.device))
        return torch.cat(outs)

    @contextmanager
    def of(self, conv: Any) -> Iterator[Pieces]:
        """The pieces for a conv: for those that normalise by degree, which a piece does not know, normalised once."""
        if not isinstance(conv, GCNConv | FilterConv) or not conv.normalize:
            yield self
            return
        key = (bool(getattr(conv, "improved", False)), bool(conv.add_self_loops))
        if key not in self._normed:
            # in the form that the edges came in: of a matrix, PyG adds self-loops also where there are some
            adj = self.graph.adj if is_sparse(self.graph.adj) else self.graph.edge_index
            weight = self.graph.edge_args.get("edge_weight")
            edge_index, weight = gcn_norm(adj, weight, self.num_nodes, *key, dtype=self.dtype)
            data = Data(edge_index=edge_index, edge_weight=weight, num_nodes=self.num_nodes)
            self._normed[key] = Pieces(data, self.batch_size, self.device, self.keep)
        conv.normalize = False
        try:
            yield self._normed[key]
        finally:
            conv.normalize = True
