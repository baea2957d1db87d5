"""Kinds of convs: their names, how they are built and checked, and how the experts of each kind are run."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch_geometric import nn as pyg
from torch_geometric.nn import MessagePassing

from gmoe._checks import check, check_choice, check_count, nearest
from gmoe.conv.aggregate import (
    FilterConv,
    FilterExperts,
    GCNExperts,
    GINEExperts,
    GINExperts,
    GraphConvExperts,
    MLPConv,
    MLPConvExperts,
    SAGEExperts,
)
from gmoe.conv.attention import GATExperts, GATv2Experts, TransformerExperts
from gmoe.conv.base import ConvExperts, MixedExperts, StackedExperts, probe_copy
from gmoe.conv.graph import Graph, parameters_of
from gmoe.conv.separate import SeparateExperts, run, run_on
from gmoe.dispatch import Backend

ConvFactory: TypeAlias = Callable[..., MessagePassing]
"""Called as ``conv(in_channels, out_channels, *conv_args, **conv_kwargs)``."""

ConvLike: TypeAlias = str | ConvFactory | Sequence[str | ConvFactory]
"""A name such as ``"gcn"``, a conv class, a factory, or a list with one per expert."""

Widths: TypeAlias = int | tuple[int, int]

CONVS: dict[str, type[MessagePassing]] = {
    name.removesuffix("Conv").lower(): getattr(pyg.conv, name) for name in pyg.conv.classes if name.endswith("Conv")
}
"""PyG's convs by the name without ``Conv``, in lower case: ``"gcn"``, ``"sage"``, ``"gatv2"``, ..."""

OWN: dict[str, ConvFactory] = {
    "mlp": MLPConv,
    "filter": FilterConv,
    "identity": partial(FilterConv, filter="identity"),
    "low_pass": FilterConv,
    "high_pass": partial(FilterConv, filter="high_pass"),
    "two_hop": partial(FilterConv, hops=2),
}
"""Kinds of experts that are not PyG's."""

STACKS: dict[type[MessagePassing], type[StackedExperts]] = {
    FilterConv: FilterExperts,
    MLPConv: MLPConvExperts,
    pyg.GATConv: GATExperts,
    pyg.GATv2Conv: GATv2Experts,
    pyg.GCNConv: GCNExperts,
    pyg.GINConv: GINExperts,
    pyg.GINEConv: GINEExperts,
    pyg.GraphConv: GraphConvExperts,
    pyg.SAGEConv: SAGEExperts,
    pyg.TransformerConv: TransformerExperts,
}
"""Classes whose experts are stacked; a subclass of one may compute something else."""

_LOCAL = "cg clustergcn feast film gat gatv2 general gin gine graph le mf pna resgatedgraph sage simple transformer"
LOCAL = frozenset(CONVS[name] for name in _LOCAL.split())
"""Classes whose output at a node follows from its in-edges and their ends alone, under most options; all the same
verified for each layer that is built."""

SOURCES_ALONE = frozenset(CONVS[name] for name in ("sage", "graph", "gin", "gine", "gat"))
"""Classes that take destinations without features, as if these were zeros."""


def _gin(cls: type[MessagePassing], in_channels: Any, out_channels: int, *args: Any, **kwargs: Any) -> MessagePassing:
    """GIN(E) around the two-layer MLP that PyG's ``GIN`` model builds, where no other is asked for."""
    width = in_channels if isinstance(in_channels, int) else in_channels[0]
    legal = "none: it is made, or a factory (in_channels, out_channels) -> conv with another network for each expert"
    check("nn" not in kwargs and not any(isinstance(arg, nn.Module) for arg in args), "nn", "a network", legal)
    return cls(pyg.MLP([width, out_channels, out_channels], norm=None), *args, **kwargs)


def _one_width(
    cls: type[MessagePassing], in_channels: Any, out_channels: int, *args: Any, **kwargs: Any
) -> MessagePassing:
    """A conv that keeps the width."""
    widths = {in_channels} if isinstance(in_channels, int) else set(in_channels)
    check(widths == {out_channels}, "out_channels", f"{out_channels} for {cls.__name__}", f"in_channels={in_channels}")
    return cls(*args, **kwargs) if cls is pyg.SimpleConv else cls(in_channels, *args, **kwargs)


