"""Kinds of convs: their names, how each is built, and what a layer of experts checks of them.

:mod:`gmoe.conv.build` runs their experts.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from torch import nn
from torch.nn.parameter import is_lazy
from torch_geometric import nn as pyg
from torch_geometric.nn import MessagePassing

from gmoe._checks import check_choice, check_counts, nearest
from gmoe.conv import aggregate, attention
from gmoe.conv.aggregate import FilterConv, MLPConv
from gmoe.conv.base import StackedExperts
from gmoe.moe import refuse_removed
from gmoe.routers import ROUTERS

ConvFactory: TypeAlias = Callable[..., MessagePassing]
"""Called as ``conv(in_channels, out_channels, *conv_args, **conv_kwargs)``."""

ConvLike: TypeAlias = str | ConvFactory | Sequence[str | ConvFactory]
"""A name such as ``"gcn"``, a conv class, a factory, or a list with one per expert."""

CONVS: dict[str, type[MessagePassing]] = {
    name.removesuffix("Conv").lower(): getattr(pyg.conv, name)
    for name in pyg.conv.classes
    if name.endswith("Conv")
}
"""PyG's convs by the name without ``Conv``, in lower case: ``"gcn"``, ``"sage"``, ``"gatv2"``."""

OWN: dict[str, ConvFactory] = {
    "mlp": MLPConv,
    "filter": FilterConv,
    "identity": partial(FilterConv, filter="identity"),
    "low_pass": FilterConv,
    "high_pass": partial(FilterConv, filter="high_pass"),
    "two_hop": partial(FilterConv, hops=2),
}
"""gmoe's own convs by name."""

STACKS: dict[type[MessagePassing], type[StackedExperts]] = {
    FilterConv: aggregate.FilterExperts,
    MLPConv: aggregate.MLPConvExperts,
    pyg.GATConv: attention.GATExperts,
    pyg.GATv2Conv: attention.GATv2Experts,
    pyg.GCNConv: aggregate.GCNExperts,
    pyg.GINConv: aggregate.GINExperts,
    pyg.GINEConv: aggregate.GINEExperts,
    pyg.GraphConv: aggregate.GraphConvExperts,
    pyg.SAGEConv: aggregate.SAGEExperts,
    pyg.TransformerConv: attention.TransformerExperts,
}
"""How the experts of a class are stacked. By exact type: a subclass may compute something else.

To add a kind, list it here or, if it cannot be stacked, in :data:`LOCAL`. A kind that is not PyG's
gets a name in :data:`OWN`; one that is not built as ``(in_channels, out_channels)`` is listed in
:data:`ADAPTED`, and one that takes two widths without destinations in :data:`SOURCES_ALONE`.
"""

LOCAL = frozenset(
    [
        MLPConv,
        pyg.CGConv,
        pyg.ClusterGCNConv,
        pyg.FeaStConv,
        pyg.FiLMConv,
        pyg.GATConv,
        pyg.GATv2Conv,
        pyg.GeneralConv,
        pyg.GINConv,
        pyg.GINEConv,
        pyg.GraphConv,
        pyg.LEConv,
        pyg.MFConv,
        pyg.PNAConv,
        pyg.ResGatedGraphConv,
        pyg.SAGEConv,
        pyg.SimpleConv,
        pyg.TransformerConv,
    ]
)
"""Classes whose output at a node depends only on its in-edges and their ends, under most options.

Each layer verifies it all the same when it is built.
"""

SOURCES_ALONE = frozenset([pyg.SAGEConv, pyg.GraphConv, pyg.GINConv, pyg.GINEConv, pyg.GATConv])
"""Classes that take destinations without features, as if these were zeros."""

ADAPTED = (pyg.GINConv, pyg.GINEConv, pyg.CGConv, pyg.SimpleConv)
"""Classes that are not built as ``(in_channels, out_channels)``, but get a factory that is."""

OWN_NETWORK = (
    "pass a factory, such as conv=lambda i, o: GINConv(network(i, o)), that makes a network for "
    "each expert"
)
"""How to give GIN and GINE another network."""

OPTIONS = (
    "num_experts",
    "router",
    "k",
    "router_input",
    "start",
    "shared_transform",
    "router_kwargs",
    "local",
    "backend",
    "check_finite",
)
"""The keyword arguments of a :class:`gmoe.MoEConv`, suggested if one is mistyped."""

KINDS = "a name, a class of PyG's convs, a factory, or a list of those"
"""Legal values of ``conv``."""


