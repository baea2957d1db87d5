"""Kinds of convs: what gmoe knows of each, their names, and how an expert's conv is made.

:mod:`gmoe.conv.build` decides by it how the experts of a layer run.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeAlias

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch_geometric import nn as pyg
from torch_geometric.nn import MessagePassing

from gmoe._checks import check, check_choice, check_counts, nearest, refuse_computed
from gmoe.conv import aggregate, attention
from gmoe.conv.base import StackedExperts
from gmoe.conv.graph import Graph
from gmoe.conv.plain import run_gat, run_gcn
from gmoe.routers import ROUTERS

ConvFactory: TypeAlias = Callable[..., MessagePassing]
"""Called as ``conv(in_channels, out_channels, *conv_args, **conv_kwargs)``."""

ConvLike: TypeAlias = str | ConvFactory | Sequence[str | ConvFactory]
"""A name such as ``"gcn"``, a conv class, a factory, or a list with one per expert."""

Widths: TypeAlias = int | tuple[int, int]
"""One input width, or those of sources and destinations."""

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
    "router_kwargs",
    "local",
)
"""The keyword arguments of a :class:`gmoe.MoEConv`, suggested if one is mistyped."""

OF_SEVERAL_TYPES = "a MoEConv for each relation in PyG's HeteroConv"
"""What takes the place of convs that read types of nodes or edges themselves."""
CONV_VALUES = "a name, a class of PyG's convs, a factory, or a list of those"
"""Legal values of ``conv``."""


# the table of kinds -------------------------------------------------------------------------------


def _edge_width(conv: MessagePassing, _: int) -> int | None:
    """The width of the edge features of most convs: an option of theirs."""
    return getattr(conv, "edge_dim", None) or getattr(conv, "dim", None)


@dataclass(frozen=True)
class Kind:
    """What gmoe knows of a class of convs. The defaults hold for a class that it does not know.

    Which of ``edge_weight`` and ``edge_attr`` a conv takes is read from its ``forward``.

    Args:
        stack: how the experts of the class are stacked; ``None`` to run them one by one.
        is_local: the output at a node depends only on its in-edges and their ends, under most
            options. A layer that runs convs one by one verifies it when it is built.
        takes_two_sets: sources and destinations may be two sets of nodes.
        needs_destinations: destinations must have features. Others take them for zeros.
        adapt: builds a conv of a class that is not built as ``cls(in_channels, out_channels, ...)``
            from these arguments, see :data:`ConvFactory`; called with the class before them.
        is_one_hop: the output at a node depends on its in-edges, their ends, and degrees of the
            whole graph. Of others, which are not local, a :class:`gmoe.conv.build.Trial` tells.
        run: runs a conv without experts on a graph or on a part of one, where it needs norms of the
            whole graph, or has sizes that follow the data; ``None`` for PyG's own forward.
        edge_width: the width of the edge features that a conv takes, or ``None`` if it takes none;
            called with the conv and the width of its sources.
        names: names beyond PyG's, each with the options that it stands for.
    """

    stack: type[StackedExperts] | None = None
    is_local: bool = False
    takes_two_sets: bool = True
    needs_destinations: bool = True
    adapt: ConvFactory | None = None
    is_one_hop: bool = False
    run: Callable[[MessagePassing, Tensor, Graph], Tensor] | None = None
    edge_width: Callable[[MessagePassing, int], int | None] = _edge_width
    names: Mapping[str, Mapping[str, object]] = field(default_factory=dict)


def _with_mlp(
    cls: ConvFactory, in_channels: Widths, out_channels: int, *args: object, **kwargs: object
) -> MessagePassing:
    """GIN and GINE get the two-layer MLP of PyG's ``GIN`` model."""
    has_network = "nn" in kwargs or any(isinstance(arg, nn.Module) for arg in args)
    legal = f"nothing: omit it for a two-layer MLP; or {OWN_NETWORK}"
    check(not has_network, "nn", "a network", legal)
    widths = (in_channels,) if isinstance(in_channels, int) else in_channels
    legal = f"one width: {name_of(cls)} adds nodes to their neighbors"
    check(len({*widths}) == 1, "in_channels", in_channels, legal)
    width = widths[0]
    network = pyg.MLP([width, out_channels, out_channels], norm=None)
    return cls(network, *args, **kwargs)


