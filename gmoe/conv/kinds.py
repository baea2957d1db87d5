"""Kinds of convs: their names, how they are built and checked, and how the experts of each kind are run."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch_geometric import nn as pyg
from torch_geometric.nn import MessagePassing
from torch_geometric.nn.dense.linear import Linear

from gmoe._checks import change_of, check, check_choice, check_counts, nearest
from gmoe.conv import aggregate, attention
from gmoe.conv.aggregate import FilterConv, MLPConv
from gmoe.conv.base import ConvExperts, MixedExperts, StackedExperts, probe_copy
from gmoe.conv.graph import Graph, parameters_of
from gmoe.conv.separate import SeparateExperts, run, run_on
from gmoe.dispatch import Backend
from gmoe.moe import refuse_removed
from gmoe.routers import ROUTERS

ConvFactory: TypeAlias = Callable[..., MessagePassing]
"""Called as ``conv(in_channels, out_channels, *conv_args, **conv_kwargs)``."""

ConvLike: TypeAlias = str | ConvFactory | Sequence[str | ConvFactory]
"""A name such as ``"gcn"``, a conv class, a factory, or a list with one per expert."""

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
"""Kinds of experts beside PyG's."""

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
"""Classes whose experts are stacked, by exact type: a subclass may compute something else.

A new kind is listed here, and in :data:`LOCAL` for convs that cannot be stacked; in :data:`OWN` for a name, if it is
not PyG's; in :data:`ADAPTED` if it is not built as ``(in_channels, out_channels)``; in :data:`SOURCES_ALONE` if it may
have a tuple of widths and no destinations.
"""

_LOCAL = "cg clustergcn feast film gat gatv2 general gin gine graph le mf pna resgatedgraph sage simple transformer"
LOCAL = frozenset([MLPConv, *(CONVS[name] for name in _LOCAL.split())])
"""Classes whose output at a node follows from its in-edges and their ends alone, under most options; all the same
verified for each layer that is built."""

SOURCES_ALONE = frozenset(CONVS[name] for name in ("sage", "graph", "gin", "gine", "gat"))
"""Classes that take destinations without features, as if these were zeros."""

ADAPTED = (pyg.GINConv, pyg.GINEConv, pyg.CGConv, pyg.SimpleConv)
"""Classes not built as ``(in_channels, out_channels)`` that are made to."""


OWN_NETWORK = "pass a factory, such as conv=lambda i, o: GINConv(network(i, o)), that makes a network for each expert"
"""How to give GIN and GINE another network."""


def _adapted(cls: ConvFactory, in_channels: Any, out_channels: int, *args: Any, **kwargs: Any) -> MessagePassing:
    """GIN(E) around the two-layer MLP of PyG's ``GIN`` model; the others of :data:`ADAPTED` keep the width."""
    widths = [in_channels] if isinstance(in_channels, int) else list(in_channels)
    if cls is pyg.GINConv or cls is pyg.GINEConv:
        given = "nn" in kwargs or any(isinstance(arg, nn.Module) for arg in args)
        check(not given, "nn", "a network", f"nothing: omit it for a two-layer MLP; or {OWN_NETWORK}")
        return cls(pyg.MLP([widths[0], out_channels, out_channels], norm=None), *args, **kwargs)
    same = set(widths) == {out_channels}
    check(same, "out_channels", f"{out_channels} for {name_of(cls)}", f"in_channels={in_channels}")
    return cls(*args, **kwargs) if cls is pyg.SimpleConv else cls(in_channels, *args, **kwargs)


OPTIONS = (
    *("num_experts", "router", "k", "router_input", "start", "shared_transform"),
    *("router_kwargs", "local", "backend", "check_finite"),
)
"""The keyword arguments of a :class:`gmoe.MoEConv`, suggested where one is mistyped."""

KINDS = "a name, a class of PyG's convs, a factory, or a list of those"
"""Legal values of ``conv``."""


