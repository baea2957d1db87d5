"""MoEConv: a router, and experts that are graph convolutions.

Shapes: N nodes (N_src sources, N_dst destinations), T tokens (the destinations of the graph), D
width, M edges, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing
from torch_geometric.nn.inits import reset, zeros
from torch_geometric.typing import Adj

from gmoe._autograd import autocasts, refuse_transforms
from gmoe._checks import check, check_counts, described, parameters_of, refuse_functions
from gmoe._torch import dtype_of
from gmoe.conv.arguments import (
    given_widths,
    read_call,
    side_by_side,
    two_widths,
)
from gmoe.conv.base import GAIN_SCALE, ConvExperts, times
from gmoe.conv.build import build_experts
from gmoe.conv.call import Call
from gmoe.conv.explain import sends_no_messages
from gmoe.conv.graph import Graph
from gmoe.conv.kinds import (
    ConvLike,
    Make,
    kinds_of,
)
from gmoe.conv.open_widths import OpenWidths, first_call
from gmoe.conv.router_input import (
    RouterInput,
    router_features,
    router_parts,
    router_width,
)
from gmoe.moe import MoELayer
from gmoe.routers import Router, RouterLike
from gmoe.routing import Routing, checked_routing
from gmoe.stack import share_base
from gmoe.start import Start, build_layer_router, drawn_apart, resolved_start


@dataclass(frozen=True)
class _BuildOptions:
    """The constructor's arguments that :meth:`MoEConv._build` needs once the widths are known."""

    router: RouterLike | None
    router_kwargs: Mapping[str, Any] | None
    local: bool | None