def _of_one_width(
    cls: ConvFactory, in_channels: Widths, out_channels: int, *args: object, **kwargs: object
) -> MessagePassing:
    """CG keeps the width of its input, and is built from that alone."""
    _check_same_width(cls, in_channels, out_channels)
    return cls(in_channels, *args, **kwargs)


def _of_no_width(
    cls: ConvFactory, in_channels: Widths, out_channels: int, *args: object, **kwargs: object
) -> MessagePassing:
    """SimpleConv keeps the width of its input, and has no parameters."""
    _check_same_width(cls, in_channels, out_channels)
    return cls(*args, **kwargs)


def _check_same_width(cls: ConvFactory, in_channels: Widths, out_channels: int) -> None:
    widths = {in_channels} if isinstance(in_channels, int) else set(in_channels)
    got = f"{out_channels} for {name_of(cls)}"
    check(widths == {out_channels}, "out_channels", got, f"in_channels={in_channels}")


def _gine_edge_width(conv: MessagePassing, source_width: int) -> int:
    """GINE adds edge features to those of sources, unless it transforms them."""
    return source_width if conv.lin is None else conv.lin.in_channels


KINDS: dict[type[MessagePassing], Kind] = {
    pyg.CGConv: Kind(is_local=True, adapt=_of_one_width),
    pyg.ClusterGCNConv: Kind(is_local=True, takes_two_sets=False),
    pyg.FeaStConv: Kind(is_local=True),
    pyg.FiLMConv: Kind(is_local=True),
    pyg.GATConv: Kind(
        stack=attention.GATExperts,
        is_local=True,
        needs_destinations=False,
        run=run_gat,
    ),
    pyg.GATv2Conv: Kind(stack=attention.GATv2Experts, is_local=True, run=run_gat),
    pyg.GCNConv: Kind(
        stack=aggregate.GCNExperts,
        takes_two_sets=False,
        is_one_hop=True,
        run=run_gcn,
    ),
    pyg.GeneralConv: Kind(is_local=True),
    pyg.GINConv: Kind(
        stack=aggregate.GINExperts,
        is_local=True,
        needs_destinations=False,
        adapt=_with_mlp,
    ),
    pyg.GINEConv: Kind(
        stack=aggregate.GINEExperts,
        is_local=True,
        needs_destinations=False,
        adapt=_with_mlp,
        edge_width=_gine_edge_width,
    ),
    pyg.GraphConv: Kind(
        stack=aggregate.GraphConvExperts,
        is_local=True,
        needs_destinations=False,
    ),
    pyg.LEConv: Kind(is_local=True),
    pyg.MFConv: Kind(is_local=True),
    pyg.PNAConv: Kind(is_local=True, takes_two_sets=False),
    pyg.ResGatedGraphConv: Kind(is_local=True),
    pyg.SAGEConv: Kind(
        stack=aggregate.SAGEExperts,
        is_local=True,
        needs_destinations=False,
    ),
    pyg.SimpleConv: Kind(
        is_local=True,
        adapt=_of_no_width,
        names={"bare_sage": {"aggr": "mean", "combine_root": "cat"}},
    ),
    pyg.TransformerConv: Kind(stack=attention.TransformerExperts, is_local=True),
}
"""What gmoe knows of each class. A new kind is a row here, and a class if its experts are stacked.

By exact type, see :func:`kind_of`: a subclass may compute something else.
"""

UNKNOWN = Kind()
"""What holds for all other classes."""


def by_name() -> dict[str, ConvFactory]:
    """Convs by name: PyG's without ``Conv``, in lower case (``"gcn"``, ``"gatv2"``), and others'.

    Read from :data:`KINDS` at each call, so that a row may be added at any time.
    """
    convs: dict[str, ConvFactory] = {
        name.removesuffix("Conv").lower(): getattr(pyg.conv, name)
        for name in pyg.conv.classes
        if name.endswith("Conv")
    }
    for cls, kind in KINDS.items():
        for name, options in kind.names.items():
            convs[name] = partial(cls, **options) if options else cls  # type: ignore[misc]
    return convs


