"""The times of nodes and edges, and which in-edges a seed may see.

Shapes: N nodes, M edges of a type, F nodes of a frontier, V distinct times.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch_geometric.data import Data, HeteroData
from torch_geometric.typing import EdgeType, NodeType

from gmoe._checks import INTEGERS, described
from gmoe.data.stored import StoredGraph

TemporalStrategy: TypeAlias = Literal["uniform", "last"]


class Clock:
    """Order of the times of a graph: a time's rank is the number of distinct ones up to it.

    Ranks let one sorted list of whole numbers hold destinations and times of all edges of a type,
    so that the edges that many nodes may see are found by one search.

    Args:
        times: all times of the graph, integers or floats.
    """

    def __init__(self, times: Iterable[Tensor]) -> None:
        self.times = torch.cat(list(times)).unique()

    def rank(self, name: str, times: Any, number: int) -> Tensor:
        """(number,) the ranks, 0..V, of times that are of the graph's own kind of number.

        Raises:
            ValueError: times that are not so many; floats where the graph has integers, or the
                other way round, since comparing them would round one of both.
        """
        times = checked_times(name, times, number)
        if times.dtype != self.times.dtype:
            expected = "floats" if self.times.is_floating_point() else "integers"
            raise ValueError(
                f"{name}: got {times.dtype}, expected {expected}, as the times of the graph"
            )
        return torch.searchsorted(self.times, times, right=True)

    def order(self, node_M: Tensor, rank_M: Tensor) -> tuple[Tensor, Tensor]:
        """Sort edges by node and then by time, equal ones in the order given.

        Returns:
            (M,) their sorted keys, for :meth:`end`; and (M,) their order.
        """
        key_M = node_M * (len(self.times) + 1) + rank_M
        return key_M.sort(stable=True)

    def end(self, key_M: Tensor, node_F: Tensor, rank_F: Tensor) -> Tensor:
        """(F,) where each node's in-edges end that are not later than a rank."""
        last_F = node_F * (len(self.times) + 1) + rank_F
        return torch.searchsorted(key_M, last_F, right=True)


def checked_times(name: str, times: Any, number: int) -> Tensor:
    """(number,) times on the CPU, int64 or float64.

    Raises:
        ValueError: another shape; no numbers, or NaN.
    """
    is_number = isinstance(times, Tensor) and (times.dtype in INTEGERS or times.is_floating_point())
    if not is_number or times.shape != (number,) or bool(times.isnan().any()):
        raise ValueError(
            f"{name}: got {described(times)}, expected ({number},) integers or floats, none NaN"
        )
    return times.cpu().to(torch.float64 if times.is_floating_point() else torch.int64)


def read_times(
    data: Data | HeteroData | StoredGraph, time_attr: str
) -> tuple[dict[NodeType, Tensor], dict[EdgeType, Tensor]]:
    """The times of nodes and of edges, by type; one of both is empty.

    A homogeneous graph has nodes of type ``""`` and edges of type ``("", "", "")``.

    Raises:
        ValueError: no such attribute; one of both nodes and edges; one that does not fit.
    """
    if isinstance(data, StoredGraph):
        raise ValueError(
            f"time_attr: got {time_attr!r}, expected None for a StoredGraph: it holds no times"
        )
    nodes: dict[NodeType, Tensor] = {}
    edges: dict[EdgeType, Tensor] = {}
    if isinstance(data, Data):
        if time_attr in data and data.is_node_attr(time_attr):
            nodes[""] = checked_times("time_attr", data[time_attr], int(data.num_nodes or 0))
        elif time_attr in data:
            edges["", "", ""] = checked_times("time_attr", data[time_attr], data.num_edges)
    else:
        for kind, store in data.node_items():
            if time_attr in store:
                nodes[kind] = checked_times("time_attr", store[time_attr], int(store.num_nodes))
        for relation, store in data.edge_items():
            if time_attr in store:
                edges[relation] = checked_times("time_attr", store[time_attr], store.num_edges)
    if bool(nodes) == bool(edges):
        found = [*nodes, *edges] or "none"
        raise ValueError(
            f"time_attr: got {time_attr!r}, which {found} hold, expected an attribute of nodes or "
            "of edges, not of both"
        )
    dtypes = {times.dtype for times in [*nodes.values(), *edges.values()]}
    if len(dtypes) > 1:
        raise ValueError(
            f"time_attr: got {time_attr!r} of integers and of floats, expected one of both"
        )
    return nodes, edges
