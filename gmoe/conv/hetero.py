"""Relational layers on heterogeneous graphs: RelationalConv, and HeteroMoEConv, a mixture of them.

Shapes: T tokens (the nodes of a type), D, I, O widths, M edges of a relation, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch_geometric.nn.inits import reset
from torch_geometric.nn.module_dict import ModuleDict
from torch_geometric.typing import Adj, EdgeType, Metadata, NodeType

from gmoe._autograd import refuse_transforms
from gmoe._checks import check, check_choice, check_count, check_counts
from gmoe.conv.graph import Graph, check_batch
from gmoe.dispatch import Backend, combine, dispatch, routed_linear
from gmoe.experts import LinearExperts
from gmoe.moe import MoELayer, drawn_apart
from gmoe.routers import Router, RouterLike, build_router
from gmoe.routing import GAIN_SCALE, AuxLoss, Routing

Aggr: TypeAlias = Literal["mean", "sum"]
HeteroRouterLike: TypeAlias = RouterLike | Mapping[NodeType, RouterLike]
"""One :data:`RouterLike` for all node types, or one for each."""

RouterPart: TypeAlias = Literal["node", "neighbors"]
HeteroRouterInput: TypeAlias = RouterPart | Sequence[RouterPart]
"""What a router sees of a node: itself, the aggregates of its neighbors, or both."""

NodeTensors: TypeAlias = Mapping[NodeType, Tensor]
RelationEdges: TypeAlias = Mapping[EdgeType, Adj | Graph]


class RelationalConv(nn.Module):
    r"""A dense relational layer: R-GCN (Schlichtkrull et al., 2018), as in OGB's ogbn-mag example.

    .. math::
        x_i' = W_{\tau(i)} x_i + \sum_r W_r \, \mathrm{mean}_{j \in N_r(i)} x_j + b_{\tau(i)}

    where :math:`\tau(i)` is the type of the node and r runs over the relations that end in it. It equals
    PyG's ``HeteroConv`` of ``SAGEConv``\ s with one root weight per node type instead of one per relation. It is the
    dense baseline of :class:`HeteroMoEConv`; see there for shapes and for absent types and relations.

    Args:
        in_channels: width of the nodes, of all types or of each.
        out_channels: width of the output.
        metadata: node types and edge types, ``data.metadata()``.
        aggr: ``"mean"`` (default) or ``"sum"`` over the in-edges of a relation.
        share_root: one root weight and bias for all node types, as in the paper (default ``False``).
        out_types: node types to compute (default all); there are no parameters for others.
        linear: ``linear(in_channels, out_channels, bias=...)`` makes the map of one part of what a node type sees: the
            nodes themselves, and the aggregate of each relation that ends in them (default ``nn.Linear``).

    Raises:
        ValueError: metadata, widths or edges that do not fit.
    """

    def __init__(
        self,
        in_channels: int | Mapping[NodeType, int],
        out_channels: int,
        metadata: Metadata,
        *,
        aggr: Aggr = "mean",
        share_root: bool = False,
        out_types: Collection[NodeType] | None = None,
        linear: Callable[..., nn.Module] = nn.Linear,
    ) -> None:
        super().__init__()
        check_count("out_channels", out_channels)
        check_choice("aggr", aggr, get_args(Aggr))
        node_types, edge_types = self.metadata = checked_metadata(metadata)
        wanted = node_types if out_types is None else out_types
        for name in wanted:
            check_choice("out_types", name, node_types)
        check(wanted, "out_types", "none", "at least one node type")
        self.relations_into = {t: [r for r in edge_types if r[-1] == t] for t in node_types if t in wanted}
        relations = [relation for into in self.relations_into.values() for relation in into]
        met = {*wanted, *(source for source, *_ in relations)}
        self.in_channels = widths_of(in_channels, [name for name in node_types if name in met])
        self.aggr, self.share_root = aggr, share_root
        width = self.in_channels
        self.root = (
            linear(one_width(width, wanted, "a shared root weight"), out_channels, bias=True)
            if share_root
            else ModuleDict({name: linear(width[name], out_channels, bias=True) for name in self.relations_into})
        )
        self.relation = ModuleDict({r: linear(width[r[0]], out_channels, bias=False) for r in relations})

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        reset(self.root)
        reset(self.relation)

    def maps(self, node_type: NodeType) -> list[Any]:
        """The linear map of each part."""
        root: Any = self.root if self.share_root else self.root[node_type]  # type: ignore[index]
        return [root, *(self.relation[relation] for relation in self.relations_into[node_type])]

    def parts(self, x_dict: NodeTensors, edge_index_dict: RelationEdges) -> dict[NodeType, list[Tensor]]:
        """(T, its width) each part of each type that the layer computes."""
        for relation in edge_index_dict:
            check_choice("edge_index_dict", relation, self.metadata[1])
        for name, width in self.in_channels.items():
            check_features(name, x_dict.get(name), width)
        return {
            name: [x_dict[name], *(self._aggregate(relation, x_dict, edge_index_dict) for relation in relations)]
            for name, relations in self.relations_into.items()
        }

    def _aggregate(self, relation: EdgeType, x_dict: NodeTensors, edge_index_dict: RelationEdges) -> Tensor:
        """(T, D) the mean or sum over in-edges, in float32 at least: many neighbors would overflow half precision."""
        x_src, num_dst = x_dict[relation[0]], len(x_dict[relation[-1]])
        if relation not in edge_index_dict:  # zeros, so that its weight has a gradient
            return x_src.new_zeros(num_dst, x_src.size(1))
        graph = graph_of(relation, edge_index_dict[relation], (len(x_src), num_dst))
        exact = torch.promote_types(x_src.dtype, torch.float32)
        return graph.product(graph.summing(by="values", mean=self.aggr == "mean", dtype=exact), x_src)

    def forward(self, x_dict: NodeTensors, edge_index_dict: RelationEdges) -> dict[NodeType, Tensor]:
        """(T, out) of each node type."""
        return {name: _apply(self.maps(name), parts) for name, parts in self.parts(x_dict, edge_index_dict).items()}

    def extra_repr(self) -> str:
        return f"aggr={self.aggr!r}, share_root={self.share_root}"


class HeteroMoEConv(MoELayer):
    r"""Run K of E relational layers per node, on PyG's ``HeteroData``.

    .. math::
        x_i' = \mathrm{conv}_{\mathrm{shared}}(x)_i
            + g \sum_{e \in \mathrm{experts}(i)} w_{ie} \Big( W_{e,\tau(i)} x_i
            + \sum_r W_{e,r} \, \mathrm{mean}_{j \in N_r(i)} x_j + b_{e,\tau(i)} \Big)

    where :math:`\tau(i)` is the type of the node and r runs over the relations that end in it: an expert is an R-GCN
    layer (:class:`RelationalConv`). The shared expert runs on every node and the gain g starts at zero, so that with
    the same seed a new layer equals the ``RelationalConv`` it replaces; ``shared_expert=False`` is the plain mixture.

    Equal, in outputs and gradients, to running E of them on the whole graph and masking. Each relation is aggregated
    once, and the nodes of a type meet their experts in one grouped product, so that compute scales with K, not E. Parts
    of ``experts`` may be replaced, as those of :class:`MLPExperts` may.

    Each node type has its own router and experts, unless they are tied:

    - ``tie_routers``: one router for the nodes of all types, which are separate groups. As neighbors it sees the mean
      over the relations of a node's type, since types differ in the number of relations.
    - ``tie_experts``: :math:`W_e` and :math:`b_e` instead of :math:`W_{e,\tau}` and :math:`b_{e,\tau}`, so that
      expert e means one thing for all types. The weight of a relation, :math:`W_{e,r}`, is the relation's own either
      way, as in R-GCN.

    A type in which no relation ends keeps its root term. A relation that is absent from a call, or has no edge into a
    node, adds zero. A node without an expert gets zero; the surrounding model adds the residual.

    Args:
        in_channels: width of the nodes, of all types or of each.
        out_channels: width of the output.
        metadata: node types and edge types, ``data.metadata()``.
        num_experts: E (default 8).
        router: a name or factory (default ``"token_choice"``), or a dict of those, or of instances, by node type; with
            ``tie_routers`` a name, factory or instance. ``None`` if every call passes ``routings=``.
        k: K, experts per node (default 1).
        aggr: ``"mean"`` (default) or ``"sum"`` over the in-edges of a relation.
        router_input: what routers see: ``"node"`` (default), ``"neighbors"`` (the aggregates), or both, side by side.
        tie_routers, tie_experts: see above (default ``False``); they need one width for all node types.
        out_types: node types to compute (default all); there are no parameters for others.
        shared_expert: one more layer that runs on every node (default ``True``).
        dense_start: with a shared expert, scale the routed experts' output by a learned gain that starts at zero
            (default ``True``).
        router_kwargs: further arguments of the routers.
        backend: see :func:`gmoe.grouped_linear`.
        check_finite: the routers refuse NaN and infinity (default ``False``; costs a host sync).

    Shapes:
        - ``x_dict``: (T, D) of each node type that is computed, or that a relation into those starts in; T may be 0.
        - ``edge_index_dict``: of each edge type (2, M), PyG's ``EdgeIndex``, a ``torch.sparse`` matrix or
          ``SparseTensor`` (T_dst, T_src), or a :class:`gmoe.Graph`, which is sorted once for all calls. No (M, D)
          messages are stored.
        - ``batch_dict``: (T,) the graph of each node; the graphs of a PyG ``Batch`` are separate groups.
        - returns (T, out) of each node type, and with ``return_routing=True`` the :class:`Routing` of each. The losses
          of a tied router are those of all types together, in equal shares, so that
          ``gmoe.aux_loss(routings.values())`` is right either way.

    Raises:
        ValueError: K > E; metadata, widths, edges or routings that do not fit; a router instance for several node
            types; ``"attention_vote"`` with ``scope="neighbors"``, since neighbors are of other types.

    Example:
        >>> conv = HeteroMoEConv(128, 64, data.metadata(), num_experts=8, router="expert_choice")
        >>> h_dict, routings = conv(data.x_dict, data.edge_index_dict, return_routing=True)
        >>> loss = task_loss(h_dict) + gmoe.aux_loss(routings.values())
    """

    def __init__(
        self,
        in_channels: int | Mapping[NodeType, int],
        out_channels: int,
        metadata: Metadata,
        num_experts: int = 8,
        router: HeteroRouterLike | None = "token_choice",
        k: int = 1,
        *,
        aggr: Aggr = "mean",
        router_input: HeteroRouterInput = "node",
        tie_routers: bool = False,
        tie_experts: bool = False,
        out_types: Collection[NodeType] | None = None,
        shared_expert: bool = True,
        dense_start: bool = True,
        router_kwargs: Mapping[str, Any] | None = None,
        backend: Backend = "auto",
        check_finite: bool = False,
    ) -> None:
        check_counts(num_experts=num_experts, k=k)
        check(k <= num_experts, "k", k, f"at most num_experts={num_experts}")
        relational = partial(
            RelationalConv, in_channels, out_channels, metadata, aggr=aggr, share_root=tie_experts, out_types=out_types
        )
        dense = relational() if shared_expert else None
        with nullcontext() if dense is None else drawn_apart():
            experts = relational(linear=partial(LinearExperts, num_experts=num_experts, backend=backend))
        given = {router_input} if isinstance(router_input, str) else set(router_input)
        parts: tuple[RouterPart, ...] = tuple(part for part in get_args(RouterPart) if part in given)
        known = given and len(parts) == len(given)
        check(known, "router_input", repr(router_input), "'node', 'neighbors', or both of them")
        routers: dict[NodeType, Router] = {}
        for name, like in _router_likes(router, list(experts.relations_into), tie_routers).items():
            dim = _router_dim(experts, name, parts, tie_routers)
            with nullcontext() if dense is None else drawn_apart():
                routers[name] = built = build_router(like, dim, num_experts, k, router_kwargs)
            built.check_finite |= check_finite
            expected = "scope='group', since neighbors differ in type"
            check(getattr(built, "scope", None) != "neighbors", "router", "scope='neighbors'", expected)
        tied = next(iter(routers.values())) if tie_routers and routers else None
        super().__init__(num_experts, k if tied is None else tied.k)
        self.router = tied
        if routers:
            self.experts_per_token = sum(router.experts_per_token for router in routers.values()) / len(routers)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.router_input, self.tie_routers = parts, tie_routers
        self.backend: Backend = backend
        self.experts = experts
        self.routers = ModuleDict({} if tie_routers else routers)
        self.shared_expert = dense
        self.gain = nn.Parameter(torch.zeros(1)) if dense is not None and dense_start else None

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        reset(self.shared_expert)
        if self.gain is not None:
            nn.init.zeros_(self.gain)
        with nullcontext() if self.shared_expert is None else drawn_apart():
            for part in (self.experts, self.router, self.routers):
                reset(part)

    def routed_parameters(self) -> Iterator[nn.Parameter]:
        return self.experts.parameters()

    @torch.no_grad()
    def expert(self, index: int) -> RelationalConv:
        """A detached copy of expert ``index`` as a dense layer, times the gain where there is one.

        Raises:
            ValueError: an index outside 0..E-1.
        """
        check(0 <= index < self.num_experts, "index", index, f"0..num_experts-1={self.num_experts - 1}")
        own = self.experts
        options: Any = {"aggr": own.aggr, "share_root": own.share_root, "out_types": own.relations_into}
        with torch.random.fork_rng(devices=[]):  # to look at an expert must not change what is drawn next
            dense = RelationalConv(own.in_channels, self.out_channels, own.metadata, **options)
        first = next(own.parameters())
        dense.to(device=first.device, dtype=first.dtype)
        for name, parameter in dense.named_parameters():
            stacked = own.get_parameter(name)[index] * (1 if self.gain is None else GAIN_SCALE * self.gain)
            parameter.copy_(stacked.T if stacked.dim() == 2 else stacked)
        return dense.train(self.training)

    def forward(
        self,
        x_dict: NodeTensors,
        edge_index_dict: RelationEdges,
        *,
        batch_dict: NodeTensors | None = None,
        routings: Mapping[NodeType, Routing] | None = None,
        return_routing: bool = False,
    ) -> dict[NodeType, Tensor] | tuple[dict[NodeType, Tensor], dict[NodeType, Routing]]:
        """Route and run; see the class. ``routings``: decisions made elsewhere, used instead of the routers'."""
        refuse_transforms()
        parts = self.experts.parts(x_dict, edge_index_dict)
        sizes = {name: own[0].size(0) for name, own in parts.items()}
        if routings is None:
            decided = self._route(parts, sizes, batch_dict or {})
        else:
            for name, size in sizes.items():
                got = (routings[name].num_tokens, routings[name].num_experts) if name in routings else None
                if got != (expected := (size, self.num_experts)):
                    raise ValueError(f"routings[{name!r}]: got {got} tokens and experts, expected {expected}")
            decided = {name: routings[name] for name in parts}
        out = {}
        for name, own in parts.items():
            followed = decided[name] if self.gain is None else decided[name].scaled(self.gain)
            out[name] = self._mix(self.experts.maps(name), own, followed)
            if self.shared_expert is not None:
                out[name] = out[name] + _apply(self.shared_expert.maps(name), own)
        return (out, decided) if return_routing else out

    def _mix(self, maps: Sequence[Any], parts: Sequence[Tensor], routing: Routing) -> Tensor:
        """(T, O) the experts' outputs: in one product, or map by map where the user put others in their place."""
        if all(map(_is_plain, maps)):
            weight_EIO = torch.cat([part.weight for part in maps], dim=1)
            return routed_linear(parts, weight_EIO, maps[0].bias, routing, self.backend)
        return combine(_apply(maps, [dispatch(x_TI, routing) for x_TI in parts], routing.offsets), routing)

    def _route(
        self, parts: Mapping[NodeType, Sequence[Tensor]], sizes: Mapping[NodeType, int], batch_dict: NodeTensors
    ) -> dict[NodeType, Routing]:
        """A decision for each type; by a tied router one for all, so that its counters advance once, taken apart."""
        for name, size in sizes.items():
            with _naming(f"batch_dict[{name!r}]"):
                check_batch(batch_dict.get(name), size)
        seen = {name: self._seen(*own) for name, own in parts.items()}
        if self.router is None:
            check(len(self.routers), "routings", None, "one of each node type, since router=None")
            return {name: self.routers[name](x, batch_dict.get(name)) for name, x in seen.items()}
        groups = [
            len(seen) * batch_dict.get(name, x_TD.new_zeros(x_TD.size(0), dtype=torch.long)) + index
            for index, (name, x_TD) in enumerate(seen.items())
        ]
        together: Routing = self.router(torch.cat(list(seen.values())), torch.cat(groups))
        losses = {key: AuxLoss(loss.value, loss.coefficient / len(seen)) for key, loss in together.losses.items()}
        tokens = torch.arange(together.num_tokens, device=together.token.device).split(list(sizes.values()))
        return {name: replace(together.select(own), losses=losses) for name, own in zip(seen, tokens, strict=True)}

    def _seen(self, node: Tensor, *neighbors: Tensor) -> Tensor:
        """(T, dim) what the router sees of the nodes of a type."""
        if self.tie_routers and "neighbors" in self.router_input:
            neighbors = (torch.stack(neighbors).mean(dim=0) if neighbors else torch.zeros_like(node),)
        columns = {"node": (node,), "neighbors": neighbors}
        return torch.cat([column for part in self.router_input for column in columns[part]], dim=-1)

    def extra_repr(self) -> str:
        sizes = f"{self.in_channels}, {self.out_channels}, num_experts={self.num_experts}"
        return f"{sizes}, router_input={self.router_input}, tie_routers={self.tie_routers}"


