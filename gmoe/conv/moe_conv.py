"""MoEConv: experts inside message passing. Shapes: T tokens (destinations), D width, E experts, K experts per token."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from numbers import Integral
from typing import Any, Literal, NoReturn, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch_geometric import EdgeIndex
from torch_geometric.nn import MessagePassing
from torch_geometric.nn.inits import reset, zeros
from torch_geometric.typing import Adj
from torch_geometric.utils import is_sparse

from gmoe._autograd import refuse_transforms
from gmoe._checks import check, check_choice, check_counts, nearest
from gmoe.conv.graph import Graph, parameters_of
from gmoe.conv.kinds import OWN_NETWORK, SOURCES_ALONE, ConvLike, Make, Trial, build_experts, kinds_of
from gmoe.dispatch import Backend
from gmoe.moe import MoELayer, Start, build_layer_router, check_start, drawn_apart
from gmoe.routers import RouterLike
from gmoe.routing import GAIN_SCALE, Routing, described

RouterPart: TypeAlias = Literal["node", "neighbors", "degree"]
RouterInput: TypeAlias = RouterPart | Sequence[RouterPart]
"""``"node"``, ``"neighbors"``, ``"degree"`` (log(1 + in-degree)), or several of them."""


class MoEConv(MoELayer, MessagePassing):
    r"""Run K of E graph convolutions per node; a drop-in for a PyG conv.

    .. math::
        x_i' = \mathrm{conv}_{\mathrm{shared}}(x, A)_i
            + 0.1 \, g \sum_{e \in \mathrm{experts}(i)} w_{ie} \; \mathrm{conv}_e(x, A)_i

    The shared expert runs on every node and the gain g of the routed experts starts at zero, so with the same seed a
    new layer equals the conv it replaces. With ``start="copies"`` or ``"plain"`` there is neither of them.

    Equal, in outputs and gradients, to running E convs on the whole graph and masking. Compute scales with the K
    experts a node uses, not with the total E:

    - GCN, SAGE, GraphConv, GIN, GINE without ``edge_dim`` and filters aggregate once, then run each row's experts;
    - GAT, GATv2 and TransformerConv send K messages per edge. They transform each (source, expert) pair that an edge
      needs, at most min(K · edges, E · N): on dense graphs this part grows with E;
    - other local convs (a node's output follows from its in-edges and their ends) run on the in-edges of each expert's
      nodes; verified by a float64 probe at construction;
    - anything else runs on the whole graph for each expert, with a warning that its cost grows with E.

    A node without an expert gets zero from the routed experts. ``create_graph=True`` is refused. ``to_hetero`` and lazy
    widths (``in_channels=-1``) work; explainers' edge masks act on the experts' messages, not on the router.

    Args:
        conv: a PyG conv class, its name (``"gcn"``, ``"sage"``, ``"graph"``, ``"gin"``, ``"gat"``, ...), a factory
            ``(in_channels, out_channels, *conv_args, **conv_kwargs) -> conv``, or a list with one per expert.
            ``GINConv`` and ``GINEConv`` by class or name get PyG's two-layer MLP.
        in_channels: width of the nodes; a tuple ``(source, destination)`` for bipartite input where the conv takes it;
            -1 to infer it from the first call.
        out_channels: passed to the conv (GAT with ``heads`` returns ``heads * out_channels``).
        *conv_args: the conv's own further arguments. All others are keyword-only.
        num_experts: E (default 8, or the length of a list of convs).
        router: name, factory or instance (default ``"token_choice"``); ``None`` if every call passes ``routing=``.
        k: K, experts per node (default 1).
        router_input: what the router sees: the ``"node"`` (default), its ``"neighbors"`` (the conv's own aggregate
            where all experts share it, else the mean over in-edges), its ``"degree"`` (log(1 + in-degree)), or several.
        start: how the layer starts.

            - ``"shared"`` (default, ``None``): beside a shared expert, a conv of the same kind (of a list, the first)
              that runs on every node with weight 1; the routed experts' output is scaled by a tenth of a learned gain
              that starts at zero.
            - ``"copies"``: all experts are copies of one conv, at the FLOPs of one. The first forward
              is that conv's, since a node's weights sum to 1; other routers are refused
              (``router.sums_to_one``). Token choice by name then has weights of 1
              (``weight="straight_through"``) at K = 1 and, unless ``router_kwargs`` say otherwise,
              does not balance its load: it may leave all nodes to one expert, which is the conv.
              Centroids by name have weights of 1, too. Sparse upcycling, `Komatsuzaki et al., 2023
              <https://arxiv.org/abs/2212.05055>`_.
            - ``"plain"``: independent experts.
        shared_transform: map the input to the output's width once, before router and routed experts; the shared expert
            sees the input itself. For inputs much wider than the output (default ``False``; not with copies).
        router_kwargs: further arguments of the router.
        local: ``True`` declares your own class local (verified), ``False`` disables the local path; either runs the
            convs one by one. ``None`` (default) uses the local path for classes known to be local.
        backend: see :func:`gmoe.grouped_linear`.
        check_finite: the router refuses NaN and infinity (default ``False``; costs a host sync).
        **conv_kwargs: further arguments of every conv.

    Shapes:
        - ``x``: (N, D), or ``((N_src, D_src), (N_dst, D_dst))``; tokens are the destinations.
        - ``edge_index``: (2, M), a :class:`gmoe.Graph`, PyG's ``EdgeIndex``, a ``torch.sparse`` matrix or
          ``SparseTensor`` (N_dst, N_src).
        - ``edge_weight`` (M,), ``edge_attr`` (M, .): where convs take them; also by position, as the conv takes them.
        - ``size``: (N_src, N_dst), only needed where ``x`` is ``(x_src, None)`` and edges know no size. Destinations
          without features are zeros to the router: let it see the ``"neighbors"``.
        - ``batch``: (N_dst,) the graph of each node; the graphs of a PyG ``Batch`` are separate groups.
        - returns (N_dst, out), and the :class:`Routing` too with ``return_routing=True``.

    Raises:
        ValueError: an unknown conv or router; K > E; widths or edges that do not fit; ``local=True`` for a conv that
            is not; a factory whose convs share parameters; a conv with another ``forward``.

    Example:
        >>> conv = MoEConv(GCNConv, 128, 256, num_experts=8, router="expert_choice", k=1)
        >>> h, routing = conv(x, edge_index, return_routing=True)
    """

    def __init__(
        self,
        conv: ConvLike,
        in_channels: int | tuple[int, int],
        out_channels: int | None = None,
        *conv_args: Any,
        num_experts: int | None = None,
        router: RouterLike | None = "token_choice",
        k: int = 1,
        router_input: RouterInput = "node",
        start: Start | None = None,
        shared_transform: bool = False,
        router_kwargs: Mapping[str, Any] | None = None,
        local: bool | None = None,
        backend: Backend = "auto",
        check_finite: bool = False,
        **conv_kwargs: Any,
    ) -> None:
        if isinstance(in_channels, nn.Module):
            raise ValueError(f"in_channels: got a {type(in_channels).__name__}, expected a whole number; {OWN_NETWORK}")
        if out_channels is None:
            raise ValueError("out_channels: got nothing, expected a whole number")
        kinds = kinds_of(conv, num_experts)
        check_counts(k=k, out_channels=out_channels)
        check(k <= len(kinds), "k", k, f"at most num_experts={len(kinds)}")
        check_choice("backend", backend, Backend)
        is_one = isinstance(in_channels, Integral)
        given: Any = (in_channels, in_channels) if is_one else in_channels
        two = isinstance(given, tuple | list) and len(given) == 2
        check(two, "in_channels", repr(in_channels), "a whole number, or two of them")
        for width in given:
            if width != -1:
                check_counts(in_channels=width)
        # NumPy's numbers are taken too, and kept as Python's.
        widths = int(given[0]), int(given[1])
        in_channels = widths[0] if is_one else widths
        out_channels = int(out_channels)
        super().__init__(len(kinds), k)
        self.in_channels, self._widths = in_channels, widths
        self.out_channels = out_channels
        self.router_input = router_parts(router_input)
        self._make = Make(kinds, None, out_channels, conv_args, conv_kwargs)
        self.start = check_start(start)
        fits = self.start != "copies" or (kinds.count(kinds[0]) == len(kinds) and not shared_transform)
        check(fits, "start", "'copies' for several kinds or a shared transform", "'shared' or 'plain'")
        self._shape = shared_transform, local, backend
        self._routing = router, router_kwargs, check_finite
        self.router = None
        self.experts: Any = None
        self.shared_expert: Any = None
        self.transform: Any = None
        self.gain: Any = None
        if -1 in widths:
            self.register_load_state_dict_pre_hook(_needs_widths)
        else:
            self._build(in_channels, widths)

    def _build(self, in_channels: Any, widths: Any) -> None:
        """Shared expert, experts and router, once the widths are known."""
        shared_transform, local, backend = self._shape
        router, router_kwargs, check_finite = self._routing
        make = replace(self._make, in_channels=in_channels)
        alone = replace(make, kinds=[make.kinds[0]])  # of several kinds, the first
        dense = alone(0) if self.start != "plain" else None
        with drawn_apart(dense is not None):
            seen, routed = widths, make
            if shared_transform:
                width = Trial(dense or make(0), in_channels).width or self.out_channels
                self.transform = nn.ModuleList(nn.Linear(wide, width) for wide in dict.fromkeys(widths))
                seen = width, width
                routed = replace(make, in_channels=width if isinstance(in_channels, int) else seen)
            copies = None
            if self.start == "copies":
                copies = [dense, *(copy.deepcopy(dense) for _ in range(1, self.num_experts))]
            self.experts = build_experts(routed, local, backend, copies)
            self.flow = self.experts.flow
            if router is not None:
                # filters, and several aggregations, give several aggregates side by side
                neighbors = getattr(self.experts, "aggregate_width", seen[0])
                dim = router_width(self.router_input, seen[1], neighbors)
                self.router = build_layer_router(
                    self.start, router, dim, self.num_experts, self.k, router_kwargs
                )
                self.router.check_finite |= check_finite
                self.k, self.experts_per_token = self.router.k, self.router.experts_per_token
            if self.start == "shared":
                self.shared_expert = build_experts(alone, local, backend, [dense])
                self.gain = nn.Parameter(torch.zeros(1))
        # the shared expert is of the experts' kind, and can share their aggregate
        self._aggregates_alike = not shared_transform

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        reset(self.shared_expert)
        zeros(self.gain)
        if self.start == "copies" and self.experts is not None:  # there are none while widths are open
            dense = self.experts.expert(0)
            reset(dense)
            self.experts.become(dense)
        with drawn_apart(self.start != "plain"):
            for part in (self.transform, None if self.start == "copies" else self.experts, self.router):
                reset(part)

    def routed_parameters(self) -> Iterator[nn.Parameter]:
        return iter(()) if self.experts is None else self.experts.parameters()

    def expert(self, index: int) -> nn.Module:
        """A detached copy of expert ``index``: a plain PyG conv, with a forward hook for the gain where there is one.

        Raises:
            ValueError: an index outside 0..E-1.
        """
        check(0 <= index < self.num_experts, "index", index, f"0..num_experts-1={self.num_experts - 1}")
        conv = self.experts.expert(index)
        if self.gain is not None:
            conv.register_forward_hook(partial(_times, GAIN_SCALE * self.gain.detach()))
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
        **unknown: Any,
    ) -> Any:
        """Route and run; see the class. ``routing``: a decision made elsewhere, used instead of the router's."""
        if unknown:
            self._refuse_unknown(unknown)
        refuse_transforms()
        if self.experts is None:
            self._complete(x)
        if edge_args:
            edge_weight, edge_attr, size = self._positional(edge_args, edge_weight, edge_attr, size)
        x_src, x_dst = (x, x) if isinstance(x, Tensor) else self._two_sets(x, edge_index, size)
        for nodes, width in zip((x_src, x_dst), self._widths, strict=True):
            dense = nodes.is_floating_point() and nodes.layout is torch.strided
            if nodes.dim() != 2 or nodes.size(1) != width or not dense:
                legal = f"dense floats of shape (nodes, {width}); graphs side by side are one graph, see batch="
                raise ValueError(f"x: got {described(nodes)}, {nodes.layout}, expected {legal}")
        if not torch.is_autocast_enabled(x_src.device.type):
            self._check_dtype(x_src, x_dst)
        sizes = len(x_src), len(x_dst)
        if size is not None or edge_weight is not None or edge_attr is not None:
            self._check_args(sizes, size, edge_weight=edge_weight, edge_attr=edge_attr)
        if isinstance(edge_index, Graph):
            graph = edge_index.fitting(sizes, self.flow, edge_weight, edge_attr)
            if graph.num_dst < sizes[1]:  # a part of a larger one, of which the last nodes are sources only
                x_dst = x_src[: graph.num_dst]
        else:
            graph = Graph(edge_index, sizes, edge_weight=edge_weight, edge_attr=edge_attr, flow=self.flow)
        graph = graph.explained(self) if self.explain else graph

        u_src, u_dst = (x_src, x_dst) if self.transform is None else self._transformed(x_src, x_dst)
        h = self.experts.aggregate(graph, u_src)
        if routing is None and self.router is not None:
            view = u_dst if self.router_input == ("node",) else router_view(self.router_input, u_src, u_dst, h, graph)
            routing = self.router(view, batch, graph.edge_index if x_src is x_dst else None)
        else:
            self._check_routing(routing, graph.num_dst)
        y = self.experts(graph, u_src, u_dst, h, routing)
        if self.shared_expert is not None:
            h = h if self._aggregates_alike and h is not None else self.shared_expert.aggregate(graph, x_src)
            shared = self.shared_expert.on_all(graph, x_src, x_dst, h)
            y = shared.addcmul(y, (GAIN_SCALE * self.gain).to(y.dtype))
        return (y, routing) if return_routing else y

    def view(self, x: Tensor, graph: Graph) -> Tensor:
        """(T, dim) the router's input at a graph's destinations."""
        x_dst = x[: graph.num_dst]
        u_src, u_dst = (x, x_dst) if self.transform is None else self._transformed(x, x_dst)
        h = self.experts.aggregate(graph, u_src) if "neighbors" in self.router_input else None
        return router_view(self.router_input, u_src, u_dst, h, graph)

    def _check_dtype(self, *nodes: Tensor) -> None:
        """Refuse features of another type than the weights of stacked experts, as PyG's layers do."""
        dtype = self.experts.dtype
        for x in nodes:
            if dtype is not None and x.dtype != dtype:
                raise ValueError(f"x: got {x.dtype}, expected {dtype}, the type of the layer's weights")

    def _transformed(self, x_src: Tensor, x_dst: Tensor) -> tuple[Tensor, Tensor]:
        """The nodes as router and routed experts get them."""
        u_dst = self.transform[-1](x_dst)  # that of the sources too, where they are as wide
        return (u_dst if x_src is x_dst else self.transform[0](x_src)), u_dst

    @torch.inference_mode(False)  # for training too
    def _complete(self, x: Any) -> None:
        """Fill in the widths that were left open, and build."""
        pair = tuple(x) if isinstance(x, tuple | list) else (x, x)
        known = len(pair) == 2 and all(isinstance(x, Tensor) and x.dim() == 2 and x.is_floating_point() for x in pair)
        check(known, "x", [*map(described, pair)], "source and destination nodes, since widths are open")
        widths: Any = tuple(x.size(-1) if w == -1 else w for w, x in zip(self._widths, pair, strict=True))
        in_channels = widths[0] if isinstance(self.in_channels, int) and pair[0] is pair[1] else widths
        self._build(in_channels, widths)
        self.in_channels, self._widths = in_channels, widths
        self.to(pair[1]).train(self.training)

    def _two_sets(self, x: Any, edge_index: Any, size: Any) -> tuple[Tensor, Tensor]:
        """Source and destination nodes; destinations without features are zeros, which add nothing to the output."""
        pair = tuple(x) if isinstance(x, tuple | list) else ()
        known = len(pair) == 2 and isinstance(pair[0], Tensor) and isinstance(pair[1], Tensor | None)
        got = [type(nodes).__name__ for nodes in pair] or type(x).__name__
        check(known, "x", got, "a tensor, or a tuple of source and destination nodes")
        x_src, x_dst = pair
        takers = [(type(part.convs()[0]).__name__, part.takes_two_sets) for part in self.parts()]
        takers += [("flow='target_to_source'", self.flow == "source_to_target")]
        for name, fits in takers:
            legal = f"one tensor: {name} takes no bipartite input"
            check(fits or x_src is x_dst, "x", "a tuple of source and destination nodes", legal)
        if x_dst is not None:
            return x_src, x_dst
        readers = sorted({type(conv).__name__ for conv in self._all_convs() if type(conv) not in SOURCES_ALONE})
        legal = f"source and destination nodes, since {', '.join(readers)} reads them"
        check(not readers, "x", "no destination nodes", legal)
        if size is not None:
            number = size[1]
        elif isinstance(edge_index, Graph):
            number = edge_index.num_dst
        elif is_sparse(edge_index):
            number = edge_index.size(0)
        else:
            number = edge_index.sparse_size(1) if isinstance(edge_index, EdgeIndex) else None
        check(number is not None, "size", size, "(sources, destinations), since x has no destination nodes")
        return x_src, x_src.new_zeros(number, self._widths[1])

    def _check_args(self, sizes: tuple[int, int], size: Any, **edge_args: Tensor | None) -> None:
        """Refuse what a call gives beside x and edges."""
        check(size is None or tuple(size) == sizes, "size", size, f"{sizes} source and destination nodes, as x has")
        taken = self.edge_names
        for name, value in edge_args.items():
            check(value is None or name in taken, name, "a tensor", f"None: the conv takes {sorted(taken) or 'none'}")

    def _refuse_unknown(self, unknown: Mapping[str, Any]) -> NoReturn:
        """Refuse arguments of a call that the layer does not have, some of which the conv may have."""
        legal = [name for name in inspect.signature(self.forward).parameters if name not in ("edge_args", "unknown")]
        name, value = next(iter(unknown.items()))
        got = type(value).__name__ if isinstance(value, Tensor) else repr(value)
        of_convs = sorted({type(conv).__name__ for conv in self._all_convs() if name in parameters_of(conv)})
        if of_convs:
            hint = f", since {', '.join(of_convs)} takes it but a layer of experts does not"
        else:
            hint = nearest(name, legal)
        raise ValueError(f"{name}: got {got}, expected one of the arguments {', '.join(legal)}{hint}")

    def _check_routing(self, routing: Any, num_tokens: int) -> None:
        """Refuse a decision made elsewhere that does not fit."""
        check(routing is not None, "routing", None, "a Routing, since the layer was built with router=None")
        if getattr(routing, "num_tokens", None) != num_tokens or routing.num_experts != self.num_experts:
            raise ValueError(f"routing: got {routing!r}, expected {num_tokens} tokens and {self.num_experts} experts")

    def _no_hook(self, hook: Any) -> NoReturn:
        """Refuse hooks of message passing, such as AttentionExplainer's, which would never be called.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"hook: got {hook}, expected none on a MoEConv, which sends no messages itself")

    register_propagate_forward_pre_hook = register_propagate_forward_hook = _no_hook
    register_message_forward_pre_hook = register_message_forward_hook = _no_hook
    register_aggregate_forward_pre_hook = register_aggregate_forward_hook = _no_hook
    register_message_and_aggregate_forward_pre_hook = register_message_and_aggregate_forward_hook = _no_hook
    register_edge_update_forward_pre_hook = register_edge_update_forward_hook = _no_hook

    def _all_convs(self) -> list[MessagePassing]:
        return [conv for part in self.parts() for conv in part.convs()]

    def parts(self) -> list[Any]:
        """The routed experts, and the shared one if there is one."""
        return [part for part in (self.experts, self.shared_expert) if part is not None]

    @property
    def edge_names(self) -> frozenset[str]:
        """The edge arguments that some of the experts take, of ``edge_weight`` and ``edge_attr``."""
        return frozenset().union(*map(parameters_of, self._all_convs())) & {"edge_weight", "edge_attr"}

    def _positional(
        self, edge_args: Sequence[Any], edge_weight: Tensor | None, edge_attr: Tensor | None, size: Any
    ) -> tuple[Any, ...]:
        """Edge weights, edge features and size, with the arguments behind ``edge_index`` in the conv's order."""
        order, *others = {parameters_of(conv)[2 : 2 + len(edge_args)] for conv in self.experts.convs()}
        if others or len(order) < len(edge_args):
            by_name = "edge_weight= or edge_attr= by name, since the experts' convs disagree about their order"
            legal = by_name if others else f"at most {len(order)}"
            raise ValueError(f"forward: got {len(edge_args)} arguments behind edge_index, expected {legal}")
        given = {"edge_weight": edge_weight, "edge_attr": edge_attr, "size": size}
        for name, value in zip(order, edge_args, strict=True):
            if value is not None:
                got, legal = f"{type(value).__name__} by position", "edge_weight, edge_attr or size, once"
                check(given.get(name, "unknown") is None, name, got, legal)
                given[name] = value
        return tuple(given.values())

    __repr__ = nn.Module.__repr__

    def extra_repr(self) -> str:
        widths = f"{self.in_channels}, {self.out_channels}"
        return f"{widths}, num_experts={self.num_experts}, router_input={self.router_input}"


def _times(factor: Tensor, conv: nn.Module, args: Any, out: Tensor) -> Tensor:
    """The output of a conv times a factor, as a hook."""
    return out * factor.to(out)


def _needs_widths(layer: Any, state_dict: Any, prefix: str, *_: Any) -> None:
    """Refuse the state of a built layer while there is nothing to load it into, which strict=False would not notice."""
    if layer.experts is None and any(name.startswith(prefix) for name in state_dict):
        raise RuntimeError(
            f"in_channels: got {layer.in_channels}, expected a call to fill it in before a state is loaded"
        )


def router_parts(router_input: RouterInput) -> tuple[RouterPart, ...]:
    """The parts of what the router sees, in a fixed order.

    Raises:
        ValueError: an unknown part, or none.
    """
    named = (router_input,) if isinstance(router_input, str) else tuple(router_input)
    for name in named:
        check_choice("router_input", name, RouterPart)
    check(named, "router_input", "nothing", "one or several of 'node', 'neighbors', 'degree'")
    return tuple(part for part in get_args(RouterPart) if part in named)


def router_width(parts: Sequence[RouterPart], node: int, neighbors: int) -> int:
    """The columns of :func:`router_view`."""
    return sum({"node": node, "neighbors": neighbors, "degree": 1}[part] for part in parts)


def router_view(
    parts: Sequence[RouterPart], x_src: Tensor, x_dst: Tensor, neighbors: Tensor | None, graph: Graph
) -> Tensor:
    """(T, dim) the parts side by side; the neighbors' is the mean over in-edges where it is not given."""
    columns: dict[str, Any] = {"node": x_dst, "neighbors": neighbors}
    if "neighbors" in parts and neighbors is None:
        columns["neighbors"] = graph.mean(x_src)
    if "degree" in parts:
        columns["degree"] = graph.edges.degree.to(x_dst.device, x_dst.dtype).log1p()[:, None]
    return columns[parts[0]] if len(parts) == 1 else torch.cat([columns[part] for part in parts], dim=-1)