@dataclass(frozen=True)
class Make:
    """Makes the conv of an expert. A class, not a closure, so that layers can be pickled.

    Raises:
        ValueError: at a call: widths or other arguments that the conv does not take, or no MessagePassing layer.
    """

    kinds: Sequence[str | ConvFactory]
    in_channels: Any
    out_channels: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self, expert: int) -> MessagePassing:
        factory = factory_of(self.kinds[expert])
        name, takes = name_of(factory), inspect.signature(factory).parameters
        one = isinstance(self.in_channels, int) or class_of(factory) not in (pyg.GCNConv, FilterConv)
        legal = "one width: it takes no bipartite input (SAGEConv and GraphConv do)"
        check(one, "in_channels", f"{self.in_channels} for {name}", legal)
        # A module among the arguments must not be shared by the convs.
        args, kwargs = copy.deepcopy((self.args, self.kwargs))
        args = (self.in_channels, self.out_channels, *args)
        for option, value in [*zip(takes, args, strict=False), *kwargs.items()]:
            flag = option in takes and takes[option].annotation in (bool, "bool")
            # A number by position was most likely meant for num_experts.
            legal = f"True or False; num_experts is given by name, num_experts={value}"
            check(not flag or type(value) is not int, option, value, legal)
        for option, value in kwargs.items():
            _check_option(option, value, factory)
        try:
            conv = factory(*args, **kwargs)
        except (TypeError, AttributeError, AssertionError) as error:
            got = f"{name}, which cannot be built as conv({args[0]}, {args[1]}, ...) ({error})"
            hetero = "metadata" in takes or factory is pyg.HeteroConv
            legal = "the rest of its arguments, or a factory (in_channels, out_channels) -> conv"
            if hetero:
                legal = "gmoe.HeteroMoEConv for nodes of several types"
            raise ValueError(f"conv: got {got}; expected {legal}") from error
        _check_forward(conv)
        return conv


def _check_option(option: str, value: object, factory: ConvFactory) -> None:
    """Refuse a keyword argument that neither the layer nor the conv has, where their signatures tell."""
    refuse_removed([option])
    names = set(inspect.signature(factory).parameters)
    cls = class_of(factory)
    if issubclass(cls, MessagePassing):
        # The classes pass what they do not know on to their bases.
        names |= {name for base in cls.__mro__ for name in inspect.signature(base).parameters}
    passes_on = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(factory).parameters.values())
    if option in names or (passes_on and not of_pyg(cls)):  # a factory of one's own may take anything
        return
    legal = f"an argument of MoEConv or of {name_of(factory)}"
    if any(option in inspect.signature(router).parameters for router in ROUTERS.values()):
        hint = f"; a router's options are given as router_kwargs={{{option!r}: ...}}"
    else:
        hint = nearest(option, (*sorted(names), *OPTIONS))
    raise ValueError(f"{option}: got {value!r}, expected {legal}{hint}")


