"""The arguments of a graph layer and of its calls: how they are read, and what is refused."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric import EdgeIndex
from torch_geometric.nn import MessagePassing
from torch_geometric.typing import Adj
from torch_geometric.utils import is_sparse

from gmoe._checks import check_counts, nearest, parameters_of
from gmoe.conv.call import Call
from gmoe.conv.graph import Graph
from gmoe.conv.kinds import OWN_NETWORK, ConvFactory, factory_of, kind_of


def given_widths(
    kinds: Iterable[str | ConvFactory],
    in_channels: object,
    out_channels: object,
    conv_kwargs: Mapping[str, object],
) -> tuple[Any, Any]:
    """Return the widths of a layer, or say what is missing and what may have been meant.

    Args:
        kinds: the kind of each expert.
        in_channels: of the layer; ``None`` if it was not given.
        out_channels: likewise.
        conv_kwargs: the arguments of the convs.

    Raises:
        ValueError: an instance for a kind; a network, or nothing, for a width.
    """
    for kind in {id(kind): kind for kind in kinds}.values():  # each once, however many experts
        factory_of(kind)  # says what to give in place of an instance
    networks = [name for name, value in conv_kwargs.items() if isinstance(value, nn.Module)]
    for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
        if isinstance(value, nn.Module):
            got = type(value).__name__
            raise ValueError(f"{name}: got a {got}, expected a whole number; {OWN_NETWORK}")
        if value is None:
            hint = f", beside {networks[0]}; {OWN_NETWORK}" if networks else ""
            raise ValueError(f"{name}: got nothing, expected a whole number{hint}")
    return in_channels, out_channels


def two_widths(in_channels: object) -> tuple[int, int]:
    """The widths of sources and destinations; -1 is an open width.

    Raises:
        ValueError: neither a whole number nor two of them.
    """
    widths: Any = (in_channels, in_channels) if isinstance(in_channels, Integral) else in_channels
    if not isinstance(widths, tuple | list) or len(widths) != 2:
        raise ValueError(
            f"in_channels: got {in_channels!r}, expected a whole number, or two of them"
        )
    for width in widths:
        if width != -1:
            check_counts(in_channels=width)
    return int(widths[0]), int(widths[1])


# calls --------------------------------------------------------------------------------------------


def read_call(
    layer: Any,
    x: Any,
    edge_index: Adj | Graph,
    edge_args: Sequence[Any],
    given: Mapping[str, Any],
    unknown: Mapping[str, object],
) -> Call:
    """Read a call of a layer in any of the forms that PyG's convs take.

    Args:
        layer: a :class:`gmoe.MoEConv`, which was called with the rest.
        edge_args: the arguments behind ``edge_index`` that came by position.
        given: those that came by name, ``None`` for those that did not.
        unknown: arguments by name that the layer does not have.

    Raises:
        ValueError: arguments that do not fit the layer, its convs, or each other.
    """
    # 1. The arguments, by name.
    if unknown:
        refuse_unknown_in_call(layer, layer.all_convs(), unknown)
    if edge_args:
        given = with_those_by_position(layer.experts.convs(), edge_args, given)
    edge_weight, edge_attr, size = (given[name] for name in ("edge_weight", "edge_attr", "size"))

    # 2. The nodes: one set, each a source and a destination; or two.
    if isinstance(x, Tensor):
        x_src = x_dst = x
    else:
        x_src, x_dst = _two_sets(layer, x, edge_index, size)
    layer.check_nodes(x_src, x_dst)

    # 3. The graph.
    sizes = x_src.size(0), x_dst.size(0)
    _check_args(layer, sizes, size, edge_weight=edge_weight, edge_attr=edge_attr)
    graph = Graph.of_call(edge_index, sizes, edge_weight, edge_attr, flow=layer.flow)
    if graph.num_dst < sizes[1]:
        # A part of a larger graph: the last of its nodes are sources only.
        x_dst = x_src[: graph.num_dst]
    if layer.explain:
        graph = graph.explained(layer)
    return Call(graph, x_src, x_dst)


def side_by_side(
    layer: Any,
    x: Tensor,
    edge_index: Adj | Graph,
    edge_args: Sequence[Any],
    options: Mapping[str, Any],
) -> Any:
    """Call a layer on B graphs with the same edges, as PyG's static graphs: as on one graph.

    Args:
        x: (B, N, D) the nodes of each.
        edge_args: of the call behind the edges, by position.
        options: of the call, by name.

    Returns:
        (B, N, O), and what else the layer returns of B * N nodes.

    Raises:
        ValueError: edges in a matrix; a ``batch``, since each graph is a group.
    """
    num_graphs, num_nodes, _ = x.shape
    given = dict(options)
    adj = edge_index.adj if isinstance(edge_index, Graph) else edge_index
    refused = {"edge_index": adj if is_sparse(adj) else None, "batch": given["batch"]}
    for name, value in refused.items():
        if value is not None:
            raise ValueError(
                f"{name}: got a {type(value).__name__} with x of shape {tuple(x.shape)}, expected "
                "edges of shape (2, number of edges) and no batch, for graphs side by side"
            )
    graph = Graph.of_call(edge_index, num_nodes, flow=layer.flow)
    for name in ("edge_weight", "edge_attr"):
        given[name] = getattr(graph, name) if given[name] is None else given[name]

    def repeated(value: Any) -> Any:
        """What there is for each edge, for each graph."""
        return torch.cat([value] * num_graphs) if isinstance(value, Tensor) else value

    first = torch.arange(num_graphs, device=x.device) * num_nodes
    edges = graph.adj.as_tensor() if isinstance(graph.adj, EdgeIndex) else graph.adj
    edges = (edges[:, None] + first[:, None]).flatten(1)
    for name in ("edge_weight", "edge_attr"):
        given[name] = repeated(given[name])
    given["batch"] = torch.arange(num_graphs, device=x.device).repeat_interleave(num_nodes)
    out = layer.forward(x.flatten(0, 1), edges, *map(repeated, edge_args), **given)
    y, *others = out if isinstance(out, tuple) else (out,)
    y = y.unflatten(0, (num_graphs, num_nodes))
    return (y, *others) if others else y


def _two_sets(
    layer: Any, x: Any, edge_index: Adj | Graph, size: tuple[int, int] | None
) -> tuple[Tensor, Tensor]:
    """Source and destination nodes of a bipartite call.

    Destinations without features become zeros, which add nothing to the output.
    """
    pair = tuple(x) if isinstance(x, tuple | list) else ()
    are_tensors = len(pair) == 2 and isinstance(pair[0], Tensor)
    if not are_tensors or not isinstance(pair[1], Tensor | None):
        got = [type(nodes).__name__ for nodes in pair] or type(x).__name__
        raise ValueError(
            f"x: got {got}, expected a tensor, or a tuple of source and destination nodes"
        )
    x_src, x_dst = pair
    if x_src is not x_dst:
        _refuse_two_sets(layer)
    if x_dst is not None:
        return x_src, x_dst
    readers = {
        type(conv).__name__ for conv in layer.all_convs() if kind_of(type(conv)).needs_destinations
    }
    if readers:
        raise ValueError(
            "x: got no destination nodes, expected source and destination nodes, since "
            f"{', '.join(sorted(readers))} reads them"
        )
    return x_src, x_src.new_zeros(num_destinations(edge_index, size), layer.widths[1])


def _refuse_two_sets(layer: Any) -> None:
    """Refuse bipartite input if the convs or their flow do not take it."""
    classes = dict.fromkeys(type(conv) for conv in layer.all_convs())
    takers = [(cls.__name__, kind_of(cls).takes_two_sets) for cls in classes]
    takers.append(("flow='target_to_source'", layer.flow == "source_to_target"))
    for name, takes_two_sets in takers:
        if not takes_two_sets:
            raise ValueError(
                "x: got a tuple of source and destination nodes, expected one tensor: "
                f"{name} takes no bipartite input"
            )


def _check_args(
    layer: Any,
    sizes: tuple[int, int],
    size: tuple[int, int] | None,
    **edge_args: Tensor | None,
) -> None:
    """Refuse a ``size`` or edge arguments that do not fit the nodes and the convs."""
    if size is not None and (not isinstance(size, Sequence) or tuple(size) != sizes):
        raise ValueError(
            f"size: got {size}, expected {sizes} source and destination nodes, as x has"
        )
    given = [name for name, value in edge_args.items() if value is not None]
    for name in given:
        taken = layer.edge_names
        if name not in taken:
            raise ValueError(
                f"{name}: got a tensor, expected None: the conv takes {sorted(taken) or 'none'}"
            )


def num_destinations(edge_index: Adj | Graph, size: tuple[int, int] | None) -> int:
    """The number of destinations of a call without destination nodes.

    Raises:
        ValueError: neither ``size`` nor the edges know it.
    """
    number = None
    if size is not None:
        number = size[1]
    elif isinstance(edge_index, Graph):
        number = edge_index.num_dst
    elif is_sparse(edge_index):
        number = edge_index.size(0)
    elif isinstance(edge_index, EdgeIndex):
        number = edge_index.sparse_size(1)
    if number is None:
        raise ValueError(
            f"size: got {size}, expected (sources, destinations), since x has no destination nodes"
        )
    return number


def with_those_by_position(
    convs: Iterable[MessagePassing], edge_args: Sequence[Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by name, with those behind the edges in the order of the conv's."""
    # The arguments of a conv after x and edge_index.
    orders = {parameters_of(conv)[2 : 2 + len(edge_args)] for conv in convs}
    order = next(iter(orders))
    expected = None
    if len(orders) > 1:
        expected = (
            "edge_weight= or edge_attr= by name, since the experts' convs disagree about their "
            "order"
        )
    elif len(order) < len(edge_args):
        expected = f"at most {len(order)}"
    if expected is not None:
        raise ValueError(
            f"forward: got {len(edge_args)} arguments behind edge_index, expected {expected}"
        )
    values = dict(given)
    for name, value in zip(order, edge_args, strict=True):
        if value is None:
            continue
        if name not in values or values[name] is not None:
            raise ValueError(
                f"{name}: got {type(value).__name__} by position, expected edge_weight, "
                "edge_attr or size, once"
            )
        values[name] = value
    return values


def refuse_unknown_in_call(
    layer: nn.Module, convs: Sequence[MessagePassing], unknown: Mapping[str, object]
) -> None:
    """Refuse an argument that the layer does not have, although some of its convs may.

    Code that calls such a conv may pass ``None``, which is as good as nothing.
    """
    names = inspect.signature(layer.forward).parameters
    legal = [name for name in names if name not in ("edge_args", "unknown")]
    for name, value in unknown.items():
        takers = {type(conv).__name__ for conv in convs if name in parameters_of(conv)}
        if takers and value is None:
            continue
        got = type(value).__name__ if isinstance(value, Tensor) else repr(value)
        if takers:
            taken_by = ", ".join(sorted(takers))
            hint = (
                f", since {taken_by} takes it but a layer of experts does not; ask layer.expert(e)"
            )
        else:
            hint = nearest(name, legal)
        raise ValueError(
            f"{name}: got {got}, expected one of the arguments {', '.join(legal)}{hint}"
        )