@dataclass(frozen=True)
class Make:
    """Makes the conv of an expert. A class, not a closure, so that layers can be pickled.

    Raises:
        ValueError: at a call: widths or other arguments that the conv does not take, or no MessagePassing layer.
    """

    kinds: Sequence[str | ConvFactory]
    in_channels: Any
    out_channels: int
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None

    def __call__(self, expert: int) -> MessagePassing:
        factory = factory_of(self.kinds[expert])
        if not isinstance(self.in_channels, int):
            one = name_of(factory) in ("GCNConv", "FilterConv")
            got = f"{self.in_channels} for {name_of(factory)}"
            check(not one, "in_channels", got, "one width: it takes no bipartite input (SAGEConv and GraphConv do)")
        args, kwargs = copy.deepcopy((self.args, self.kwargs or {}))  # a module among them is each conv's own
        try:
            takes = inspect.signature(factory).parameters
            _check_flags(takes, (self.in_channels, self.out_channels, *args), kwargs)
            conv = factory(self.in_channels, self.out_channels, *args, **kwargs)
        except (TypeError, AttributeError, AssertionError) as error:
            call = f"conv({self.in_channels}, {self.out_channels}, ...)"
            got = f"{name_of(factory)}, which cannot be built as {call} ({error})"
            legal = "the rest of its arguments, or a factory (in_channels, out_channels) -> conv"
            if "metadata" in takes or factory is pyg.HeteroConv:
                legal = "gmoe.HeteroMoEConv for nodes of several types"
            unknown = next((name for name in kwargs if name not in takes), "")
            raise ValueError(f"conv: got {got}; expected {legal}{nearest(unknown, (*takes, *OPTIONS))}") from error
        kind = type(conv)
        legal = "one of PyG's MessagePassing layers"
        check(isinstance(conv, MessagePassing), "conv", f"a factory of {kind.__name__}", legal)
        takes = inspect.signature(conv.forward).parameters
        names, free = list(takes), inspect.Parameter.POSITIONAL_OR_KEYWORD
        needed = {n for n in names[2:] if takes[n].kind is free and takes[n].default is inspect.Parameter.empty}
        usual = names[:2] == ["x", "edge_index"] or (len(names) >= 2 and not of_pyg(kind))  # others name them otherwise
        usual &= needed <= {"edge_weight", "edge_attr"}
        typed = "edge_type" in takes and getattr(conv, "num_relations", 1) > 1
        got = f"{kind.__name__}, whose forward takes ({', '.join(takes)})"
        check(usual and not typed, "conv", got, "one of (x, edge_index, edge_weight or edge_attr)")
        return conv