def _check_forward(conv: Any) -> None:
    """Refuse a module that is called otherwise than ``conv(x, edge_index)`` with edge weights or features."""
    name = type(conv).__name__
    check(isinstance(conv, MessagePassing), "conv", f"a factory of {name}", "one of PyG's MessagePassing layers")
    check(not any(map(is_lazy, conv.parameters())), "conv", f"{name} of open widths", "those that factories get")
    takes = inspect.signature(conv.forward).parameters
    first, others = list(takes)[:2], list(takes.values())[2:]
    usual = first == ["x", "edge_index"] or (len(first) == 2 and not of_pyg(type(conv)))  # users name them as they like
    needed = {p.name for p in others if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty}
    # Of a single relation FiLM reads no types, but RGCN and RGAT do.
    relational = isinstance(conv, pyg.RGCNConv | pyg.RGATConv) or getattr(conv, "num_relations", 1) > 1
    typed = "edge_type" in takes and relational
    fits = usual and not typed and needed <= {"edge_weight", "edge_attr"}
    legal = "one of (x, edge_index, edge_weight or edge_attr)"
    if typed or "x_dict" in takes:
        legal = "gmoe.HeteroMoEConv for several types of nodes or relations"
    check(fits, "conv", f"{name}, whose forward takes ({', '.join(takes)})", legal)


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
    """A factory ``(in_channels, out_channels, *args, **kwargs) -> conv`` from a name, class or factory.

    Raises:
        ValueError: an unknown name; a class of PyG whose first two arguments are other than widths.
    """
    if isinstance(conv, str):
        known = {name.replace("_", ""): factory for name, factory in (CONVS | OWN).items()}
        name = conv.lower().replace("_", "").removesuffix("conv")
        if name not in known:
            check_choice("conv", conv, sorted([*CONVS, *OWN]))
        conv = known[name]
    if isinstance(conv, nn.Module):
        name = type(conv).__name__
        factory = "a factory (in_channels, out_channels) -> conv that makes a new one for each expert"
        raise ValueError(f"conv: got an instance of {name}, expected the class, {name}, or {factory}")
    check(callable(conv), "conv", repr(conv), KINDS)
    cls, options = (conv.func, conv.keywords) if isinstance(conv, partial) and not conv.args else (conv, {})
    if cls in ADAPTED:
        return partial(_adapted, cls, **options)
    if isinstance(cls, type) and issubclass(cls, MessagePassing) and of_pyg(cls):
        first = list(inspect.signature(cls).parameters)[:2]
        got = f"{cls.__name__}, which is built with ({', '.join(first)})"
        legal = "a class built with (in_channels, out_channels), or a factory of those"
        check(first == ["in_channels", "out_channels"], "conv", got, legal)
    return conv


def kinds_of(conv: Any, num_experts: int | None) -> list[str | ConvFactory]:
    """The kind of each expert; a single kind for all of them (by default 8), or a list.

    Raises:
        ValueError: no kind, or a list of another length than ``num_experts``.
    """
    if num_experts is not None:
        check_counts(num_experts=num_experts)
    if isinstance(conv, str) or callable(conv):
        return [conv] * (8 if num_experts is None else num_experts)
    check(isinstance(conv, Sequence) and len(conv) > 0, "conv", repr(conv), KINDS)
    check(num_experts in (None, len(conv)), "conv", f"a list of {len(conv)} convs", f"num_experts={num_experts}")
    return list(conv)


