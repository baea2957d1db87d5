"""What the router of a graph layer sees: a node, its neighbors, or its degree.

Shapes: T tokens (destinations), D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from gmoe._checks import check, check_choice
from gmoe.conv.call import Call
from gmoe.routers import Router, RouterLike
from gmoe.start import Start

RouterPart: TypeAlias = Literal["node", "neighbors", "degree"]
RouterInput: TypeAlias = RouterPart | Sequence[RouterPart]
"""``"node"``, ``"neighbors"``, ``"degree"`` (log(1 + in-degree)), or several."""


def router_parts(
    router_input: RouterInput | None,
    start: Start,
    router: RouterLike | None,
    is_shared: bool = False,
) -> tuple[RouterPart, ...]:
    """The parts of what the router of a layer sees, in a fixed order.

    Args:
        router_input: what the caller said. ``None`` is the node and its neighbors for a router that
            decides for copies in one layer: of these, it was the safer one in the study of starts.
            Beside a shared expert, and for an instance, whose width is given, it is the node.
        start: of the layer.
        router: of the layer, ``None`` if it has none.
        is_shared: the router decides for all layers of a model, not for one: then ``None`` is the
            node.

    Raises:
        ValueError: an unknown part, or none.
    """
    if router_input is None:
        is_built_here = router is not None and not isinstance(router, Router)
        sees_both = start == "copies" and is_built_here and not is_shared
        return ("node", "neighbors") if sees_both else ("node",)
    is_several = isinstance(router_input, list | tuple | set)
    named = tuple(router_input) if is_several else (router_input,)
    for name in named:
        check_choice("router_input", name, RouterPart)
    check(named, "router_input", "nothing", "one or several of 'node', 'neighbors', 'degree'")
    return tuple(part for part in get_args(RouterPart) if part in named)


def router_width(parts: Sequence[RouterPart], node: int, neighbors: int) -> int:
    """The number of columns of :func:`router_features`.

    Args:
        parts: what the router sees.
        node: width of the nodes.
        neighbors: width of their neighbors' aggregate.
    """
    widths = {"node": node, "neighbors": neighbors, "degree": 1}
    return sum(widths[part] for part in parts)


def router_features(parts: Sequence[RouterPart], call: Call) -> Tensor:
    """(T, dim) the parts side by side.

    Args:
        parts: what the router sees.
        call: the nodes and their graph. Neighbors are its aggregate or, if it has none, the mean
            over in-edges.
    """
    x_dst = call.x_dst
    columns: dict[str, Any] = {"node": x_dst, "neighbors": call.aggregate}
    if "neighbors" in parts and call.aggregate is None:
        columns["neighbors"] = call.graph.mean(call.x_src)
    if "degree" in parts:
        wide = torch.promote_types(x_dst.dtype, torch.float32)  # for more than 65,504 in-edges
        degree_T = call.graph.adjacency.degree(wide).to(x_dst.device)
        columns["degree"] = degree_T.log1p()[:, None].to(x_dst.dtype)
    if len(parts) == 1:
        return columns[parts[0]]
    return torch.cat([columns[part] for part in parts], dim=-1)
