"""What the router of a graph sees of each node. Shapes: T tokens (destinations), D width."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from gmoe._checks import check_choice
from gmoe.conv.experts import ConvExperts
from gmoe.conv.graph import Graph

RoutePart: TypeAlias = Literal["input", "aggregate", "degree"]
RouteOn: TypeAlias = RoutePart | Literal["both"] | Sequence[RoutePart | Literal["both"]]
"""``"input"``, ``"aggregate"``, ``"degree"`` (log(1 + in-degree)), ``"both"`` of the first two, or several."""


def route_parts(route_on: RouteOn) -> tuple[RoutePart, ...]:
    """The parts of what the router sees, in a fixed order.

    Raises:
        ValueError: an unknown part, or none.
    """
    named = (route_on,) if isinstance(route_on, str) else tuple(route_on)
    for name in named:
        check_choice("route_on", name, ("input", "aggregate", "both", "degree"))
    if not named:
        raise ValueError("route_on: got nothing, expected one or several of input, aggregate, both, degree")
    order: tuple[RoutePart, ...] = ("input", "aggregate", "degree")
    return tuple(part for part in order if part in named or (part != "degree" and "both" in named))


def seen(parts: Sequence[RoutePart], x_dst: Tensor, aggregate: Tensor | None, graph: Graph) -> Tensor:
    """(T, dim) the parts side by side."""
    return join(columns_of(parts, x_dst, aggregate, graph))


def join(columns: Sequence[Tensor]) -> Tensor:
    """The columns side by side."""
    return columns[0] if len(columns) == 1 else torch.cat(list(columns), dim=-1)


def columns_of(parts: Sequence[RoutePart], x_dst: Tensor, aggregate: Tensor | None, graph: Graph) -> list[Tensor]:
    """Each part, (T, its width)."""
    columns = []
    for part in parts:
        if part == "input":
            columns.append(x_dst)
        elif part == "aggregate":
            assert aggregate is not None
            columns.append(aggregate)
        else:
            columns.append(graph.log_degree.to(x_dst.dtype))
    return columns


@contextmanager
def joined(columns: Sequence[Tensor]) -> Iterator[Tensor]:
    """The columns side by side; what autograd would keep of that inside the block is joined anew in the backward pass,
    since the columns are kept anyway."""
    view = join(columns)
    if len(columns) == 1 or torch.compiler.is_compiling():
        yield view
        return
    versions = [column._version for column in columns]
    identity = (view.data_ptr(), view.shape, view.dtype)  # not the view, which the hooks would keep alive

    def pack(kept: Tensor) -> tuple[Tensor, int] | None:
        same = (kept.data_ptr(), kept.shape, kept.dtype) == identity
        return None if same else (kept.detach(), kept._version)  # an output of its own node would keep that node alive

    def unpack(packed: tuple[Tensor, int] | None) -> Tensor:
        if packed is not None:
            kept, version = packed
            if kept._version != version:  # which torch checks of what it keeps itself
                raise RuntimeError(
                    f"a tensor of shape {tuple(kept.shape)} that the router needs for its gradient was changed in place"
                )
            return kept
        if versions != [column._version for column in columns]:
            raise RuntimeError("x: changed in place after a router saw it, expected unchanged until the backward pass")
        return join([column.detach() for column in columns])

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield view


def aggregate_width(experts: ConvExperts, in_channels: int) -> int:
    """Width of the aggregate, which several aggregations side by side widen."""
    x = torch.zeros(1, in_channels)
    graph = Graph(torch.zeros(2, 1, dtype=torch.long), 1, 1, {})
    aggregate = copy.deepcopy(experts).aggregate(x, graph)  # a copy, since some convs cache their first graph
    return in_channels if aggregate is None else aggregate.size(1)
