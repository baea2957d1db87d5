"""How the layers of a GNN are built: their convs, with experts or plain, and a common router.

Shapes: D width, E experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch_geometric.nn import MessagePassing

from gmoe._checks import check
from gmoe.conv.build import Trial
from gmoe.conv.kinds import (
    OPTIONS,
    ConvFactory,
    ConvLike,
    Make,
    check_option,
    class_of,
    factory_of,
    is_of_library,
    kind_of,
    kinds_of,
)
from gmoe.conv.moe_conv import MoEConv
from gmoe.conv.router_input import router_width
from gmoe.moe import MoELayer, choose_blocks
from gmoe.routers import Router, RouterLike
from gmoe.start import (
    Start,
    build_layer_router,
    drawn_apart,
    resolved_start,
)


def are_stacked(kinds: Sequence[str | ConvFactory]) -> bool:
    """True if the experts of these kinds, or of the first, are stacked under most options."""
    return kind_of(class_of(factory_of(kinds[0]))).stack is not None


def start_of(
    kinds: Sequence[str | ConvFactory],
    router: RouterLike | None,
    k: int,
    shared_router: bool | None,
    is_stack: bool,
    options: Mapping[str, Any],
) -> Start:
    """How all layers start.

    ``None`` is copies only where one decision serves all layers and their experts are stacked, as
    MLPs and convs of some classes are, so that copies share a base: in the study of starts, copies
    were safe only there. An option may still keep a conv from being stacked; its copies then start
    as the dense layer, too.

    Args:
        kinds: the kind of each expert's conv.
        router, k, shared_router: as :class:`gmoe.GNNMoE` takes them.
        is_stack: the experts are stacked.
        options: what was said of ``start`` and ``router_kwargs``.
    """
    return resolved_start(
        options.get("start"),
        kinds,
        router=router if is_stack and shared_router is not False else None,
        k=k,
        router_kwargs=options.get("router_kwargs"),
    )


def layers_with_experts(
    router: RouterLike | None, shared_router: bool, num_hidden: int, every: int
) -> list[int]:
    """The numbers of the layers that have experts; the arguments are those of a model.

    Raises:
        ValueError: a router instance for several layers.
    """
    if router is None:
        return []
    chosen = choose_blocks(num_hidden, every)
    if isinstance(router, Router) and len(chosen) > 1 and not shared_router:
        raise ValueError("router: got an instance for several layers, expected a name or a factory")
    return chosen


def taken_from(
    conv_kwargs: dict[str, Any],
    kind: str | ConvFactory,
    owner: type,
    names: Iterable[str] = OPTIONS,
) -> dict[str, Any]:
    """Take the arguments of layers with experts away from those of convs.

    What is an argument of neither, nor of the model, is refused.

    Args:
        conv_kwargs: all of them; those of convs are left.
        kind: the kind of the convs; of several, the first: the layers check the others.
        owner: the model.
        names: of the arguments of layers with experts.
    """
    taken = {name: conv_kwargs.pop(name) for name in names if name in conv_kwargs}
    for option, value in conv_kwargs.items():
        own = inspect.signature(owner).parameters
        check_option(option, value, factory_of(kind), owner.__name__, own)
    return taken


def build_conv(
    conv: ConvLike,
    width: int,
    out: int,
    is_hidden: bool,
    moe_kwargs: Mapping[str, Any] | None,
    conv_kwargs: Mapping[str, Any],
    is_free: bool = False,
) -> MoEConv | MessagePassing:
    """Build the conv of a layer, with experts or plain.

    Args:
        conv: as :class:`GNNMoE` takes it: a kind of conv, or several.
        width: columns of the layer's input.
        out: columns of the layer's output.
        is_hidden: a hidden layer, whose heads are concatenated; the output layer averages them.
        moe_kwargs: arguments of :class:`MoEConv`; ``None`` for a plain conv.
        conv_kwargs: arguments of the convs.
        is_free: the conv may give any number of columns; by default it is refused unless it gives
            ``out``, or does not run on a small graph.
    """
    kinds = kinds_of(conv, None)
    if moe_kwargs is None:
        kinds = kinds[:1]  # of several kinds, the plain conv is of the first
    options = dict(conv_kwargs)
    out_channels = out  # what the conv is asked for: the columns of a single head, if concatenated
    heads, concat = _heads(kinds, options)
    if heads > 1 and "concat" in inspect.signature(factory_of(kinds[0])).parameters:
        options["concat"] = is_hidden and concat
        if options["concat"]:
            check(out % heads == 0, "hidden_channels", out, f"a multiple of heads={heads}")
            out_channels = out // heads
    built: Any
    if moe_kwargs is None:
        built = Make(kinds, width, out_channels, (), options)(0)
    else:
        built = MoEConv(conv, width, out_channels, **moe_kwargs, **options)
    columns = None if is_free else columns_of(built, width, kinds[0])
    if columns not in (None, out):
        name = type(built.experts.expert(0) if moe_kwargs is not None else built).__name__
        raise ValueError(
            f"conv: got {name}, which gives {columns} columns for out_channels={out_channels}, "
            f"expected {out}; of several heads, heads= as an argument of the model, or concat=False"
        )
    return built


def _heads(kinds: Sequence[str | ConvFactory], options: Mapping[str, Any]) -> tuple[int, bool]:
    """The number of heads, and whether they are concatenated: from arguments and from partials.

    One head for kinds that disagree: the layer's width is then not divided among heads.
    """
    settings = set()
    for kind in kinds:
        bound = kind.keywords if isinstance(kind, partial) else {}
        arguments = {**bound, **options}
        settings.add((arguments.get("heads", 1), arguments.get("concat", True)))
    return settings.pop() if len(settings) == 1 else (1, True)


def columns_of(conv: Any, width: int, kind: str | ConvFactory) -> int | None:
    """Columns that a conv gives, with experts or plain; ``None`` if it does not run.

    A conv that gmoe did not build itself is run on a small graph.

    Args:
        conv: the conv.
        width: columns of its input.
        kind: what it was built from.
    """
    if isinstance(conv, MoEConv):
        conv = conv.experts.expert(0)
    return Trial(conv, width, is_of_library(kind)).width


def take_costs(router: Router, parts: Iterable[nn.Module]) -> None:
    """Let layers with experts cost what their common router says: it is no part of them.

    Args:
        router: the common one.
        parts: the layers; those without experts are passed over.
    """
    for part in parts:
        if isinstance(part, MoELayer):
            part.take_costs(router)


def build_shared_router(
    router: RouterLike, in_channels: int, moe_kwargs: Mapping[str, Any]
) -> Router:
    """Build the router that decides for all layers, from the raw features."""
    dim = router_width(moe_kwargs["router_input"], in_channels, in_channels)
    with drawn_apart(moe_kwargs["start"] != "plain"):
        return build_router_of(router, dim, moe_kwargs)


def build_router_of(router: RouterLike, dim: int, moe_kwargs: Mapping[str, Any]) -> Router:
    """Build a router by the arguments of :class:`MoEConv`, for tokens of width ``dim``."""
    return build_layer_router(
        moe_kwargs["start"],
        router,
        dim,
        moe_kwargs["num_experts"],
        moe_kwargs["k"],
        moe_kwargs.get("router_kwargs"),
    )
