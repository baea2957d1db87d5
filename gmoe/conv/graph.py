"""The graph of one call, whatever its form. N_src sources, N_dst destinations (the tokens), M edges."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.nn import MessagePassing
from torch_geometric.typing import Adj, SparseTensor
from torch_geometric.utils import degree, index_sort, is_sparse, to_edge_index
from torch_geometric.utils.sparse import index2ptr

from gmoe.routers.base import check_edge_index


@dataclass(frozen=True)
class Graph:
    """Edges as the user gave them, and as plain ``edge_index`` for who needs that.

    Args:
        adj: plain ``edge_index`` (2, M), PyG's ``EdgeIndex``, a ``torch.sparse`` matrix or ``SparseTensor`` of shape
            (N_dst, N_src).
        num_src, num_dst: N_src and N_dst.
        edge_args: what the conv takes per edge (``edge_weight``, ``edge_attr``, ...), each with M rows.
        flow: PyG's ``flow``: which row of ``edge_index`` holds the destinations.
        bipartite: sources and destinations are two sets of nodes.

    Raises:
        ValueError: edges outside the nodes (CPU tensors), or an edge argument with another number of rows.
    """

    adj: Adj
    num_src: int
    num_dst: int
    edge_args: dict[str, Tensor]
    flow: str = "source_to_target"
    bipartite: bool = False

    def __post_init__(self) -> None:
        if is_sparse(self.adj):
            shape = (self.adj.size(0), self.adj.size(1))
            if shape != (self.num_dst, self.num_src):
                raise ValueError(
                    f"edge_index: got a sparse matrix of shape {shape}, expected (destinations, sources) = "
                    f"{(self.num_dst, self.num_src)}"
                )
            return
        if self.adj.dtype != torch.long and not self.adj.is_floating_point():
            # torch's gather on CPU misreads expanded int32 indices, so that gradients would be silently wrong
            plain = self.adj.as_tensor() if isinstance(self.adj, EdgeIndex) else self.adj
            object.__setattr__(self, "adj", plain.long())
        if isinstance(self.adj, EdgeIndex):
            sizes = self.adj.sparse_size() if self.flow == "source_to_target" else self.adj.sparse_size()[::-1]
            for name, size, nodes in zip(("source", "destination"), sizes, (self.num_src, self.num_dst), strict=True):
                if size is not None and size != nodes:
                    raise ValueError(f"edge_index: got an EdgeIndex of {size} {name} nodes, expected {nodes}")
        bounds = (self.num_src, self.num_dst)
        check_edge_index(self.adj, *(bounds if self.flow == "source_to_target" else bounds[::-1]))
        for name, value in self.edge_args.items():
            if value.size(0) != self.adj.size(1):
                raise ValueError(f"{name}: got {value.size(0)} rows, expected one for each of {self.adj.size(1)} edges")

    @cached_property
    def _coo(self) -> tuple[Tensor, Tensor | None]:
        """Plain (source, destination) edges, and the values of a sparse matrix."""
        if isinstance(self.adj, SparseTensor):
            dst, src, value = self.adj.coo()
            return torch.stack([src, dst]), value
        if is_sparse(self.adj):
            (dst, src), value = to_edge_index(self.adj)
            return torch.stack([src, dst]), value
        plain = self.adj.as_tensor() if isinstance(self.adj, EdgeIndex) else self.adj
        return (plain if self.flow == "source_to_target" else plain.flip(0)), None

    @property
    def edge_index(self) -> Tensor:
        """(2, M) sources and destinations."""
        return self._coo[0]

    @property
    def values(self) -> Tensor | None:
        """(M, ...) those of a sparse matrix that holds some; its edges are ``edge_index``."""
        return self._coo[1]

    @cached_property
    def _by_destination(self) -> tuple[Tensor, Tensor]:
        """(N_dst + 1,) where each destination's edges start, and (M,) the edges in that order."""
        index, edge = index_sort(self.edge_index[1], max_value=self.num_dst, stable=True)
        return index2ptr(index, self.num_dst), edge

    def in_edges(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """The edges that end in ``nodes``, destination by destination, and the position in ``nodes`` of each end."""
        start, edge = self._by_destination
        degree = start[nodes + 1] - start[nodes]
        position = torch.arange(len(nodes), device=nodes.device).repeat_interleave(degree)
        first = degree.cumsum(0) - degree
        step = torch.arange(len(position), device=nodes.device) - first[position]
        return edge[start[nodes][position] + step], position

    @property
    def log_degree(self) -> Tensor:
        """(N_dst, 1) log(1 + in-degree)."""
        return degree(self.edge_index[1], self.num_dst).log1p()[:, None]

    def with_args_of(self, convs: Sequence[MessagePassing]) -> Graph:
        """The same graph with only the edge arguments that all of these convs take."""
        takes = frozenset.intersection(*map(parameters_of, convs))
        if takes.issuperset(self.edge_args):
            return self
        graph = copy.copy(self)
        object.__setattr__(graph, "edge_args", {name: v for name, v in self.edge_args.items() if name in takes})
        return graph

    def neighbourhood(self, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The in-edges of some destinations and their ends, the destinations first.

        Args:
            token: (n,) distinct destinations.

        Returns:
            (S,) the nodes, (2, m) renumbered sources and destinations, and (m,) which edges they are. A destination
            that is no source (N_dst > N_src) is left out of the nodes.
        """
        edge, position = self.in_edges(token)
        source = self.edge_index[0, edge]
        place = self._place
        among = token[token < self.num_src]
        place[among] = torch.arange(among.numel(), device=token.device)
        others = source[place[source] < 0].unique()
        place[others] = torch.arange(others.numel(), device=token.device) + among.numel()
        nodes, ends = torch.cat([among, others]), torch.stack([place[source], position])
        place[nodes] = -1  # what was touched alone: a piece costs what it holds, not what the graph does
        return nodes, ends, edge

    @cached_property
    def _place(self) -> Tensor:
        """(N_src,) all -1, between two calls of :meth:`neighbourhood`."""
        return torch.full((self.num_src,), -1, dtype=torch.long, device=self.device)

    @property
    def device(self) -> torch.device:
        """Where the edges are."""
        return self.edge_index.device

    def args_of(self, edges: Tensor, takes: frozenset[str]) -> dict[str, Any]:
        """The edge arguments of some edges, those of a sparse matrix's values included."""
        args = {name: value[edges] for name, value in self.edge_args.items()}
        value = self.values
        if value is not None:
            names = ("edge_weight", "edge_type") if value.dim() == 1 else ("edge_weight", "edge_attr", "edge_type")
            for name in names:  # as MessagePassing reads them
                if name in takes and name not in args:
                    args[name] = value[edges]
        return args


def sized(adj: Adj, size: tuple[int, int]) -> Adj:
    """An EdgeIndex with its number of nodes, of which alone PyG takes it; any other form as it is."""
    if isinstance(adj, EdgeIndex) and None in adj.sparse_size():
        return EdgeIndex(adj.as_tensor(), sparse_size=size, sort_order=adj.sort_order)
    return adj


def aggregated(adj: Adj, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """``run(x)`` in the dtype of ``x``; in float32 and without autocast where the matrix is sparse, since that has no
    kernels in half precision."""
    if not is_sparse(adj):
        return run(x).to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return run(x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).to(x.dtype)


def parameters_of(conv: MessagePassing) -> frozenset[str]:
    """What the conv's forward takes."""
    return frozenset(inspect.signature(conv.forward).parameters)


def check_batch(batch: Tensor | None, num_nodes: int) -> None:
    """Refuse a ``batch`` vector that does not say for each node which graph it belongs to."""
    if batch is not None and (batch.dim() != 1 or batch.numel() != num_nodes or batch.is_floating_point()):
        raise ValueError(
            f"batch: got shape {tuple(batch.shape)} of {batch.dtype}, expected one integer for each of {num_nodes} "
            "nodes"
        )