def _apply(maps: Sequence[Any], parts: Sequence[Tensor], *args: Any) -> Tensor:
    """(.., O) the sum over parts of what its map makes of each."""
    out: Tensor = maps[0](parts[0], *args)
    for linear, x in zip(maps[1:], parts[1:], strict=True):
        out = out + linear(x, *args)
    return out


def _is_plain(part: nn.Module) -> bool:
    """Whether a product with its weight is all that a call does: not replaced, and without hooks."""
    hooks = (part._forward_pre_hooks, part._forward_hooks, part._backward_pre_hooks, part._backward_hooks)
    return type(part) is LinearExperts and "forward" not in part.__dict__ and not any(hooks)


def _router_dim(experts: RelationalConv, node_type: NodeType, parts: Sequence[RouterPart], tie_routers: bool) -> int:
    """The width of what the router of a node type, or of all types, sees."""
    for name, into in experts.relations_into.items():
        expected = f"'node' or both, since no relation ends in {name!r}"
        check(into or "node" in parts, "router_input", "'neighbors'", expected)
    if tie_routers:
        return len(parts) * one_width(experts.in_channels, experts.in_channels, "tie_routers=True")
    neighbors = sum(experts.in_channels[source] for source, *_ in experts.relations_into[node_type])
    widths = {"node": experts.in_channels[node_type], "neighbors": neighbors}
    return sum(widths[part] for part in parts)