def _adapted(
    cls: ConvFactory, in_channels: Any, out_channels: int, *args: Any, **kwargs: Any
) -> MessagePassing:
    """Build one of :data:`ADAPTED` from two widths.

    GIN and GINE get the two-layer MLP of PyG's ``GIN`` model; the others keep the width.
    """
    widths = [in_channels] if isinstance(in_channels, int) else list(in_channels)
    if cls is pyg.GINConv or cls is pyg.GINEConv:
        if "nn" in kwargs or any(isinstance(arg, nn.Module) for arg in args):
            raise ValueError(
                "nn: got a network, expected nothing: omit it for a two-layer MLP; or "
                f"{OWN_NETWORK}"
            )
        network = pyg.MLP([widths[0], out_channels, out_channels], norm=None)
        return cls(network, *args, **kwargs)
    if set(widths) != {out_channels}:
        raise ValueError(
            f"out_channels: got {out_channels} for {name_of(cls)}, expected "
            f"in_channels={in_channels}"
        )
    if cls is pyg.SimpleConv:  # it has no parameters, and takes no width
        return cls(*args, **kwargs)
    return cls(in_channels, *args, **kwargs)


@dataclass(frozen=True)
class Make:
    """Makes the conv of an expert.

    A class, not a closure, so that layers can be pickled.

    Args:
        kinds: the kind of each expert.
        in_channels: one width, or those of sources and destinations.
        out_channels: width of the output.
        args: further arguments of each conv by position.
        kwargs: further arguments of each conv by name.

    Raises:
        ValueError: at a call: widths or other arguments that the conv does not take, or a module
            that is not a MessagePassing layer.
    """

    kinds: Sequence[str | ConvFactory]
    in_channels: Any
    out_channels: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self, expert: int) -> MessagePassing:
        factory = factory_of(self.kinds[expert])
        name = name_of(factory)
        parameters = inspect.signature(factory).parameters
        is_one_width = isinstance(self.in_channels, int)
        if not is_one_width and class_of(factory) in (pyg.GCNConv, FilterConv):
            raise ValueError(
                f"in_channels: got {self.in_channels} for {name}, expected one width: it takes no "
                "bipartite input (SAGEConv and GraphConv do)"
            )
        # A copy: the convs must not share a module among the arguments.
        args, kwargs = copy.deepcopy((self.args, self.kwargs))
        args = (self.in_channels, self.out_channels, *args)
        for option, value in [*zip(parameters, args, strict=False), *kwargs.items()]:
            is_flag = option in parameters and parameters[option].annotation in (bool, "bool")
            if is_flag and type(value) is int:
                # A number by position was most likely meant for num_experts.
                raise ValueError(
                    f"{option}: got {value}, expected True or False; num_experts is given by name, "
                    f"num_experts={value}"
                )
        for option, value in kwargs.items():
            _check_option(option, value, factory)
        try:
            conv = factory(*args, **kwargs)
        except (TypeError, AttributeError, AssertionError) as error:
            expected = "the rest of its arguments, or a factory (in_channels, out_channels) -> conv"
            if "metadata" in parameters or factory is pyg.HeteroConv:
                expected = "gmoe.HeteroMoEConv for nodes of several types"
            raise ValueError(
                f"conv: got {name}, which cannot be built as conv({args[0]}, {args[1]}, ...) "
                f"({error}); expected {expected}"
            ) from error
        _check_forward(conv)
        return conv


def _check_option(option: str, value: object, factory: ConvFactory) -> None:
    """Refuse a keyword argument that, by their signatures, neither layer nor conv has."""
    refuse_removed([option])
    parameters = inspect.signature(factory).parameters
    names = set(parameters)
    cls = class_of(factory)
    if issubclass(cls, MessagePassing):
        # The classes pass what they do not know on to their bases.
        names |= {name for base in cls.__mro__ for name in inspect.signature(base).parameters}
    if option in names:
        return
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if takes_any and not of_pyg(cls):  # a user's factory may take anything
        return
    if any(option in inspect.signature(router).parameters for router in ROUTERS.values()):
        hint = f"; a router's options are given as router_kwargs={{{option!r}: ...}}"
    else:
        hint = nearest(option, (*sorted(names), *OPTIONS))
    raise ValueError(
        f"{option}: got {value!r}, expected an argument of MoEConv or of {name_of(factory)}{hint}"
    )