def build_experts(
    make: Make, local: bool | None, backend: Backend, convs: Sequence[MessagePassing] | None = None
) -> ConvExperts:
    """The experts of a layer, each kind of conv run in the cheapest way that is right for it.

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
    trials = {id(kind): Trial(conv, make.in_channels) for kind, conv in zip(make.kinds, convs, strict=True)}
    _check_together(make, convs, [trial.width for trial in trials.values() if trial.width is not None])
    groups: dict[Any, list[int]] = {}
    for expert, conv in enumerate(convs):
        groups.setdefault(_stack_of(conv) if local is None else None, []).append(expert)
    built: list[ConvExperts] = []
    for stack, members in groups.items():
        of_group, kinds = [convs[expert] for expert in members], [make.kinds[expert] for expert in members]
        if stack is not None:
            built.append(stack[0](of_group, replace(make, kinds=kinds), backend))
            continue
        separate = SeparateExperts(of_group, [trials[id(kind)].takes_local_path(local) for kind in kinds])
        built.append(separate)
        if separate.too_far and len(convs) > 1:
            names = ", ".join(sorted({type(conv).__name__ for conv in separate.too_far}))
            warnings.warn(
                f"{names} runs on the whole graph for every expert, so that its cost follows num_experts, not k; if "
                "its output at a node follows from the node's in-edges alone, pass local=True",
                stacklevel=4,
            )
    return built[0] if len(built) == 1 else MixedExperts(built, list(groups.values()))


def _check_together(make: Make, convs: Sequence[MessagePassing], widths: Sequence[int]) -> None:
    """Refuse convs that do not go together; ``widths`` are those of their outputs, where these are known."""
    ids = [id(parameter) for conv in convs for parameter in conv.parameters()]
    check(len(ids) == len(set(ids)), "conv", "a factory whose convs share parameters", "fresh ones at each call")
    flows = sorted({conv.flow for conv in convs})
    check(len(flows) == 1, "conv", f"experts of flows {flows}", "one flow for all")
    check(len(set(widths)) < 2, "conv", f"experts of output widths {sorted(set(widths))}", "one width for all")
    if widths:
        got = f"{make.out_channels}, but {name_of(make.kinds[0])} gives {widths[0]} columns"
        fits = widths[0] % make.out_channels == 0  # heads and powers give multiples
        check(fits, "out_channels", got, "that width, or a multiple of it")


def _is_usual(part: nn.Module) -> bool:
    """True for a part of a conv that stacks know: a linear layer, or one of torch's or PyG's without parameters."""
    if type(part) in (nn.Linear, Linear):
        return True
    package = type(part).__module__.partition(".")[0]
    return package in ("torch", "torch_geometric") and not any(True for _ in part.parameters(recurse=False))


def _stack_of(conv: MessagePassing) -> tuple[Any, ...] | None:
    """A class of stacked experts and all that has to be equal in a stack; ``None`` if the conv is in none.

    The filters of FilterConvs may differ. Stacking must not lose what somebody put there: hooks, parametrizations,
    frozen parameters, linear layers of an own class, methods of an instance.
    """
    stack = STACKS.get(type(conv))
    if stack is None or not all(p.requires_grad for p in conv.parameters()):
        return None
    if any(change_of(part) is not None for part in conv.modules()) or not stack.accepts(conv):
        return None
    aggregation = set(conv.aggr_module.modules()) if isinstance(conv.aggr_module, nn.Module) else set()
    options, shapes = list[Hashable](), list[Hashable]()
    for name, part in conv.named_modules():
        if part is not conv and part not in aggregation and not _is_usual(part):
            return None
        options += [
            (name, type(part), key, _comparable(value)) for key, value in vars(part).items() if _is_option(part, key)
        ]
        # The buffers of an aggregation are part of what it computes; that of a GIN, its eps, is stacked.
        buffers = part.named_buffers(recurse=False) if part in aggregation else ()
        options += [(name, key, _comparable(value)) for key, value in buffers]
        shapes += [(name, key, value.shape) for key, value in part.named_parameters(recurse=False)]
    # A copy may list its attributes in another order.
    return stack, frozenset(options), tuple(shapes)


def _is_option(part: nn.Module, key: str) -> bool:
    """True for an attribute that must be equal in all convs of a stack."""
    if isinstance(part, FilterConv) and key in ("filter", "hops"):
        return False
    # Parameters, buffers and parts are compared one by one; hooks are PyG's own.
    is_kept_by_torch = key in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    is_table_of_hooks = key.startswith("_") and "_hooks" in key
    return not (is_kept_by_torch or is_table_of_hooks or key in ("training", "inspector"))


def _comparable(value: Any) -> Hashable:
    """Equal for values that surely mean the same; what is not known equals only itself."""
    if isinstance(value, torch.Tensor) and not value.is_meta:
        return torch.Tensor, value.dtype, value.shape, tuple(value.detach().flatten().tolist())
    if isinstance(value, np.ndarray):
        return np.ndarray, value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, np.generic):
        return type(value), value.item()
    if isinstance(value, dict):
        return type(value), tuple((_comparable(key), _comparable(item)) for key, item in value.items())
    if isinstance(value, set | frozenset):
        return type(value), frozenset(map(_comparable, value))
    if isinstance(value, tuple | list):
        return type(value), tuple(map(_comparable, value))
    if isinstance(value, bool | int | float | complex | str | bytes | torch.dtype | torch.device | None):
        return type(value), value
    return type(value), id(value)


def looks_one_hop(conv: MessagePassing, in_channels: int, local: bool | None) -> bool:
    """True if the conv's output follows from in-edges, their ends, and the degrees of the whole graph."""
    if isinstance(conv, FilterConv):
        return conv.hops == 1
    return isinstance(conv, pyg.GCNConv) or Trial(conv, in_channels).takes_local_path(local)