def kind_of(cls: type) -> Kind:
    """What gmoe knows of a class of convs, which is nothing of subclasses."""
    return KINDS.get(cls, UNKNOWN)


def base_kind_of(cls: type) -> Kind:
    """What gmoe knows of a class or else of the nearest base that it knows."""
    return next((KINDS[base] for base in cls.__mro__ if base in KINDS), UNKNOWN)


# from a kind to the conv of an expert -------------------------------------------------------------


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
    in_channels: Widths
    out_channels: int
    args: tuple[object, ...]
    kwargs: Mapping[str, object]

    def keep(self, kept: Sequence[int]) -> Make:
        """What makes the convs of some experts, which are numbered anew."""
        return replace(self, kinds=[self.kinds[expert] for expert in kept])

    def __call__(self, expert: int) -> MessagePassing:
        factory = factory_of(self.kinds[expert])
        name = name_of(factory)
        parameters = inspect.signature(factory).parameters
        fits = isinstance(self.in_channels, int) or kind_of(class_of(factory)).takes_two_sets
        legal = "one width: it takes no bipartite input (SAGEConv and GraphConv do)"
        check(fits, "in_channels", f"{self.in_channels} for {name}", legal)
        # A copy: the convs must not share a module among the arguments.
        args, kwargs = copy.deepcopy((self.args, self.kwargs))
        args = (self.in_channels, self.out_channels, *args)
        for option, value in [*zip(parameters, args, strict=False), *kwargs.items()]:
            is_flag = option in parameters and parameters[option].annotation in (bool, "bool")
            # A number by position was most likely meant for num_experts.
            legal = f"True or False; num_experts is given by name, num_experts={value}"
            check(not is_flag or type(value) is not int, option, value, legal)
        for option, value in kwargs.items():
            check_option(option, value, factory)
        try:
            conv = factory(*args, **kwargs)
        except (TypeError, AttributeError, AssertionError) as error:
            expected = "the rest of its arguments, or a factory (in_channels, out_channels) -> conv"
            if "metadata" in parameters or factory is pyg.HeteroConv:
                expected = OF_SEVERAL_TYPES
            raise ValueError(
                f"conv: got {name}, which cannot be built as conv({args[0]}, {args[1]}, ...) "
                f"({error}); expected {expected}"
            ) from error
        widths = (self.in_channels,) if isinstance(self.in_channels, int) else self.in_channels
        is_open = -1 not in widths and any(map(is_lazy, conv.parameters()))
        got = f"{type(conv).__name__} of open widths"
        check(not is_open, "conv", got, "those that factories get")
        _check_forward(conv)
        refuse_computed("conv", name, conv)
        return conv


def check_option(
    option: str,
    value: object,
    factory: ConvFactory,
    owner: str = "MoEConv",
    of_owner: Iterable[str] = (),
) -> None:
    """Refuse a keyword argument that, by their signatures, neither layer nor conv has.

    Args:
        option: its name.
        value: its value.
        factory: makes the conv.
        owner: what was called with it.
        of_owner: arguments of that, beside those of a layer, suggested if one is mistyped.
    """
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
        hint = nearest(option, (*sorted(names), *OPTIONS, *of_owner))
    raise ValueError(
        f"{option}: got {value!r}, expected an argument of {owner} or of {name_of(factory)}{hint}"
    )


def _check_forward(conv: object) -> None:
    """Refuse a module that needs more than nodes, edges, edge weights and edge features."""
    name = type(conv).__name__
    if not isinstance(conv, MessagePassing):
        raise ValueError(
            f"conv: got a factory of {name}, expected one of PyG's MessagePassing layers"
        )
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
        expected = OF_SEVERAL_TYPES
    raise ValueError(
        f"conv: got {name}, whose forward takes ({', '.join(parameters)}), expected {expected}"
    )


def of_pyg(code: object) -> bool:
    """True for a class or function of PyG."""
    return str(getattr(code, "__module__", "")).startswith("torch_geometric.")


def _is_adapter(function: object) -> bool:
    """True for the ``adapt`` of a kind, whose first argument is the class that it builds."""
    return any(function is kind.adapt for kind in KINDS.values())


def unwrapped(factory: object) -> object:
    """The class or function inside partials."""
    while isinstance(factory, partial):
        factory = factory.args[0] if _is_adapter(factory.func) else factory.func
    return factory


