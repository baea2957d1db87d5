"""Plain convs on a :class:`gmoe.Graph`, on the whole of it or on a part.

Shapes: T tokens (destinations), n of them in a part, S sources, D in, O out width.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from gmoe.conv.base import Conv
from gmoe.conv.graph import Graph


def run(conv: Conv, graph: Graph, x_src: Tensor, x_dst: Tensor) -> Tensor:
    """(T, O) PyG's conv on a graph."""
    x = (x_src, x_dst) if _are_two(graph, x_src, x_dst) else x_src
    return conv(x, graph.adj, **graph.args_for(conv))[: graph.num_dst]


def run_on(conv: Conv, graph: Graph, x_src: Tensor, x_dst: Tensor, token: Tensor) -> Tensor:
    """(n, O) PyG's conv on the in-edges of ``token`` only.

    The destinations come first among the nodes of the part.
    """
    nodes, part = graph.part(token)
    x: Any = x_src.index_select(0, nodes)
    if _are_two(graph, x_src, x_dst):
        is_aligned = graph.num_src == graph.num_rows
        destinations = nodes if is_aligned else part.destinations
        assert destinations is not None  # a part has them
        x = (x, x_dst.index_select(0, destinations))
    return conv(x, part.adj, **part.args_for(conv))[: token.numel()]


def _are_two(graph: Graph, x_src: Tensor, x_dst: Tensor) -> bool:
    """True if destinations have features of their own; False if they are the first sources."""
    return x_src is not x_dst and graph.num_rows == graph.num_dst


# convs that need the norms of the whole graph -----------------------------------------------------


def run_filter(conv: Conv, x: Tensor, graph: Graph) -> Tensor:
    """(T, O) a FilterConv without experts: it reads the norms from the graph itself."""
    return conv(x, graph)[: graph.num_dst]


def run_gcn(conv: Conv, x: Tensor, graph: Graph) -> Tensor:
    """(T, O) a GCN without experts.

    PyG's conv gets its norms ready-made on a part of a graph, where they are those of the whole
    graph; off the CPU, where PyG would wait for the number of loops; and in an exported model,
    whose sizes cannot follow the data. In the last two cases not under an explainer, which counts
    the edges that PyG's conv is given.
    """
    is_part = graph.scale_of is not None
    must_not_count = x.device.type != "cpu" or torch.compiler.is_exporting()
    gets_norms = is_part or (must_not_count and not conv.explain)
    if not (conv.normalize and gets_norms):
        return run(conv, graph, x, x)
    matrix = graph.normalized(improved=conv.improved, loops=conv.add_self_loops, dtype=x.dtype)
    edge_index = torch.stack([matrix.edges.sender, matrix.edges.receiver])
    edge_weight = matrix.weight
    if matrix.diagonal is not None:  # the self-loops, which the matrix holds apart
        node = torch.arange(graph.num_dst, device=x.device)
        edge_index = torch.cat([edge_index, node.expand(2, -1)], dim=1)
        edge_weight = torch.cat([edge_weight, matrix.diagonal])
    normless = copy.copy(conv)  # a copy, since another thread may be running the conv itself
    normless.flow = "source_to_target"
    normless.normalize = False
    return normless(x, edge_index, edge_weight)[: graph.num_dst]