NODES, EDGES = 14, 60
"""Sizes of the graph that convs are tried on."""


@dataclass
class Trial:
    """Runs a float64 copy of a conv, without dropout and in training mode (so that batch norm shows), on a small random
    graph with self-loops, parallel edges and isolated nodes; once, where its outcome is asked for.

    Args:
        conv: the conv, which is left alone.
        in_channels: its widths.
    """

    conv: Any
    in_channels: int | tuple[int, int]

    @cached_property
    def outcome(self) -> tuple[int | None, bool, str]:
        """Columns of the output, if it runs; locality; and what it raised."""
        width = None
        try:
            with torch.no_grad(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
                conv, generator = probe_copy(self.conv), torch.Generator().manual_seed(0)
                graph, x_src, x_dst = self._inputs(generator)
                out = run(conv, graph, x_src, x_dst)
                width = out.size(1)
                tokens = [torch.randperm(NODES, generator=generator)[:size].sort().values for size in (1, 4, 9)]
                parts = [(run_on(conv, graph, x_src, x_dst, token), out[token]) for token in tokens]
                return width, all(torch.allclose(alone, expected, atol=1e-9) for alone, expected in parts), ""
        except Exception as error:  # a conv may ask for anything: edge features, regular graphs, other packages
            return width, False, f"fails on a small random graph: {error}"

    def _inputs(self, generator: torch.Generator) -> tuple[Graph, torch.Tensor, torch.Tensor]:
        conv, takes = self.conv, parameters_of(self.conv)
        random = partial(torch.randn, dtype=torch.float64, generator=generator)
        edge_index = torch.randint(NODES - 2, (2, EDGES), generator=generator)  # the last two nodes are isolated
        edge_index[:, :3] = torch.tensor([[0, 1, 1], [0, 2, 2]])
        weight = random(EDGES).abs() + 0.1 if "edge_weight" in takes else None
        source, destination = (self.in_channels, 0) if isinstance(self.in_channels, int) else self.in_channels
        edge_dim = getattr(conv, "edge_dim", None) or getattr(conv, "dim", None)
        if isinstance(conv, pyg.GINEConv):
            edge_dim = source if conv.lin is None else conv.lin.in_channels
        wanted = "edge_attr" in takes and isinstance(edge_dim, int) and edge_dim > 0
        attr = random(EDGES, edge_dim) if wanted else None
        x_src = random(NODES, source)
        graph = Graph(edge_index, NODES, edge_weight=weight, edge_attr=attr, flow=conv.flow)
        return graph, x_src, random(NODES, destination) if destination else x_src

    @property
    def width(self) -> int | None:
        """Columns of the output; ``None`` if unknown."""
        if hasattr(self.conv, "out_channels") and _stack_of(self.conv) is not None:
            return int(self.conv.out_channels * (self.conv.heads if getattr(self.conv, "concat", False) else 1))
        return self.outcome[0]

    def takes_local_path(self, local: bool | None) -> bool:
        """True if the conv is run on the in-edges of its destinations.

        Raises:
            ValueError: ``local=True`` for a conv that is not local.
        """
        if local is False or (local is None and type(self.conv) not in LOCAL):
            return False
        _, is_local, failure = self.outcome
        why = failure or "gives another output on a node's in-edges than on the whole graph"
        got = f"True, but {type(self.conv).__name__} {why}"
        check(is_local or not local, "local", got, "None or False")
        return is_local


@dataclass(frozen=True)
class CopyOf:
    """A factory of copies of one conv, whatever sizes it is asked for."""

    conv: MessagePassing

    def __call__(self, in_channels: Any, out_channels: int) -> MessagePassing:
        return copy.deepcopy(self.conv)
