"""HeteroMoEConv: relational experts. Shapes: T tokens (nodes of a type), D, I, O widths, E experts, P pairs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias, get_args, overload

import torch
from torch import Tensor, nn
from torch_geometric.nn.module_dict import ModuleDict
from torch_geometric.typing import Adj, EdgeType, Metadata, NodeType

from gmoe._checks import check_choice, check_count
from gmoe.conv.graph import check_batch
from gmoe.conv.relational import Aggr, Relational, RelationalConv, one_width
from gmoe.dispatch import Backend
from gmoe.experts import LinearExperts
from gmoe.moe import MoELayer, _holder, claim_router
from gmoe.routed_linear import routed_linear
from gmoe.routers import Router, RouterLike, build_router
from gmoe.routing import AuxLoss, Routing

HeteroRouteOn: TypeAlias = Literal["input", "aggregate", "both"]
HeteroRouterLike: TypeAlias = RouterLike | Mapping[NodeType, RouterLike]
"""One :data:`RouterLike` for all node types, or one for each."""


class HeteroMoEConv(MoELayer):
    r"""A mixture of E relational layers of which each node runs K, on PyG's ``HeteroData``.

    .. math::
        x_i' = \sum_{e \in \mathrm{experts}(i)} w_{ie} \Big( W_{e,\tau(i)} x_i
            + \sum_r W_{e,r} \, \mathrm{mean}_{j \in N_r(i)} x_j + b_{e,\tau(i)} \Big)

    where :math:`\tau(i)` is the type of the node and r runs over the relations that end in it: an expert is an R-GCN
    layer (:class:`RelationalConv`). Equal, in outputs and gradients, to running E of them on the whole graph and
    masking. Each relation is aggregated once, and the rows of a node type meet their experts in one grouped product,
    so that the cost follows K, not E.

    Each node type has a router and experts of its own, or shares them:

    - ``share_router``: one router for the nodes of all types, which are separate pools. As aggregate it sees the mean
      over the relations of a node's type, since types differ in the number of relations.
    - ``share_experts``: :math:`W_e` and :math:`b_e` in place of :math:`W_{e,\tau}` and :math:`b_{e,\tau}`, so that
      expert e means one thing for all types. The weight of a relation, :math:`W_{e,r}`, is the relation's own either
      way, as in R-GCN.

    A type in which no relation ends keeps its root term. A relation that is absent from a call, or has no edge into a
    node, adds zero. A node without an expert gets zero; the model around adds the residual.

    Args:
        in_channels: width of the nodes, of all types or of each.
        out_channels: width of the output.
        metadata: node types and edge types, ``data.metadata()``.
        num_experts: E (default 8).
        router: a name or factory (default ``"token_choice"``), or a dict of those, or of instances, by node type; with
            ``share_router`` a name, factory or instance. ``None`` where every call brings ``routings=``.
        k: K, experts per node (default 1).
        aggr: ``"mean"`` (default) or ``"sum"`` over the in-edges of a relation.
        route_on: what routers see: ``"both"`` (default) the node and its aggregates side by side, ``"input"`` or
            ``"aggregate"``.
        share_router, share_experts: see above (default ``False``); they need one width for all node types.
        out_types: node types to compute (default all); there are no parameters for others.
        router_kwargs: further arguments of the routers.
        backend: see :func:`gmoe.dispatch.grouped_linear`.
        check_finite: the routers refuse NaN and infinity (default ``False``; costs a host sync).

    Shapes:
        - ``x_dict``: (T, D) of each node type that is computed, or that a relation into those starts in; T may be 0.
        - ``edge_index_dict``: of each edge type (2, M), PyG's ``EdgeIndex``, or a ``torch.sparse`` matrix or
          ``SparseTensor`` (T_dst, T_src), with which no (M, D) messages are stored.
        - ``batch_dict``: (T,) the graph of each node; the graphs of a PyG ``Batch`` are separate pools.
        - returns (T, out) of each node type, and with ``return_routing=True`` the :class:`Routing` of each. The losses
          of a shared router are those of all types together, in equal shares, so that
          ``gmoe.aux_loss(routings.values())`` is right either way.

    Raises:
        ValueError: K > E; metadata, widths, edges or routings that do not fit; a router instance for several node
            types; ``"attention_vote"`` with ``scope="neighbours"``, since neighbours are of other types.

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
        route_on: HeteroRouteOn = "both",
        share_router: bool = False,
        share_experts: bool = False,
        out_types: Collection[NodeType] | None = None,
        router_kwargs: Mapping[str, Any] | None = None,
        backend: Backend = "auto",
        check_finite: bool = False,
    ) -> None:
        for name, count in (("out_channels", out_channels), ("num_experts", num_experts), ("k", k)):
            check_count(name, count)
        if k > num_experts:
            raise ValueError(f"k: got {k}, expected at most num_experts={num_experts}")
        check_choice("route_on", route_on, get_args(HeteroRouteOn))
        check_choice("backend", backend, get_args(Backend))
        experts = Relational(
            in_channels,
            metadata,
            lambda width, bias: LinearExperts(width, out_channels, num_experts, bias=bias, backend=backend),
            aggr=aggr,
            out_types=out_types,
            share_root=share_experts,
        )
        likes = _router_likes(router, list(experts.relations_into), share_router)
        dims = _router_dims(experts, route_on, share_router) if likes else {}
        routers = {name: build_router(like, dims[name], num_experts, k, router_kwargs) for name, like in likes.items()}
        for built in routers.values():
            built.check_finite |= check_finite
            if getattr(built, "scope", "pool") != "pool":
                raise ValueError(
                    "router: got scope='neighbours', expected scope='pool', since neighbours differ in type"
                )
        shared = next(iter(routers.values())) if share_router and routers else None
        super().__init__(shared, num_experts, k if shared is None else shared.k)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.route_on = route_on
        self.share_router = share_router
        self.backend: Backend = backend
        self.experts = experts
        self.routers = ModuleDict({} if share_router else routers)
        self._claim_routers()

    def _claim_routers(self) -> None:
        for router in self._routers():
            claim_router(router, self)

    def _routers(self) -> Iterator[Router]:
        return (router for router in self.routers.children() if isinstance(router, Router))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if all(_holder(router) is None for router in self._routers()):
            self._claim_routers()

    def reset_parameters(self) -> None:
        """Draw routers and experts anew."""
        for router in (self.router, *self._routers()):
            if router is not None:
                router.reset_parameters()
        self.experts.reset_parameters()

    @property
    def experts_per_token(self) -> float:
        """Average number of experts of a token, by construction: the mean over the node types."""
        each = [router.experts_per_token for router in self._routers()]
        return sum(each) / len(each) if each else super().experts_per_token

    def routed_parameters(self) -> Iterator[nn.Parameter]:
        return self.experts.parameters()

    @torch.no_grad()
    def expert(self, index: int) -> RelationalConv:
        """A detached copy of expert ``index`` as a dense layer.

        Raises:
            ValueError: an index outside 0..E-1.
        """
        if not 0 <= index < self.num_experts:
            raise ValueError(f"index: got {index}, expected 0..num_experts-1={self.num_experts - 1}")
        own = self.experts
        with torch.random.fork_rng(devices=[]):  # to look at an expert must not change what is drawn next
            dense = RelationalConv(
                own.in_channels,
                self.out_channels,
                own.metadata,
                aggr=own.aggr,
                share_root=own.share_root,
                out_types=own.relations_into,
            )
        first = next(own.parameters())
        dense.to(device=first.device, dtype=first.dtype)
        for name, parameter in dense.named_parameters():
            stacked = own.get_parameter(name)[index]
            parameter.copy_(stacked.T if stacked.dim() == 2 else stacked)
        return dense.train(self.training)

    @overload
    def forward(
        self,
        x_dict: Mapping[NodeType, Tensor],
        edge_index_dict: Mapping[EdgeType, Adj],
        *,
        batch_dict: Mapping[NodeType, Tensor] | None = ...,
        routings: Mapping[NodeType, Routing] | None = ...,
        return_routing: Literal[False] = ...,
    ) -> dict[NodeType, Tensor]: ...
    @overload
    def forward(
        self,
        x_dict: Mapping[NodeType, Tensor],
        edge_index_dict: Mapping[EdgeType, Adj],
        *,
        batch_dict: Mapping[NodeType, Tensor] | None = ...,
        routings: Mapping[NodeType, Routing] | None = ...,
        return_routing: Literal[True],
    ) -> tuple[dict[NodeType, Tensor], dict[NodeType, Routing]]: ...
    def forward(
        self,
        x_dict: Mapping[NodeType, Tensor],
        edge_index_dict: Mapping[EdgeType, Adj],
        *,
        batch_dict: Mapping[NodeType, Tensor] | None = None,
        routings: Mapping[NodeType, Routing] | None = None,
        return_routing: bool = False,
    ) -> dict[NodeType, Tensor] | tuple[dict[NodeType, Tensor], dict[NodeType, Routing]]:
        """Route and run; see the class. ``routings``: decisions made elsewhere, used in place of the routers'."""
        rows = self.experts.rows(x_dict, edge_index_dict)
        decided = self._route(rows, batch_dict or {}) if routings is None else self._checked(routings, rows)
        out = {name: self._mix(name, rows_TI, decided[name]) for name, rows_TI in rows.items()}
        return (out, decided) if return_routing else out

    def _mix(self, node_type: NodeType, rows_TI: Tensor, routing: Routing) -> Tensor:
        weight_EIO, bias_EO = self.experts.weights(node_type)
        return routed_linear([rows_TI], weight_EIO, bias_EO, routing, self.backend)

    def _checked(
        self, routings: Mapping[NodeType, Routing], rows: Mapping[NodeType, Tensor]
    ) -> dict[NodeType, Routing]:
        for name, rows_TI in rows.items():
            got = (routings[name].num_tokens, routings[name].num_experts) if name in routings else None
            expected = (rows_TI.size(0), self.num_experts)
            if got != expected:
                raise ValueError(f"routings[{name!r}]: got {got} tokens and experts, expected {expected}")
        return {name: routings[name] for name in rows}

    def _route(self, rows: Mapping[NodeType, Tensor], batch_dict: Mapping[NodeType, Tensor]) -> dict[NodeType, Routing]:
        for name, rows_TI in rows.items():
            try:
                check_batch(batch_dict.get(name), rows_TI.size(0))
            except ValueError as error:
                raise ValueError(f"batch_dict[{name!r}]: {error}") from error
        if self.router is not None:
            return self._route_together(self.router, rows, batch_dict)
        if not self.routers:
            raise ValueError("routings: got None, expected one of each node type, since router=None")
        return {name: self.routers[name](self._seen(name, x), batch_dict.get(name)) for name, x in rows.items()}

    def _route_together(
        self, router: Router, rows: Mapping[NodeType, Tensor], batch_dict: Mapping[NodeType, Tensor]
    ) -> dict[NodeType, Routing]:
        """One decision for all types, so that its counters advance once; then taken apart."""
        seen, pools = [], []
        for index, (name, rows_TI) in enumerate(rows.items()):
            seen.append(self._seen(name, rows_TI))
            pool_T = torch.full((rows_TI.size(0),), index, device=rows_TI.device)
            pools.append(pool_T + len(rows) * batch_dict[name] if name in batch_dict else pool_T)
        together: Routing = router(torch.cat(seen), torch.cat(pools))
        losses = {key: AuxLoss(loss.value, loss.coefficient / len(rows)) for key, loss in together.losses.items()}
        tokens = torch.arange(together.num_tokens, device=together.token.device).split([len(part) for part in seen])
        return {name: replace(together.select(own), losses=losses) for name, own in zip(rows, tokens, strict=True)}

    def _seen(self, node_type: NodeType, rows_TI: Tensor) -> Tensor:
        """What the router sees of the nodes of a type."""
        widths = self.experts.widths(node_type)
        if self.route_on == "input":
            return rows_TI[:, : widths[0]]
        if not self.share_router:
            return rows_TI if self.route_on == "both" else rows_TI[:, widths[0] :]
        x_TD, *aggregates = rows_TI.split(widths, dim=1)
        mean_TD = torch.stack(aggregates).mean(dim=0) if aggregates else torch.zeros_like(x_TD)
        return mean_TD if self.route_on == "aggregate" else torch.cat([x_TD, mean_TD], dim=-1)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, num_experts={self.num_experts}, route_on={self.route_on!r}, "
            f"share_router={self.share_router}"
        )