def _check_flags(takes: Mapping[str, inspect.Parameter], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse a number for a flag: whoever gives a conv 8 by position most likely means the number of experts."""
    for name, value in [*zip(takes, args, strict=False), *kwargs.items()]:
        flag = name in takes and takes[name].annotation in (bool, "bool")
        if flag and isinstance(value, int) and not isinstance(value, bool):
            hint = f"num_experts is given by name, num_experts={value}"
            raise ValueError(f"{name}: got {value}, expected True or False; {hint}")


OPTIONS = (
    *("num_experts", "router", "k", "router_input", "shared_expert", "dense_start", "shared_transform"),
    *("router_kwargs", "local", "backend", "check_finite"),
)
"""What a :class:`gmoe.MoEConv` takes by name, for those who mistype it."""

KINDS = "a name, a class of PyG's convs, a factory, or a list of those"
"""What may be given as ``conv``."""


def of_pyg(code: Any) -> bool:
    """Whether a class or function is PyG's own."""
    return str(getattr(code, "__module__", "")).startswith("torch_geometric.")


def name_of(factory: Any) -> str:
    """Of a class or function, wrapped in partials or not."""
    while isinstance(factory, partial):
        factory = factory.args[0] if factory.func in (_gin, _one_width) else factory.func
    return str(getattr(factory, "__name__", type(factory).__name__))


def factory_of(conv: Any) -> ConvFactory:
    """A factory ``(in_channels, out_channels, *args, **kwargs) -> conv`` from a name, class or factory.

    Raises:
        ValueError: an unknown name; a class of PyG whose first two arguments are other than widths.
    """
    if isinstance(conv, str):
        name = conv.lower().replace("_", "").removesuffix("conv")
        known = CONVS | {own.replace("_", ""): factory for own, factory in OWN.items()}
        if name not in known:
            check_choice("conv", conv, sorted([*CONVS, *OWN]))
        conv = known[name]
    cls, options = (conv.func, conv.keywords) if isinstance(conv, partial) and not conv.args else (conv, {})
    if cls is pyg.GINConv or cls is pyg.GINEConv:
        return partial(_gin, cls, **options)
    if cls is pyg.CGConv or cls is pyg.SimpleConv:
        return partial(_one_width, cls, **options)
    if isinstance(cls, type) and issubclass(cls, MessagePassing):
        first = list(inspect.signature(cls).parameters)[:2]
        got = f"{cls.__name__}, which is built with ({', '.join(first)})"
        usual = first == ["in_channels", "out_channels"] or not of_pyg(cls)
        check(usual, "conv", got, "a class built with (in_channels, out_channels), or a factory of those")
    check(callable(conv), "conv", repr(conv), KINDS)
    found: ConvFactory = conv
    return found


def kinds_of(conv: Any, num_experts: int | None) -> list[str | ConvFactory]:
    """The kind of each expert; a single kind for all of them (by default 8), or a list.

    Raises:
        ValueError: no kind, or a list of another length than ``num_experts``.
    """
    if num_experts is not None:
        check_count("num_experts", num_experts)
    if isinstance(conv, str) or callable(conv):
        return [conv] * (8 if num_experts is None else num_experts)
    check(isinstance(conv, Sequence) and len(conv) > 0, "conv", repr(conv), KINDS)
    check(num_experts in (None, len(conv)), "conv", f"a list of {len(conv)} convs", f"num_experts={num_experts}")
    return list(conv)


def build_experts(
    make: Make, local: bool | None, backend: Backend, convs: Sequence[MessagePassing] | None = None
) -> tuple[ConvExperts, int | None]:
    """The experts of a layer, each kind of conv run in the cheapest way that is right for it; and the columns that
    they give, where that can be told.

    Args:
        make: makes the conv of an expert.
        local: see :class:`gmoe.MoEConv`.
        backend: of the grouped product.
        convs: those of all experts, if they are made already.

    Raises:
        ValueError: ``local=True`` for a conv that is not; convs that share parameters; output widths or flows that
            differ.
    """
    convs = [make(expert) for expert in range(len(make.kinds))] if convs is None else convs
    ids = [id(parameter) for conv in convs for parameter in conv.parameters()]
    check(len(ids) == len(set(ids)), "conv", "a factory whose convs share parameters", "fresh ones at each call")
    flows = {conv.flow for conv in convs}
    check(len(flows) == 1, "conv", f"experts of flows {sorted(flows)}", "one flow for all")
    groups: dict[Any, list[int]] = {}
    for expert, conv in enumerate(convs):
        stack = None if local is not None else STACKS.get(type(conv))
        stacked = stack is not None and _is_plain(conv) and stack.accepts(conv)
        groups.setdefault((stack, *_signature(conv)) if stacked else None, []).append(expert)
    one_a_kind = {id(kind): conv for kind, conv in zip(make.kinds, convs, strict=True)}.values()
    widths = {width for conv in one_a_kind if (width := output_width(conv, make.in_channels)) is not None}
    check(len(widths) < 2, "conv", f"experts of output widths {sorted(widths)}", "one width for all")
    width = widths.pop() if widths else None
    got = f"{make.out_channels}, but {name_of(make.kinds[0])} gives {width} columns"
    fits = width is None or width % make.out_channels == 0  # heads and powers give multiples
    check(fits, "out_channels", got, "that width, or a multiple of it")
    built: list[ConvExperts] = []
    for key, members in groups.items():
        of_group = [convs[expert] for expert in members]
        if key is not None:
            built.append(key[0](of_group, replace(make, kinds=[make.kinds[expert] for expert in members]), backend))
            continue
        by_kind = {id(make.kinds[expert]): convs[expert] for expert in members}
        known = {kind: takes_local_path(conv, make.in_channels, local) for kind, conv in by_kind.items()}
        separate = SeparateExperts(of_group, [known[id(make.kinds[expert])] for expert in members])
        if separate.too_far and len(convs) > 1:
            names = ", ".join(sorted({type(conv).__name__ for conv in separate.too_far}))
            warnings.warn(
                f"{names} runs on the whole graph for every expert, so that its cost follows num_experts, not k; if "
                "its output at a node follows from the node's in-edges alone, pass local=True",
                stacklevel=4,
            )
        built.append(separate)
    return built[0] if len(built) == 1 else MixedExperts(built, list(groups.values())), width


def _signature(conv: MessagePassing) -> tuple[Hashable, ...]:
    """Equal for convs of one class that compute the same but for their parameters; GIN's networks and the filters of
    FilterConvs may differ."""
    free = ("filter", "hops") if isinstance(conv, FilterConv) else ()
    parts = [(name, part) for name, part in conv.named_modules() if name.partition(".")[0] != "nn"]
    options = [(name, key, _fixed(v)) for name, part in parts for key, v in vars(part).items() if key not in free]
    shapes = [(name, p.shape) for name, p in conv.named_parameters() if not name.startswith("nn.")]
    return tuple(options), tuple(shapes)


def _fixed(value: Any) -> Hashable:
    """Equal for values that mean the same, as far as they say what a conv computes."""
    if isinstance(value, tuple | list):
        return tuple(_fixed(part) for part in value)
    if isinstance(value, bool | int | float | str | None):
        return type(value), value
    return id(value) if isinstance(value, torch.Tensor) or callable(value) else None


def looks_one_hop(conv: MessagePassing, in_channels: int, local: bool | None) -> bool:
    """Whether the conv's output follows from in-edges, their ends, and the degrees of the whole graph."""
    if isinstance(conv, FilterConv):
        return conv.hops == 1
    return isinstance(conv, pyg.GCNConv | MLPConv) or takes_local_path(conv, in_channels, local)


def _is_plain(conv: MessagePassing) -> bool:
    """Whether stacking loses nothing that somebody put there: hooks, parametrizations, frozen or lazy parameters."""
    if any(isinstance(p, nn.parameter.UninitializedParameter) or not p.requires_grad for p in conv.parameters()):
        return False
    parts = list(conv.modules())
    tables = [t for part in parts for name, t in part.__dict__.items() if name.endswith("_hooks")]
    hooks = [getattr(hook, "hook", hook) for table in tables if isinstance(table, dict) for hook in table.values()]
    # PyG's own layers register hooks of state dicts
    return not any(map(is_parametrized, parts)) and all(map(of_pyg, hooks))


def takes_local_path(conv: MessagePassing, in_channels: Widths, local: bool | None) -> bool:
    """Whether the conv is run on the in-edges of its destinations.

    Raises:
        ValueError: ``local=True`` for a conv that is not local.
    """
    if local is False or (local is None and type(conv) not in LOCAL):
        return False
    name = type(conv).__name__
    try:
        verified = is_local(conv, in_channels)
    except Exception as error:
        if local is None:
            return False
        raise ValueError(f"local: got True, but {name} fails on a small random graph: {error}") from error
    got = f"True, but {name} gives another output on a node's in-edges than on the whole graph"
    check(verified or not local, "local", got, "None or False")
    return verified


NODES, EDGES = 14, 60
"""Of the graph that convs are tried on."""


def _tried_out(conv: MessagePassing, in_channels: Widths) -> tuple[Any, Any, Any, Graph, torch.Generator]:
    """A float64 copy without dropout, in training mode (so that batch norm shows); nodes, and a graph with self-loops,
    parallel edges and isolated nodes to run it on."""
    probe = probe_copy(conv)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    edge_index = torch.randint(NODES - 2, (2, EDGES), generator=generator)  # the last two nodes are isolated
    edge_index[:, :3] = torch.tensor([[0, 1, 1], [0, 2, 2]])
    takes = parameters_of(probe)
    weight = random(EDGES).abs() + 0.1 if "edge_weight" in takes else None
    edge_dim: Any = getattr(probe, "edge_dim", None) or getattr(probe, "dim", None)
    if isinstance(probe, pyg.GINEConv):
        edge_dim = in_channels if probe.lin is None else probe.lin.in_channels
    wanted = "edge_attr" in takes and isinstance(edge_dim, int) and edge_dim > 0
    attr = random(EDGES, edge_dim) if wanted else None
    widths = (in_channels, in_channels) if isinstance(in_channels, int) else in_channels
    x_src = random(NODES, widths[0])
    x_dst = x_src if isinstance(in_channels, int) else random(NODES, widths[1])
    graph = Graph(edge_index, NODES, edge_weight=weight, edge_attr=attr, flow=probe.flow)
    return probe, x_src, x_dst, graph, generator


@torch.no_grad()
def is_local(conv: MessagePassing, in_channels: Widths) -> bool:
    """Whether the conv's output at a node follows from the node's in-edges and their ends alone: tried out for several
    sets of destinations.

    Raises:
        Exception: whatever the conv raises on a small random graph.
    """
    with torch.device("cpu"):
        probe, x_src, x_dst, graph, generator = _tried_out(conv, in_channels)
        for size in (1, 4, 9):
            token = torch.randperm(NODES, generator=generator)[:size].sort().values
            alone = run_on(probe, graph, x_src, x_dst, token)
            if not torch.allclose(alone, run(probe, graph, x_src, x_dst)[token], atol=1e-9):
                return False
    return True


@torch.no_grad()
def output_width(conv: Any, in_channels: Widths) -> int | None:
    """The columns that a conv gives; ``None`` for one that does not run on a small random graph."""
    if type(conv) in STACKS and not isinstance(conv, pyg.GINConv | pyg.GINEConv):
        return int(conv.out_channels * (conv.heads if getattr(conv, "concat", False) else 1))
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            probe, x_src, x_dst, graph, _ = _tried_out(conv, in_channels)
            return run(probe, graph, x_src, x_dst).size(1)
    except Exception:  # a conv may ask for anything: edge features, regular graphs, other packages
        return None


@dataclass(frozen=True)
class CopyOf:
    """A factory of copies of one conv, whatever sizes it is asked for."""

    conv: MessagePassing

    def __call__(self, in_channels: Any, out_channels: int) -> MessagePassing:
        return copy.deepcopy(self.conv)
