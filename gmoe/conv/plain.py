"""Plain convs on a :class:`gmoe.Graph`, on the whole of it or on a part.

Shapes: T tokens (destinations), n of them in a part, S sources, D in, O out width.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gmoe._checks import must_be_called
from gmoe._torch import untraced
from gmoe.conv.base import Conv
from gmoe.conv.graph import Graph, Part
from gmoe.portable import exported_as


def run(conv: Conv, graph: Graph, x_src: Tensor, x_dst: Tensor) -> Tensor:
    """(T, O) PyG's conv on a graph."""
    x = (x_src, x_dst) if are_two(graph, x_src, x_dst) else x_src
    return _called(conv, graph, x)[: graph.num_dst]


def run_on(conv: Conv, graph: Graph, x_src: Tensor, x_dst: Tensor, token: Tensor) -> Tensor:
    """(n, O) PyG's conv on the in-edges of ``token`` only.

    The destinations come first among the nodes of the part.
    """
    nodes, part = graph.part(token)
    x: Any = x_src.index_select(0, nodes)
    if are_two(graph, x_src, x_dst):
        is_aligned = graph.num_src == graph.num_rows
        destinations = nodes if is_aligned else part.destinations
        x = (x, x_dst.index_select(0, destinations))
    return _called(conv, part, x)[: token.numel()]


def _called(conv: Conv, graph: Graph, x: Any) -> Tensor:
    """What the conv makes of a graph's features."""
    if graph.is_sparse and torch.compiler.is_compiling():
        return _called_eagerly(conv, graph, x)
    return conv(x, graph.adj, **graph.args_for(conv))


@untraced  # torch's compiler fails on views of a sparse matrix inside of PyG's code
def _called_eagerly(conv: Conv, graph: Graph, x: Any) -> Tensor:
    return conv(x, graph.adj, **graph.args_for(conv))


def are_two(graph: Graph, x_src: Tensor, x_dst: Tensor) -> bool:
    """True if destinations have features of their own; False if they are the first sources."""
    return x_src is not x_dst and graph.num_rows == graph.num_dst


# convs that are run in a way of their own ---------------------------------------------------------


@exported_as(lambda conv, _: not conv.explain)
def _sizes_must_not_follow(conv: Conv, x: Tensor) -> bool:
    """True where no size may follow from the data, and PyG's conv has one that does.

    That is off the CPU, where the host would wait for the size, and in an exported model. Not under
    an explainer, which counts the edges that PyG's conv is given.
    """
    return x.device.type != "cpu" and not conv.explain


@exported_as(lambda: False)
def _is_compiled() -> bool:
    """True in compiled code: it cannot copy a conv, and ends a graph where a size follows."""
    return torch.compiler.is_compiling()


def run_gcn(conv: Conv, x: Tensor, graph: Graph) -> Tensor:
    """(T, O) a GCN without experts.

    PyG's conv gets its norms ready-made on a part of a graph, where they are those of the whole
    graph; and where PyG would count the loops that there are.
    """
    is_part = isinstance(graph, Part)
    gets_norms = is_part or _is_compiled() or _sizes_must_not_follow(conv, x)
    if not (conv.normalize and gets_norms):
        return run(conv, graph, x, x)
    matrix = graph.normalized(improved=conv.improved, loops=conv.add_self_loops, dtype=x.dtype)
    sender, receiver = matrix.edges.sender, matrix.edges.receiver
    edge_weight = matrix.weight
    if matrix.diagonal is not None:  # the self-loops, which the matrix holds apart
        node = torch.arange(graph.num_dst, device=x.device)
        sender, receiver = torch.cat([sender, node]), torch.cat([receiver, node])
        edge_weight = torch.cat([edge_weight, matrix.diagonal])
    # Norms are not computed in half precision, messages are.
    edge_weight = edge_weight.to(x.dtype)
    if must_be_called(conv):
        normless = copy.copy(conv)  # a copy, since another thread may be running the conv itself
        normless.flow = "source_to_target"
        normless.normalize = False
        return normless(x, torch.stack([sender, receiver]), edge_weight)[: graph.num_dst]
    # The conv's own steps: a copy cannot be made in compiled code.
    ends = (sender, receiver) if conv.flow == "source_to_target" else (receiver, sender)
    out = conv.propagate(torch.stack(ends), x=conv.lin(x), edge_weight=edge_weight)
    if conv.bias is not None:
        out = out + conv.bias
    return out[: graph.num_dst]


def run_gat(conv: Conv, x: Tensor, graph: Graph) -> Tensor:
    """(T, O) a GAT or GATv2 without experts.

    PyG's conv removes the loops that there are before it adds its own, so that the number of edges
    follows from the data. Where it must not, these loops move to one more node, from which no other
    gets messages.
    """
    moves_loops = conv.add_self_loops and graph.attr is None and _sizes_must_not_follow(conv, x)
    if not moves_loops or _is_compiled():
        return run(conv, graph, x, x)
    num_nodes = x.size(0)
    sender, receiver = graph.edges.sender, graph.edges.receiver
    is_loop = sender == receiver
    ends = [torch.where(is_loop, num_nodes, end) for end in (sender, receiver)]
    node = torch.arange(num_nodes, device=x.device)
    edge_index = torch.cat([torch.stack(ends), node.expand(2, -1)], dim=1)
    loopless = copy.copy(conv)  # a copy, since another thread may be running the conv itself
    loopless.flow = "source_to_target"
    loopless.add_self_loops = False
    return loopless(F.pad(x, (0, 0, 0, 1)), edge_index)[: graph.num_dst]