def _router_dims(experts: Relational, route_on: HeteroRouteOn, share_router: bool) -> dict[NodeType, int]:
    """The width of what the router of each node type sees."""
    dims = {}
    for name, into in experts.relations_into.items():
        own, *others = experts.widths(name)
        if not into and route_on == "aggregate":
            raise ValueError(
                f"route_on: got 'aggregate', expected 'both' or 'input', since no relation ends in {name!r}"
            )
        if share_router:
            own = one_width(experts.in_channels, experts.in_channels, "share_router=True")
            others = [own]
        dims[name] = {"input": own, "aggregate": sum(others), "both": own + sum(others)}[route_on]
    return dims


def _router_likes(
    router: HeteroRouterLike | None, node_types: Sequence[NodeType], share_router: bool
) -> dict[NodeType, RouterLike]:
    """What to build for each node type; under the first type alone where they share a router."""
    if router is None:
        return {}
    if isinstance(router, Mapping) and (share_router or set(router) != set(node_types)):
        expected = "one router, since share_router=True" if share_router else f"one router for each of {node_types}"
        raise ValueError(f"router: got a dict for {list(router)}, expected {expected}")
    if share_router:
        node_types = node_types[:1]
    likes = {name: router[name] if isinstance(router, Mapping) else router for name in node_types}
    instances = [id(like) for like in likes.values() if isinstance(like, Router)]
    if len(set(instances)) < len(instances):
        raise ValueError(
            "router: got one instance for several node types, expected a name, a factory, a dict with an instance for "
            "each, or share_router=True"
        )
    return likes