def _check_forward(conv: Any) -> None:
    """Refuse a module that needs more than nodes, edges, edge weights and edge features."""
    name = type(conv).__name__
    if not isinstance(conv, MessagePassing):
        raise ValueError(
            f"conv: got a factory of {name}, expected one of PyG's MessagePassing layers"
        )
    if any(map(is_lazy, conv.parameters())):
        raise ValueError(f"conv: got {name} of open widths, expected those that factories get")
    parameters = inspect.signature(conv.forward).parameters
    first = list(parameters)[:2]
    others = list(parameters.values())[2:]
    # Users may name the first two as they like.
    has_nodes_and_edges = len(first) == 2 and not of_pyg(type(conv))
    has_nodes_and_edges = has_nodes_and_edges or first == ["x", "edge_index"]
    required = {
        p.name for p in others if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty
    }
    # FiLM reads no edge types if it has a single relation, but RGCN and RGAT do.
    has_relations = isinstance(conv, pyg.RGCNConv | pyg.RGATConv)
    has_relations = has_relations or getattr(conv, "num_relations", 1) > 1
    is_typed = "edge_type" in parameters and has_relations
    if has_nodes_and_edges and not is_typed and required <= {"edge_weight", "edge_attr"}:
        return
    expected = "one of (x, edge_index, edge_weight or edge_attr)"
    if is_typed or "x_dict" in parameters:
        expected = "gmoe.HeteroMoEConv for several types of nodes or relations"
    raise ValueError(
        f"conv: got {name}, whose forward takes ({', '.join(parameters)}), expected {expected}"
    )


def of_pyg(code: Any) -> bool:
    """True for a class or function of PyG."""
    return str(getattr(code, "__module__", "")).startswith("torch_geometric.")


def unwrapped(factory: Any) -> Any:
    """The class or function inside partials."""
    while isinstance(factory, partial):
        factory = factory.args[0] if factory.func is _adapted else factory.func
    return factory


def name_of(factory: Any) -> str:
    """The name of a class or function, wrapped in partials or not."""
    inner = unwrapped(factory)
    return str(getattr(inner, "__name__", type(inner).__name__))


def class_of(factory: Any) -> type:
    """The class that a factory is, wrapped in partials or not; ``object`` for a function."""
    inner = unwrapped(factory)
    return inner if isinstance(inner, type) else object


def factory_of(conv: str | ConvFactory) -> ConvFactory:
    """A factory ``(in_channels, out_channels, *args, **kwargs) -> conv`` from a name or class.

    A factory is returned as it is.

    Raises:
        ValueError: an unknown name; an instance; a class of PyG whose first two arguments are not
            widths.
    """
    if isinstance(conv, str):
        conv = _by_name(conv)
    if isinstance(conv, nn.Module):
        name = type(conv).__name__
        raise ValueError(
            f"conv: got an instance of {name}, expected the class, {name}, or a factory "
            "(in_channels, out_channels) -> conv that makes a new one for each expert"
        )
    if not callable(conv):
        raise ValueError(f"conv: got {conv!r}, expected {KINDS}")
    cls: Any = conv
    options: dict[str, Any] = {}
    if isinstance(conv, partial) and not conv.args:
        cls = conv.func
        options = conv.keywords
    if cls in ADAPTED:
        return partial(_adapted, cls, **options)
    if isinstance(cls, type) and issubclass(cls, MessagePassing) and of_pyg(cls):
        first = list(inspect.signature(cls).parameters)[:2]
        if first != ["in_channels", "out_channels"]:
            raise ValueError(
                f"conv: got {cls.__name__}, which is built with ({', '.join(first)}), expected a "
                "class built with (in_channels, out_channels), or a factory of those"
            )
    return conv


def _by_name(name: str) -> ConvFactory:
    """The conv of a name; case, underscores and a ``Conv`` at the end do not matter.

    Raises:
        ValueError: an unknown name.
    """
    factories = {known.replace("_", ""): factory for known, factory in (CONVS | OWN).items()}
    plain = name.lower().replace("_", "").removesuffix("conv")
    if plain not in factories:
        check_choice("conv", name, sorted([*CONVS, *OWN]))
    return factories[plain]


def kinds_of(conv: Any, num_experts: int | None) -> list[str | ConvFactory]:
    """The kind of each expert: a single kind for all of them (by default 8), or a list.

    Raises:
        ValueError: no kind, or a list of another length than ``num_experts``.
    """
    if num_experts is not None:
        check_counts(num_experts=num_experts)
    if isinstance(conv, str) or callable(conv):
        return [conv] * (8 if num_experts is None else num_experts)
    if not isinstance(conv, Sequence) or not conv:
        raise ValueError(f"conv: got {conv!r}, expected {KINDS}")
    if num_experts not in (None, len(conv)):
        raise ValueError(
            f"conv: got a list of {len(conv)} convs, expected num_experts={num_experts}"
        )
    return list(conv)


@dataclass(frozen=True)
class CopyOf:
    """A factory of copies of one conv, whatever widths it is called with."""

    conv: MessagePassing

    def __call__(self, in_channels: Any, out_channels: int) -> MessagePassing:
        return copy.deepcopy(self.conv)
