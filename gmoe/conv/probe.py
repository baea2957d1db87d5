"""Is a conv local? Run it on the in-edges of a few destinations, and compare with the whole graph."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch_geometric.nn import GINEConv, MessagePassing

from gmoe.conv.experts import run_on_all, run_on_destinations, without_dropout
from gmoe.conv.graph import Graph

NODES, EDGES = 14, 60


@torch.no_grad()
def is_local(conv: MessagePassing, in_channels: int | tuple[int, int]) -> bool:
    """Whether the conv's output at a node follows from the node's in-edges and their ends alone.

    A float64 copy without dropout, in training mode (so that batch norm shows), on a random graph with self-loops,
    parallel edges and isolated nodes, for several sets of destinations.

    Raises:
        Exception: whatever the conv raises on such a graph.
    """
    probe: Any = without_dropout(conv)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=generator) + 0.1

    edge_index = torch.randint(NODES - 2, (2, EDGES), generator=generator)  # the last two nodes are isolated
    edge_index[:, :3] = torch.tensor([[0, 1, 1], [0, 2, 2]])
    takes = inspect.signature(conv.forward).parameters
    edge_args = {}
    if "edge_weight" in takes:
        edge_args["edge_weight"] = random(EDGES)
    edge_dim = getattr(conv, "edge_dim", None) or getattr(conv, "dim", None)
    if isinstance(conv, GINEConv):
        edge_dim = in_channels if conv.lin is None else conv.lin.in_channels
    if "edge_attr" in takes and isinstance(edge_dim, int) and edge_dim > 0:
        edge_args["edge_attr"] = random(EDGES, edge_dim)
    if isinstance(in_channels, int):
        x_src = x_dst = random(NODES, in_channels)
    else:
        x_src, x_dst = random(NODES, in_channels[0]), random(NODES, in_channels[1])
    graph = Graph(edge_index, NODES, NODES, edge_args, conv.flow)
    for size in (1, 4, 9):
        token = torch.randperm(NODES, generator=generator)[:size].sort().values
        near = run_on_destinations(probe, x_src, x_dst, graph, token)
        if not torch.allclose(near, run_on_all(probe, x_src, x_dst, graph, token), atol=1e-9):
            return False
    return True