def _router_likes(
    router: HeteroRouterLike | None, node_types: Sequence[NodeType], tie_routers: bool
) -> dict[NodeType, RouterLike]:
    """What to build for each node type; under the first type alone where their routers are tied."""
    if router is None:
        return {}
    if isinstance(router, Mapping) and (tie_routers or set(router) != set(node_types)):
        expected = "one router, since tie_routers=True" if tie_routers else f"one router for each of {node_types}"
        raise ValueError(f"router: got a dict for {list(router)}, expected {expected}")
    named = node_types[:1] if tie_routers else node_types
    likes = {name: router[name] if isinstance(router, Mapping) else router for name in named}
    instances = [id(like) for like in likes.values() if isinstance(like, Router)]
    expected = "a name, a factory, a dict with an instance for each, or tie_routers=True"
    check(len(set(instances)) == len(instances), "router", "one instance for several node types", expected)
    return likes


@contextmanager
def _naming(argument: str) -> Iterator[None]:
    """Say in an error which entry of a dict it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from error


def graph_of(relation: EdgeType, adj: Adj | Graph, size: tuple[int, int]) -> Graph:
    """The graph of a relation between so many sources and destinations.

    Raises:
        ValueError: it is one of other numbers, or its edges do not fit.
    """
    with _naming(f"edge_index_dict[{relation}]"):
        if not isinstance(adj, Graph):
            return Graph(adj, size)
        if (adj.num_src, adj.num_dst) != size:
            got = f"{adj.num_src} sources and {adj.num_dst} destinations"
            raise ValueError(f"edge_index: got a Graph of {got}, expected {size[0]} and {size[1]}")
        return adj


def checked_metadata(metadata: Metadata) -> Metadata:
    """The node types, and the edge types between them.

    Raises:
        ValueError: there are none; one occurs twice; an edge type starts or ends elsewhere.
    """
    node_types, edge_types = list(metadata[0]), [tuple(edge_type) for edge_type in metadata[1]]
    check(node_types, "metadata", "no node types", "at least one")
    for kind, names in (("node", node_types), ("edge", edge_types)):
        check(len(set(names)) == len(names), "metadata", f"{kind} types {names}", "each of them once")
    for edge in edge_types:
        between = len(edge) == 3 and {edge[0], edge[-1]} <= set(node_types)
        expected = f"(source, relation, destination) between the node types {node_types}"
        check(between, "metadata", f"edge type {edge}", expected)
    return node_types, edge_types


def check_features(node_type: NodeType, x: Tensor | None, width: int) -> None:
    """Refuse features of a node type that are missing, or of another width."""
    if x is None or x.dim() != 2 or x.size(1) != width:
        got = None if x is None else f"shape {tuple(x.shape)}"
        raise ValueError(f"x_dict[{node_type!r}]: got {got}, expected (number of nodes, {width})")


def widths_of(in_channels: int | Mapping[NodeType, int], node_types: Sequence[NodeType]) -> dict[NodeType, int]:
    """The width of each of these node types.

    Raises:
        ValueError: one is missing, or no whole number of at least 1.
    """
    if isinstance(in_channels, Mapping):
        missing = [name for name in node_types if name not in in_channels]
        check(not missing, "in_channels", dict(in_channels), f"widths of {missing} too")
    else:
        in_channels = dict.fromkeys(node_types, in_channels)
    for name in node_types:
        check_count("in_channels", in_channels[name])
    return {name: in_channels[name] for name in node_types}


def one_width(widths: Mapping[NodeType, int], node_types: Collection[NodeType], reason: str) -> int:
    """The width that all of these node types have.

    Raises:
        ValueError: they differ.
    """
    found = {name: widths[name] for name in widths if name in node_types}
    check(len(set(found.values())) == 1, "in_channels", f"{found} with {reason}", "one width for all node types")
    return next(iter(found.values()))
