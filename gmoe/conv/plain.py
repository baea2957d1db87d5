"""Plain convs on a :class:`gmoe.Graph`, on the whole of it or on a part.

Shapes: T tokens (destinations), n of them in a part, S sources, D in, O out width.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch_geometric.nn import GCNConv

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


def _called_with(conv: Conv, changes: dict[str, Any], *inputs: Any) -> Tensor:
    """What a conv makes of inputs if some of its attributes were others."""
    if not torch.compiler.is_dynamo_compiling():
        other = copy.copy(conv)  # a copy, since another thread may be running the conv itself
        vars(other).update(changes)
        return other(*inputs)
    # Compiled code cannot copy a module. It sets attributes when it ends, to what they were.
    own = {name: getattr(conv, name) for name in changes}
    for name, value in changes.items():
        setattr(conv, name, value)
    try:
        return conv(*inputs)
    finally:
        for name, value in own.items():
            setattr(conv, name, value)


def _is_linear(conv: Conv) -> bool:
    """True if a conv is a linear layer and a sum, and nobody looks at its messages."""
    tables = [table for name, table in vars(conv).items() if name.endswith("_hooks")]
    is_own = "forward" in vars(conv) or any(tables) or conv.explain
    return type(conv) is GCNConv and conv.aggr in ("add", "sum") and not is_own


def run_gcn(conv: Conv, x: Tensor, graph: Graph) -> Tensor:
    """(T, O) a GCN without experts, with the norms of the graph, of a part those of the whole."""
    has_norms = conv.normalize and (
        _is_linear(conv) or isinstance(graph, Part) or _sizes_must_not_follow(conv, x)
    )
    if not has_norms:
        return run(conv, graph, x, x)
    matrix = graph.normalized(improved=conv.improved, loops=conv.add_self_loops, dtype=x.dtype)
    if _is_linear(conv):
        out = matrix.times(conv.lin(x))
        return out if conv.bias is None else out + conv.bias
    edges, weight = matrix.entries
    normless = {"flow": "source_to_target", "normalize": False}
    edge_index = torch.stack([edges.sender, edges.receiver])
    # Norms are not computed in half precision, messages are.
    return _called_with(conv, normless, x, edge_index, weight.to(x.dtype))[: graph.num_dst]


def run_gat(conv: Conv, x: Tensor, graph: Graph) -> Tensor:
    """(T, O) a GAT or GATv2 without experts.

    PyG's conv removes the loops that there are before it adds its own, so that the number of edges
    follows from the data. Where it must not, these loops move to one more node, from which no other
    gets messages.
    """
    moves_loops = conv.add_self_loops and graph.attr is None and _sizes_must_not_follow(conv, x)
    if not moves_loops:
        return run(conv, graph, x, x)
    num_nodes = x.size(0)
    sender, receiver = graph.edges.sender, graph.edges.receiver
    is_loop = sender == receiver
    ends = [torch.where(is_loop, num_nodes, end) for end in (sender, receiver)]
    node = torch.arange(num_nodes, device=x.device)
    edge_index = torch.cat([torch.stack(ends), node.expand(2, -1)], dim=1)
    loopless = {"flow": "source_to_target", "add_self_loops": False}
    return _called_with(conv, loopless, F.pad(x, (0, 0, 0, 1)), edge_index)[: graph.num_dst]
