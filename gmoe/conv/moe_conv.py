"""MoEConv: experts inside message passing. Shapes: T tokens (destinations), D width, E experts, K experts a token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing, SimpleConv
from torch_geometric.typing import Adj

from gmoe._checks import check_choice, check_count
from gmoe.conv.build import build_experts, count_experts
from gmoe.conv.experts import ConvExperts
from gmoe.conv.graph import Graph, check_batch, parameters_of
from gmoe.conv.pieces import Pieces
from gmoe.conv.registry import ConvFactory, ConvLike
from gmoe.conv.seen import RouteOn, aggregate_width, columns_of, joined, route_parts, seen
from gmoe.dispatch import Backend
from gmoe.moe import MoELayer
from gmoe.routers import RouterLike, build_router
from gmoe.routing import Routing


class MoEConv(MoELayer):
    r"""A mixture of E graph convolutions of which each node runs K; a drop-in for a PyG conv.

    .. math::
        x_i' = \sum_{e \in \mathrm{experts}(i)} w_{ie} \; \mathrm{conv}_e(x, A)_i

    Equal, in outputs and gradients, to running E convs on the whole graph and masking, at a cost that follows K:

    - GCN, SAGE, GraphConv and GIN aggregate once, and each row meets only its experts in one grouped product (where E
      times the output is narrower than the input, they transform first, unless the router needs the aggregate);
    - GAT, GATv2 and TransformerConv send K messages an edge. What they transform is each (source, expert) pair that an
      edge asks for, at most min(K · edges, E · N) of them: on dense graphs this part grows with E;
    - other local convs (a node's output follows from its in-edges and their ends) run on the in-edges of each expert's
      nodes; verified by a float64 probe at construction;
    - anything else runs on the whole graph for each expert, with a warning that its cost follows E.

    A node without an expert gets zero; the model around adds the residual. Can be differentiated once:
    ``create_graph=True`` is refused.

    Args:
        conv: a PyG conv class, its name (``"gcn"``, ``"sage"``, ``"graph"``, ``"gin"``, ``"gat"``, ...), a factory
            ``(in_channels, out_channels, **conv_kwargs) -> conv``, or a list of those, one an expert. ``GINConv`` and
            ``GINEConv`` by class or name get PyG's two-layer perceptron.
        in_channels: width of the nodes; a tuple ``(source, destination)`` for bipartite input where the conv takes it.
        out_channels: passed to the conv (GAT with ``heads`` returns ``heads * out_channels``).
        num_experts: E (default 8, or the length of a list of convs).
        router: name, factory or instance (default ``"token_choice"``); ``None`` where every call brings ``routing=``.
        k: K, experts per node (default 1).
        route_on: what the router sees: the node's ``"input"`` (default), the ``"aggregate"`` of its neighbours (the
            conv's own where all experts share it, else the mean over in-edges), ``"both"`` of them, its ``"degree"``
            (log(1 + in-degree)), or a sequence of these.
        shared_expert: one more expert that runs on every node, with weight 1, beside the routed ones: ``True`` for
            one of their kind (of a list, the first), or a conv as in ``conv`` (default ``False``).
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
        num_experts: int | None = None,
        router: RouterLike | None = "token_choice",
        k: int = 1,
        *,
        route_on: RouteOn = "input",
        shared_expert: bool | str | ConvFactory = False,
        router_kwargs: Mapping[str, Any] | None = None,
        local: bool | None = None,
        backend: Backend = "auto",
        check_finite: bool = False,
        **conv_kwargs: Any,
    ) -> None:
        num_experts = count_experts(conv, num_experts)
        check_count("k", k)
        if k > num_experts:
            raise ValueError(f"k: got {k}, expected at most num_experts={num_experts}")
        parts = route_parts(route_on)
        check_choice("backend", backend, get_args(Backend))
        widths = (in_channels, in_channels) if isinstance(in_channels, int) else tuple(in_channels)
        for name, width in (("in_channels", min(widths)), ("out_channels", out_channels)):
            check_count(name, width)
        experts = build_experts(conv, conv_kwargs, in_channels, out_channels, num_experts, local, backend)
        built = None
        if router is not None:
            sizes = {"input": widths[1], "aggregate": widths[0], "degree": 1}
            if "aggregate" in parts:
                sizes["aggregate"] = aggregate_width(experts, widths[0])
            built = build_router(router, sum(sizes[part] for part in parts), num_experts, k, router_kwargs)
            built.check_finite |= check_finite
        super().__init__(built, num_experts, k if built is None else built.k)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.route_on = parts
        self.experts = experts
        self.shared: ConvExperts | None = None
        if shared_expert is not False:
            first = conv if isinstance(conv, str) or callable(conv) else conv[0]
            kind = first if shared_expert is True else shared_expert
            self.shared = build_experts(kind, conv_kwargs, in_channels, out_channels, 1, local, backend)
        self._aggregates_alike = shared_expert is True and (isinstance(conv, str) or callable(conv))
        self._widths = widths
        self._mean = SimpleConv(aggr="mean")

    def reset_parameters(self) -> None:
        """Draw router and experts anew."""
        if self.router is not None:
            self.router.reset_parameters()
        self.experts.reset_parameters()
        if self.shared is not None:
            self.shared.reset_parameters()

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
        router_needs_it = routing is None and "aggregate" in self.route_on
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
        if self.shared is not None:
            own = graph.with_args_of(self.shared.prototypes())
            if aggregate is None or not self._aggregates_alike:
                aggregate = self.shared.aggregate(x_src, own)
            y = y + self.shared(x_src, x_dst, aggregate, own, Routing.everyone(x_dst.size(0), y))
        return (y, routing) if return_routing else y

    @torch.no_grad()
    def by_pieces(
        self, x: Tensor, pieces: Pieces, batch: Tensor | None = None, routing: Routing | None = None
    ) -> tuple[Tensor, Routing]:
        """(N, O) the output of all nodes of a large graph, routed at once and computed in pieces; and the routing.

        Raises:
            RuntimeError: a conv looks further than one hop.
        """
        aggregate = None
        if routing is None:
            aggregate = self.experts.aggregate_by_pieces(x, pieces)
            view = aggregate
            if view is None and "aggregate" in self.route_on:
                view = pieces.map(lambda x, piece: self._mean(x, piece.graph.edge_index), x)
            routing = self._decide(seen(self.route_on, x, view, pieces.graph).to(pieces.device), batch, pieces.graph)
        y = self.experts.by_pieces(x, aggregate, pieces, routing)
        if self.shared is not None:
            near = aggregate if self._aggregates_alike else None
            y = y + self.shared.by_pieces(x, near, pieces, Routing.everyone(x.size(0), y))
        return y, routing

    def _route(
        self, x_src: Tensor, x_dst: Tensor, aggregate: Tensor | None, graph: Graph, batch: Tensor | None
    ) -> Routing:
        if self.router is None:
            raise ValueError("routing: got None, expected a Routing, since the layer was built with router=None")
        if "aggregate" in self.route_on and aggregate is None:
            aggregate = self._mean((x_src, x_dst), graph.edge_index, size=(graph.num_src, graph.num_dst))
        if x_src is not x_dst and self._votes_by_neighbours:
            raise ValueError("x: got bipartite input, expected one set of nodes for a vote among neighbours")
        with joined(columns_of(self.route_on, x_dst, aggregate, graph)) as view:
            return self._decide(view, batch, graph)

    @property
    def _votes_by_neighbours(self) -> bool:
        return getattr(self.router, "scope", None) == "neighbours"

    def _decide(self, view: Tensor, batch: Tensor | None, graph: Graph) -> Routing:
        assert self.router is not None
        edges = graph.edge_index.to(view.device) if self._votes_by_neighbours else None
        routing: Routing = self.router(view, batch, edges)
        return routing

    @property
    def _flow(self) -> str:
        return str(self._prototypes()[0].flow)

    def _prototypes(self) -> list[MessagePassing]:
        return self.experts.prototypes() + ([] if self.shared is None else self.shared.prototypes())

    @property
    def edge_names(self) -> frozenset[str]:
        """What some of the experts take per edge, of ``edge_weight`` and ``edge_attr``."""
        return frozenset.union(*map(parameters_of, self._prototypes())) & {"edge_weight", "edge_attr"}

    def _edge_arguments(self, **given: Tensor | None) -> dict[str, Tensor]:
        args = {name: value for name, value in given.items() if value is not None}
        if args:
            for name in args:
                if name not in self.edge_names:
                    legal = sorted(self.edge_names) or "none"
                    raise ValueError(f"{name}: got a tensor, but the conv takes {legal} of edge_weight and edge_attr")
        return args

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, num_experts={self.num_experts}, route_on={self.route_on}"
