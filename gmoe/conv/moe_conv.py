"""MoEConv: experts inside message passing. Shapes: T tokens (destinations), D width, E experts, K experts a token."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args, overload

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing, SimpleConv
from torch_geometric.typing import Adj

from gmoe._checks import check_choice, check_count
from gmoe.conv.experts import AGGREGATE_ONCE, AggregateOnce, ConvExperts
from gmoe.conv.graph import Graph, check_batch
from gmoe.conv.probe import is_local
from gmoe.conv.registry import LOCAL, ConvFactory, ConvLike, conv_factory
from gmoe.conv.separate import SeparateExperts
from gmoe.dispatch import Backend
from gmoe.moe import MoELayer
from gmoe.routing.build import RouterLike, build_router
from gmoe.routing.routing import Routing

RouteOn: TypeAlias = Literal["input", "aggregate", "both"]


class MoEConv(MoELayer):
    r"""A mixture of E graph convolutions of which each node runs K; a drop-in for a PyG conv.

    .. math::
        x_i' = \sum_{e \in \mathrm{experts}(i)} w_{ie} \; \mathrm{conv}_e(x, A)_i

    Equal, in outputs and gradients, to running E convs on the whole graph and masking, at a cost that follows K:

    - GCN, SAGE, GraphConv and GIN aggregate once, and each row meets only its experts in one grouped product (where E
      times the output is narrower than the input, they transform first, unless the router needs the aggregate);
    - local convs (a node's output follows from its in-edges and their ends) run on the in-edges of each expert's nodes;
      verified by a float64 probe at construction;
    - anything else runs on the whole graph for each expert, with a warning that its cost follows E.

    A node without an expert gets zero; the model around adds the residual.

    Args:
        conv: a PyG conv class, its name (``"gcn"``, ``"sage"``, ``"graph"``, ``"gin"``, ``"gat"``, ...), a factory
            ``(in_channels, out_channels, **conv_kwargs) -> conv``, or a list of those, one an expert. ``GINConv`` and
            ``GINEConv`` by class or name get PyG's two-layer perceptron.
        in_channels: width of the nodes; a tuple ``(source, destination)`` for bipartite input where the conv takes it.
        out_channels: passed to the conv (GAT with ``heads`` returns ``heads * out_channels``).
        num_experts: E (default 8).
        router: name, factory or instance (default ``"token_choice"``); ``None`` where every call brings ``routing=``.
        k: K, experts per node (default 1).
        route_on: what the router sees: the node's ``"input"`` (default), the ``"aggregate"`` of its neighbours (the
            conv's own where all experts share it, else the mean over in-edges), or ``"both"``.
        router_kwargs: further arguments of the router.
        local: ``True`` says that a class of your own is local, ``False`` forbids the local path; ``None`` (default)
            takes it for the classes known to be.
        backend: see :func:`gmoe.dispatch.grouped_linear`.
        check_finite: the router refuses NaN and infinity (default ``False``; costs a host sync).
        **conv_kwargs: further arguments of every conv.

    Shapes:
        - ``x``: (N, D), or ``((N_src, D_src), (N_dst, D_dst))``; tokens are the destinations.
        - ``edge_index``: (2, M), PyG's ``EdgeIndex``, a ``torch.sparse`` matrix or ``SparseTensor`` (N_dst, N_src).
        - ``edge_weight`` (M,), ``edge_attr`` (M, .): where the conv takes them.
        - ``batch``: (N_dst,) the graph of each node; the graphs of a PyG ``Batch`` are separate pools.
        - returns (N_dst, out), and the :class:`Routing` too with ``return_routing=True``.

    Raises:
        ValueError: an unknown conv or router; K > E; widths or edges that do not fit; ``local=True`` for a conv that
            is not; a factory whose convs share parameters.

    Example:
        >>> conv = MoEConv(GCNConv, 128, 256, num_experts=8, router="expert_choice", k=1)
        >>> h, routing = conv(x, edge_index, return_routing=True)
    """

    def __init__(
        self,
        conv: ConvLike,
        in_channels: int | tuple[int, int],
        out_channels: int,
        num_experts: int = 8,
        router: RouterLike | None = "token_choice",
        k: int = 1,
        *,
        route_on: RouteOn = "input",
        router_kwargs: Mapping[str, Any] | None = None,
        local: bool | None = None,
        backend: Backend = "auto",
        check_finite: bool = False,
        **conv_kwargs: Any,
    ) -> None:
        check_count("num_experts", num_experts)
        check_count("k", k)
        if k > num_experts:
            raise ValueError(f"k: got {k}, expected at most num_experts={num_experts}")
        check_choice("route_on", route_on, get_args(RouteOn))
        check_choice("backend", backend, get_args(Backend))
        widths = (in_channels, in_channels) if isinstance(in_channels, int) else tuple(in_channels)
        for name, width in (("in_channels", min(widths)), ("out_channels", out_channels)):
            check_count(name, width)
        experts = _build_experts(conv, conv_kwargs, in_channels, out_channels, num_experts, local, backend)
        takes = _forward_arguments(experts)
        dim = {"input": widths[1], "aggregate": widths[0], "both": sum(widths)}[route_on]
        if isinstance(experts, AggregateOnce) and route_on != "input":
            dim += _aggregate_width(experts, widths[0]) - widths[0]
        built = None
        if router is not None:
            built = build_router(router, dim, num_experts, k, router_kwargs)
            built.check_finite |= check_finite
        super().__init__(built, num_experts, k if built is None else built.k)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.route_on = route_on
        self.experts = experts
        self._widths = widths
        self._takes = takes
        self._mean = SimpleConv(aggr="mean")

    def reset_parameters(self) -> None:
        """Draw router and experts anew."""
        if self.router is not None:
            self.router.reset_parameters()
        self.experts.reset_parameters()

    def routed_parameters(self) -> Iterator[nn.Parameter]:
        return self.experts.parameters()

    def expert(self, index: int) -> MessagePassing:
        """A detached copy of expert ``index`` as a plain PyG conv.

        Raises:
            ValueError: an index outside 0..E-1.
        """
        if not 0 <= index < self.num_experts:
            raise ValueError(f"index: got {index}, expected 0..num_experts-1={self.num_experts - 1}")
        return self.experts.expert(index)

    @overload
    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        edge_index: Adj,
        edge_weight: Tensor | None = ...,
        edge_attr: Tensor | None = ...,
        *,
        batch: Tensor | None = ...,
        routing: Routing | None = ...,
        return_routing: Literal[False] = ...,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        edge_index: Adj,
        edge_weight: Tensor | None = ...,
        edge_attr: Tensor | None = ...,
        *,
        batch: Tensor | None = ...,
        routing: Routing | None = ...,
        return_routing: Literal[True],
    ) -> tuple[Tensor, Routing]: ...
    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        edge_index: Adj,
        edge_weight: Tensor | None = None,
        edge_attr: Tensor | None = None,
        *,
        batch: Tensor | None = None,
        routing: Routing | None = None,
        return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, Routing]:
        """Route and run; see the class. ``routing``: a decision made elsewhere, used in place of the router's."""
        x_src, x_dst = (x, x) if isinstance(x, Tensor) else x
        for name, value, width in (("source", x_src, self._widths[0]), ("destination", x_dst, self._widths[1])):
            if value is None or value.dim() != 2 or value.size(1) != width:
                got = None if value is None else tuple(value.shape)
                raise ValueError(f"x: got {name} nodes of shape {got}, expected (number of nodes, {width})")
        edge_args = self._edge_arguments(edge_weight=edge_weight, edge_attr=edge_attr)
        check_batch(batch, x_dst.size(0))
        graph = Graph(edge_index, x_src.size(0), x_dst.size(0), edge_args, self._flow, x_src is not x_dst)
        router_needs_it = routing is None and self.route_on != "input"
        skip = self.experts.transforms_first and not router_needs_it
        aggregate = None if skip else self.experts.aggregate(x_src, graph)
        if routing is None:
            routing = self._route(x_src, x_dst, aggregate, graph, batch)
        elif (routing.num_tokens, routing.num_experts) != (x_dst.size(0), self.num_experts):
            raise ValueError(
                f"routing: got {routing.num_tokens} tokens and {routing.num_experts} experts, expected "
                f"{x_dst.size(0)} and {self.num_experts}"
            )
        y = self.experts(x_src, x_dst, aggregate, graph, routing)
        return (y, routing) if return_routing else y

    def _route(
        self, x_src: Tensor, x_dst: Tensor, aggregate: Tensor | None, graph: Graph, batch: Tensor | None
    ) -> Routing:
        if self.router is None:
            raise ValueError("routing: got None, expected a Routing, since the layer was built with router=None")
        seen = self._seen(x_src, x_dst, aggregate, graph)
        edges = None
        if getattr(self.router, "scope", None) == "neighbours":
            if x_src is not x_dst:
                raise ValueError("x: got bipartite input, expected one set of nodes for a vote among neighbours")
            edges = graph.edge_index
        routing: Routing = self.router(seen, batch, edges)
        return routing

    def _seen(self, x_src: Tensor, x_dst: Tensor, aggregate: Tensor | None, graph: Graph) -> Tensor:
        """What the router sees of each destination."""
        if self.route_on == "input":
            return x_dst
        if aggregate is None:
            aggregate = self._mean((x_src, x_dst), graph.edge_index, size=(graph.num_src, graph.num_dst))
        return aggregate if self.route_on == "aggregate" else torch.cat([x_dst, aggregate], dim=-1)

    @property
    def _flow(self) -> str:
        return str(_convs(self.experts)[0].flow)

    def _edge_arguments(self, **given: Tensor | None) -> dict[str, Tensor]:
        args = {name: value for name, value in given.items() if value is not None}
        for name in args:
            if name not in self._takes:
                legal = sorted(self._takes & set(given)) or "none"
                raise ValueError(f"{name}: got a tensor, but the conv takes {legal} of edge_weight and edge_attr")
        return args

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, num_experts={self.num_experts}, route_on={self.route_on!r}"


@dataclass(frozen=True)
class _Make:
    """Makes the conv of an expert. A class, not a closure, so that layers can be pickled."""

    factories: list[Callable[[Any, int], MessagePassing]]
    in_channels: int | tuple[int, int]
    out_channels: int

    def __call__(self, expert: int) -> MessagePassing:
        built = self.factories[expert](self.in_channels, self.out_channels)
        if not isinstance(built, MessagePassing):
            raise ValueError(
                f"conv: got a factory of {type(built).__name__}, expected one of PyG MessagePassing layers"
            )
        return built


def _build_experts(
    conv: ConvLike,
    conv_kwargs: Mapping[str, Any],
    in_channels: int | tuple[int, int],
    out_channels: int,
    num_experts: int,
    local: bool | None,
    backend: Backend,
) -> ConvExperts:
    one_kind = isinstance(conv, str) or callable(conv)
    kinds: list[str | ConvFactory] = [conv] * num_experts if one_kind else list(conv)  # type: ignore[list-item,arg-type]
    if len(kinds) != num_experts:
        raise ValueError(f"conv: got a list of {len(kinds)} convs, expected num_experts={num_experts}")
    factories = [conv_factory(kind, conv_kwargs) for kind in kinds]

    make = _Make(factories, in_channels, out_channels)
    samples = [make(expert) for expert in (range(num_experts) if not one_kind else range(min(2, num_experts)))]
    own: set[int] = set()
    for sample in samples:
        ids = {id(p) for p in sample.parameters()}
        if own & ids:
            raise ValueError("conv: got a factory whose convs share parameters, expected fresh ones at each call")
        own |= ids
    if one_kind and AggregateOnce.accepts(samples[0]) and local is None:
        return AGGREGATE_ONCE[type(samples[0])](make, num_experts, backend)
    flags = [_takes_local_path(sample, in_channels, local) for sample in samples]
    if one_kind:
        flags = flags[:1] * num_experts
    if not all(flags):
        names = sorted({type(sample).__name__ for sample, flag in zip(samples, flags, strict=False) if not flag})
        warnings.warn(
            f"{', '.join(names)} runs on the whole graph for every expert, so that its cost follows num_experts, not "
            "k; if its output at a node follows from the node's in-edges alone, pass local=True",
            stacklevel=3,
        )
    return SeparateExperts(make, num_experts, flags)


def _takes_local_path(conv: MessagePassing, in_channels: int | tuple[int, int], local: bool | None) -> bool:
    if local is False or (local is None and type(conv) not in LOCAL):
        return False
    if any(parameter.is_meta for parameter in conv.parameters()):  # nothing to run
        return True
    try:
        verified = is_local(conv, in_channels)
    except Exception as error:
        if local is None:
            return False
        raise ValueError(
            f"local: got True, but {type(conv).__name__} fails on a small random graph: {error}"
        ) from error
    if local and not verified:
        raise ValueError(
            f"local: got True, but {type(conv).__name__} gives another output on a node's in-edges than on the whole "
            "graph; expected None or False"
        )
    return verified


def _convs(experts: ConvExperts) -> list[Any]:
    """The PyG convs that are run."""
    return list(experts.convs) if isinstance(experts, SeparateExperts) else [experts.prototype]


def _forward_arguments(experts: ConvExperts) -> frozenset[str]:
    """What the forward of all of them takes."""
    takes = [frozenset(inspect.signature(conv.forward).parameters) for conv in _convs(experts)]
    return frozenset.intersection(*takes)


def _aggregate_width(experts: AggregateOnce, in_channels: int) -> int:
    """Width of the aggregate, which several aggregations side by side widen."""
    x = torch.zeros(1, in_channels)
    graph = Graph(torch.zeros(2, 1, dtype=torch.long), 1, 1, {})
    return copy.deepcopy(experts).aggregate(x, graph).size(1)  # a copy, since some convs cache their first graph