def name_of(factory: object) -> str:
    """The name of a class or function, wrapped in partials or not."""
    inner = unwrapped(factory)
    return str(getattr(inner, "__name__", type(inner).__name__))


def class_of(factory: object) -> type:
    """The class that a factory is, wrapped in partials or not; ``object`` for a function."""
    inner = unwrapped(factory)
    return inner if isinstance(inner, type) else object


def is_of_library(kind: str | ConvFactory) -> bool:
    """True for a name, or a class of :data:`KINDS`, with options or without: gmoe builds the conv.

    A user's factory, or one of copies, may have changed a conv after it was built.
    """
    if isinstance(kind, str):
        return True
    cls = kind.func if isinstance(kind, partial) else kind
    return isinstance(cls, type) and cls in KINDS


def are_alike(kinds: Sequence[str | ConvFactory]) -> bool:
    """True for convs that differ in the values of their parameters alone.

    A user's factory may make another conv at each call.
    """
    kind = kinds[0]
    is_one = all(other == kind for other in kinds)
    return is_one and (is_of_library(kind) or isinstance(kind, CopyOf))


def factory_of(conv: str | ConvFactory) -> ConvFactory:
    """A factory ``(in_channels, out_channels, *args, **kwargs) -> conv`` from a name or class.

    A factory is returned as it is.

    Raises:
        ValueError: an unknown name; an instance; a class of PyG whose first two arguments are not
            widths.
    """
    if isinstance(conv, str):
        conv = _named(conv)
    name = type(conv).__name__
    legal = f"the class, {name}, or a factory (in_channels, out_channels) -> conv that makes a new "
    legal += "one for each expert"
    check(not isinstance(conv, nn.Module), "conv", f"an instance of {name}", legal)
    is_other_class = isinstance(conv, type) and not issubclass(conv, nn.Module)
    if not callable(conv) or is_other_class:
        raise ValueError(f"conv: got {conv!r}, expected {CONV_VALUES}")
    cls = conv
    options: Mapping[str, object] = {}
    if isinstance(conv, partial) and not conv.args:
        cls = conv.func
        options = conv.keywords
    kind = kind_of(cls) if isinstance(cls, type) else UNKNOWN
    if kind.adapt is not None:
        return partial(kind.adapt, cls, **options)
    if isinstance(cls, type) and issubclass(cls, MessagePassing) and of_pyg(cls):
        first = list(inspect.signature(cls).parameters)[:2]
        got = f"{cls.__name__}, which is built with ({', '.join(first)})"
        legal = "a class built with (in_channels, out_channels), or a factory of those"
        check(first == ["in_channels", "out_channels"], "conv", got, legal)
    return conv


def _named(name: str) -> ConvFactory:
    """The conv of a name; case, underscores and a ``Conv`` at the end do not matter.

    Raises:
        ValueError: an unknown name.
    """

    def plain(text: str) -> str:
        return text.lower().replace("_", "").removesuffix("conv")

    convs = by_name()
    factories = {plain(known): factory for known, factory in convs.items()}
    if plain(name) not in factories:
        check_choice("conv", name, sorted(convs))
    return factories[plain(name)]


def kinds_of(conv: ConvLike, num_experts: int | None) -> list[str | ConvFactory]:
    """The kind of each expert: a single kind for all of them (by default 8), or a list.

    Raises:
        ValueError: no kind, or a list of another length than ``num_experts``.
    """
    if num_experts is not None:
        check_counts(num_experts=num_experts)
    if isinstance(conv, str) or callable(conv):
        return [conv] * (8 if num_experts is None else num_experts)
    if not isinstance(conv, Sequence) or not conv:
        raise ValueError(f"conv: got {conv!r}, expected {CONV_VALUES}")
    fits = num_experts in (None, len(conv))
    check(fits, "conv", f"a list of {len(conv)} convs", f"num_experts={num_experts}")
    return list(conv)


@dataclass(frozen=True)
class CopyOf:
    """A factory of copies of one conv, whatever widths it is called with."""

    conv: MessagePassing

    def __call__(self, in_channels: Widths, out_channels: int) -> MessagePassing:
        return copy.deepcopy(self.conv)
