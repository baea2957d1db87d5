"""Is a conv local? Run it on the in-edges of a few destinations, and compare with the whole graph."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch_geometric.nn import GINEConv, MessagePassing

from gmoe.conv.experts import without_dropout
from gmoe.conv.graph import Graph
from gmoe.conv.separate import run_on_all, run_on_destinations

NODES, EDGES = 14, 60


@torch.no_grad()
def is_local(conv: MessagePassing, in_channels: int | tuple[int, int]) -> bool:
    """Whether the conv's output at a node follows from the node's in-edges and their ends alone.

    A float64 copy without dropout, in training mode (so that batch norm shows), on a random graph with self-loops,
    parallel edges and isolated nodes, for several sets of destinations.

    Raises:
        Exception: whatever the conv raises on such a graph.
    """
    with torch.device("cpu"):
        return _is_local(without_dropout(conv).cpu(), in_channels)


def _is_local(probe: Any, in_channels: int | tuple[int, int]) -> bool:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=generator) + 0.1

    edge_index = torch.randint(NODES - 2, (2, EDGES), generator=generator)  # the last two nodes are isolated
    edge_index[:, :3] = torch.tensor([[0, 1, 1], [0, 2, 2]])
    takes = inspect.signature(probe.forward).parameters
    edge_args = {}
    if "edge_weight" in takes:
        edge_args["edge_weight"] = random(EDGES)
    edge_dim = getattr(probe, "edge_dim", None) or getattr(probe, "dim", None)
    if isinstance(probe, GINEConv):
        edge_dim = in_channels if probe.lin is None else probe.lin.in_channels
    if "edge_attr" in takes and isinstance(edge_dim, int) and edge_dim > 0:
        edge_args["edge_attr"] = random(EDGES, edge_dim)
    if isinstance(in_channels, int):
        x_src = x_dst = random(NODES, in_channels)
    else:
        x_src, x_dst = random(NODES, in_channels[0]), random(NODES, in_channels[1])
    graph = Graph(edge_index, NODES, NODES, edge_args, probe.flow)
    for size in (1, 4, 9):
        token = torch.randperm(NODES, generator=generator)[:size].sort().values
        near = run_on_destinations(probe, x_src, x_dst, graph, token)
        if not torch.allclose(near, run_on_all(probe, x_src, x_dst, graph, token), atol=1e-9):
            return False
    return True