@sends_no_messages
class MoEConv(OpenWidths, MoELayer, MessagePassing):
    r"""Run K of E graph convolutions per node; a drop-in for a PyG conv.

    .. math::
        x_i' = \sum_{e \in \mathrm{experts}(i)} w_{ie} \; \mathrm{conv}_e(x, A)_i

    By default a shared expert runs on every node beside the routed experts, whose gain g starts at
    zero:

    .. math::
        x_i' = \mathrm{conv}_{\mathrm{shared}}(x, A)_i
            + 0.1 \, g \sum_{e \in \mathrm{experts}(i)} w_{ie} \; \mathrm{conv}_e(x, A)_i

    With ``start="copies"``, all experts start as one conv and a node's weights sum to 1. Either
    way, a new layer equals the conv that it replaces, drawn with the same seed.

    The outputs and gradients equal those of running E convs on the whole graph and masking. Compute
    scales with the K experts a node uses, not with the total E:

    - GCN, SAGE, GraphConv, GIN, GINE without ``edge_dim`` aggregate once, then run each
      row's experts. A batch norm in GIN's network is each expert's own, over the rows that the
      expert gets: in training a swap differs from the dense conv by that;
    - GAT, GATv2 and TransformerConv send K messages per edge. They transform each (source, expert)
      pair that an edge needs, at most min(K · edges, E · N): on dense graphs this part grows
      with E;
    - other local convs (a node's output depends only on its in-edges and their ends) run on the
      in-edges of each expert's nodes; verified by a float64 probe at construction;
    - anything else runs on the whole graph for each expert, with a warning that its cost grows
      with E.

    A node without an expert gets zero from the routed experts. The layer can be differentiated
    twice (``create_graph=True``), as forces need; compiled, it cannot: torch refuses.
    ``to_hetero`` and lazy widths (``in_channels=-1``) work; explainers' edge masks act on the
    experts' messages, and on the router only by the sum over neighbors that it may see.

    The layer is a ``MessagePassing`` module although it sends no messages itself: PyG's explainers
    and ``to_hetero`` look for that class.

    Args:
        conv: a PyG conv class, its name (``"gcn"``, ``"sage"``, ``"graph"``, ``"gin"``, ``"gat"``,
            ...), a factory ``(in_channels, out_channels, *conv_args, **conv_kwargs) -> conv``, or a
            list with one per expert. ``GINConv`` and ``GINEConv`` by class or name get PyG's
            two-layer MLP.
        in_channels: width of the nodes; a tuple ``(source, destination)`` for bipartite input if
            the conv takes it; -1 to infer it from the first call, which makes the parameters: call
            it under ``torch.no_grad()`` before the optimizer is made.
        out_channels: passed to the conv (GAT with ``heads`` returns ``heads * out_channels``).
        *conv_args: the conv's own further arguments. All others are keyword-only.
        num_experts: E (default 8, or the length of a list of convs).
        router: name, factory or instance (default ``"token_choice"``); ``None`` if every call
            passes ``routing=``.
        k: K, experts per node (default 1).
        router_input: what the router sees: the ``"node"``, its ``"neighbors"`` (the conv's own
            aggregate if all experts share it, else the mean over in-edges), its ``"degree"``
            (log(1 + in-degree)), or several. By default (``None``) the node and its neighbors for
            copies, unless the router is an instance, and the node beside a shared expert. To send
            all nodes of a graph to the same experts, route its mean and pass
            ``routing=graphs.expand(batch)``, see :meth:`gmoe.Routing.expand`.
        start: how the layer starts (default ``"shared"``; :class:`GNNMoE` has another).

            - ``"copies"``: all experts start as one conv, and nothing runs beside them: at the
              FLOPs of one, if they aggregate once. The weights of expert e are a base, which all
              nodes train, and a difference that starts at zero, see ``gmoe.stack``. Convs
              that run one by one are independent copies. The first forward is the conv's, since a
              node's weights sum to 1; other routers are refused (``router.sums_to_one``). Token
              choice then has weights of 1 (``weight="straight_through"``) at K = 1 and, unless
              ``router_kwargs`` say otherwise, does not balance its load: it may leave all nodes to
              one expert, which is the conv. Centroids have weights of 1, too. A router of your own
              is built as it is.
            - ``"shared"``: a shared expert, a conv of the same kind (of a list, the first), runs on
              every node with weight 1; the routed experts' output is scaled by a tenth of a learned
              gain that starts at zero.
            - ``"plain"``: independent experts.
        router_kwargs: further arguments of the router.
        local: ``True`` declares your own class local, ``False`` disables the local path; both run
            the convs one by one. ``None`` (default) uses the local path for classes known to be
            local. ``True`` is verified in evaluation, by the first call where a small random graph
            will not do. A batch norm then sees the nodes of an expert and, if the conv transforms
            nodes before it sends them, those that send to them.
        **conv_kwargs: further arguments of every conv.

    Shapes:
        - ``x``: (N, D), or ``((N_src, D_src), (N_dst, D_dst))``; tokens are the destinations. Or
          (B, N, D): B graphs with the same edges, each a group, which return (B, N, out); a routing
          is that of their nodes one after the other.
        - ``edge_index``: (2, M), a :class:`gmoe.Graph`, PyG's ``EdgeIndex``, a ``torch.sparse``
          matrix or ``SparseTensor`` (N_dst, N_src).
        - ``edge_weight`` (M,), ``edge_attr`` (M, .): if the convs take them; also by position, in
          the conv's order.
        - ``size``: (N_src, N_dst), only needed if ``x`` is ``(x_src, None)`` and the edges do not
          know their size. The router sees zeros for destinations without features: let it see the
          ``"neighbors"``.
        - ``batch``: (N_dst,) the graph of each node; the graphs of a PyG ``Batch`` are separate
          groups.
        - returns (N_dst, out), and the :class:`Routing` too with ``return_routing=True``.

    Raises:
        ValueError: an unknown conv or router; K > E; widths or edges that do not fit;
            ``local=True`` for a conv that is not local; a factory whose convs share parameters; a
            conv with another ``forward``.

    Example:
        >>> conv = MoEConv(GCNConv, 128, 256, num_experts=8, router="expert_choice", k=1)
        >>> h, routing = conv(x, edge_index, return_routing=True)
    """

    def __init__(
        self,
        conv: ConvLike,
        in_channels: int | tuple[int, int] | None = None,
        out_channels: int | None = None,
        *conv_args: Any,
        num_experts: int | None = None,
        router: RouterLike | None = "token_choice",
        k: int = 1,
        router_input: RouterInput | None = None,
        start: Start | None = None,
        router_kwargs: Mapping[str, Any] | None = None,
        local: bool | None = None,
        **conv_kwargs: Any,
    ) -> None:
        kinds = kinds_of(conv, num_experts)
        in_channels, out_channels = given_widths(kinds, in_channels, out_channels, conv_kwargs)
        check_counts(k=k, out_channels=out_channels)
        check(k <= len(kinds), "k", k, f"at most num_experts={len(kinds)}")
        widths = two_widths(in_channels)
        is_one_width = isinstance(in_channels, Integral)
        in_channels = widths[0] if is_one_width else widths
        out_channels = int(out_channels)  # NumPy's numbers are taken too, and kept as Python's

        super().__init__(num_experts=len(kinds), k=k)
        self.in_channels: int | tuple[int, int] = in_channels
        self.widths = widths
        self.out_channels = out_channels
        self._make = Make(kinds, in_channels, out_channels, conv_args, conv_kwargs)
        # By itself a layer starts beside a shared expert: its start follows no router.
        self.start = resolved_start(start, kinds)
        self.router_input = router_parts(router_input, self.start, router)
        self._options = _BuildOptions(router, router_kwargs, local)
        # Set by _build, if the layer has them.
        self.router = None
        self.experts: Any = None
        self.shared_expert: Any = None
        self.gain: Any = None
        # Those that experts took before they were pruned: callers go on to pass them.
        self.edge_names_before: frozenset[str] = frozenset()
        if -1 in widths:
            self._leave_open()
        else:
            self._build(in_channels, widths)

    def _open_dense(self) -> MessagePassing | None:
        if self.start == "plain":
            return None
        try:
            return replace(self._make, kinds=[self._make.kinds[0]])(0)
        except Exception:  # a factory of one's own may need the width: the first call asks it
            return None

    def _build(
        self,
        in_channels: int | tuple[int, int],
        widths: tuple[int, int],
        drawn: MessagePassing | None = None,
    ) -> None:
        """Build the shared expert, the experts and the router, once the widths are known.

        Unless the layer starts plain, its dense conv is drawn first, and nothing after it changes
        torch's generators: with the same seed, the conv and all later layers equal those of a dense
        model.
        """
        options = self._options
        make = replace(self._make, in_channels=in_channels)
        make_dense = replace(make, kinds=[make.kinds[0]])  # of several kinds, the first
        dense: Any = None
        if self.start != "plain":
            with drawn_apart(drawn is not None):
                dense = make_dense(0)
        if drawn is not None and _shapes(drawn) == _shapes(dense):  # PyG's lazy ARMA has others
            dense.to(dtype_of(drawn)).load_state_dict(drawn.state_dict())
        router = shared_expert = gain = None
        with drawn_apart(dense is not None):
            # 1. The routed experts.
            copied = dense if self.start == "copies" else None
            if copied is not None:
                refuse_functions("conv", type(copied).__name__, copied)
            experts = build_experts(make, options.local, copied)
            if copied is not None:
                share_base(experts)

            # 2. The router.
            if options.router is not None:
                router = self._built_router(options.router, experts, widths)

            # 3. The shared expert, and the gain of what is added to it.
            if self.start == "shared":
                shared_expert = build_experts(make_dense, options.local, dense)
                gain = nn.Parameter(torch.zeros(1))

        # Only now, so that a layer whose parts cannot be built stays as it was.
        self.experts = experts
        self.flow = experts.flow
        self.router = router
        if router is not None:
            self.take_costs(router)
        self.shared_expert = shared_expert
        self.gain = gain

    def _built_router(
        self, router: RouterLike, experts: ConvExperts, widths: tuple[int, int]
    ) -> Router:
        """Build the router for what it sees of nodes of these widths."""
        # Several aggregations give several aggregates side by side.
        neighbors = experts.aggregate_width or widths[0]
        dim = router_width(self.router_input, widths[1], neighbors)
        return build_layer_router(
            self.start, router, dim, self.num_experts, self.k, self._options.router_kwargs
        )

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        if self.experts is None:  # while widths are open
            self._reset_open()
            return
        reset(self.shared_expert)
        zeros(self.gain)
        are_copies = self.start == "copies"
        if are_copies:
            dense = self.experts.expert(0)
            reset(dense)
            self.experts.become(dense)
        with drawn_apart(self.start != "plain"):
            if not are_copies:
                reset(self.experts)
            reset(self.router)

    def routed_parameters(self) -> Iterator[nn.Parameter]:
        if self.experts is None:  # while widths are open
            return iter(())
        return self.experts.routed_parameters()

    def expert(self, index: int) -> nn.Module:
        """A detached copy of expert ``index``: a plain PyG conv.

        If the layer has a gain, a forward hook multiplies the conv's output by it.

        Raises:
            ValueError: an index outside 0..E-1.
        """
        last = self.num_experts - 1
        check(0 <= index <= last, "index", index, f"0..num_experts-1={last}")
        conv = self.experts.expert(index)
        if self.gain is not None:
            conv.register_forward_hook(partial(times, GAIN_SCALE * self.gain.detach()))
        return conv

    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        edge_index: Adj | Graph,
        *edge_args: Tensor | None,
        edge_weight: Tensor | None = None,
        edge_attr: Tensor | None = None,
        size: tuple[int, int] | None = None,
        batch: Tensor | None = None,
        routing: Routing | None = None,
        return_routing: bool = False,
        **unknown: object,
    ) -> Tensor | tuple[Any, ...]:
        """Route and run; see the class.

        ``routing`` is a decision made elsewhere; it is used instead of the router's.
        """
        refuse_transforms()
        given: dict[str, Any] = {
            "edge_weight": edge_weight,
            "edge_attr": edge_attr,
            "size": size,
        }
        is_static = isinstance(x, Tensor) and x.dim() == 3
        if is_static or self.experts is None:
            given |= {"batch": batch, "routing": routing, "return_routing": return_routing}
            run: Any = side_by_side if is_static else first_call
            return run(self, x, edge_index, edge_args, given | unknown)

        # 1. Read the call: a graph from sources to destinations, and their features.
        has_more = bool(edge_args or unknown)
        is_odd = has_more or self.explain or any(value is not None for value in given.values())
        if isinstance(x, Tensor) and not is_odd:
            call = self._plain_call(x, edge_index)
        else:
            call = read_call(self, x, edge_index, edge_args, given, unknown)

        # 2. Sum over neighbors once, if all experts share that sum.
        sums_by = routing if self.shared_expert is None else None
        call = call.with_aggregate(self.experts.aggregate(call, sums_by))

        # 3. Route the destinations.
        if routing is None and self.router is not None:
            seen_TD = router_features(self.router_input, call)
            is_one_set = call.x_src is call.x_dst
            token_edges = call.graph.edge_index if is_one_set else None  # edges among the tokens
            routing = self.router(seen_TD, batch, token_edges)
        else:
            routing = checked_routing(routing, call.graph.num_dst, self.num_experts)

        # 4. Run each destination's experts, and add them to the shared expert.
        y = self.experts(call, routing)
        if self.shared_expert is not None:
            if call.aggregate is None:  # else it is of the experts' kind, and has their aggregate
                call = call.with_aggregate(self.shared_expert.aggregate(call))
            shared: Tensor = self.shared_expert.on_all(call)
            y = shared.addcmul(y, (GAIN_SCALE * self.gain).to(y.dtype))
        return (y, routing) if return_routing else y

    def _plain_call(self, x: Tensor, edge_index: Adj | Graph) -> Call:
        """A call with features of one set of nodes, and edges without weights or features."""
        self.check_nodes(x)
        num_nodes = x.size(0)
        graph = Graph.of_call(edge_index, num_nodes, flow=self.flow)
        # Of a part of a larger graph, the last nodes are sources only.
        return Call(graph, x, x if graph.num_dst == num_nodes else x[: graph.num_dst])

    def router_features(self, x: Tensor, graph: Graph) -> Tensor:
        """(T, dim) the router's input at a graph's destinations, the first of its nodes ``x``."""
        call = Call(graph, x, x[: graph.num_dst])
        if "neighbors" in self.router_input:
            call = call.with_aggregate(self.experts.aggregate(call))
        return router_features(self.router_input, call)

    def check_nodes(self, *sets: Tensor) -> None:
        """Refuse features of another width, kind or dtype than the layer's.

        Args:
            *sets: sources and destinations, or one set of nodes that are both.
        """
        for nodes, width in zip(sets, self.widths, strict=False):
            is_dense = nodes.is_floating_point() and nodes.layout is torch.strided
            if nodes.dim() != 2 or nodes.size(1) != width or not is_dense:
                raise ValueError(
                    f"x: got {described(nodes)}, {nodes.layout}, expected dense floats of shape "
                    f"(nodes, {width}), or a tensor of (graphs, nodes, {width})"
                )
        if autocasts(sets[0].device):
            return
        # Stacked experts take one dtype, as PyG's layers do.
        dtype = self.experts.dtype
        for nodes in sets:
            if dtype is not None and nodes.dtype != dtype:
                raise ValueError(
                    f"x: got {nodes.dtype}, expected {dtype}, the type of the layer's weights"
                )

    def renumber(self, kept: Sequence[int]) -> None:
        self.edge_names_before = self.edge_names
        super().renumber(kept)

    def all_convs(self) -> list[MessagePassing]:
        """PyG convs that take the same arguments as the experts, the shared one included."""
        return [conv for part in self.parts() for conv in part.convs()]

    def parts(self) -> list[Any]:
        """The routed experts and, if the layer has one, the shared expert."""
        return [part for part in (self.experts, self.shared_expert) if part is not None]

    @property
    def edge_names(self) -> frozenset[str]:
        """The edge arguments that some expert takes, of ``edge_weight`` and ``edge_attr``."""
        names = self.edge_names_before.union(*map(parameters_of, self.all_convs()))
        return names & {"edge_weight", "edge_attr"}

    __repr__ = nn.Module.__repr__

    def extra_repr(self) -> str:
        widths = f"{self.in_channels}, {self.out_channels}"
        return f"{widths}, num_experts={self.num_experts}, router_input={self.router_input}"


def _shapes(conv: MessagePassing) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in conv.state_dict().items()}
