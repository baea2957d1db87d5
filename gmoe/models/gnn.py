"""GNNMoE: a PyG-style GNN with MoEConv layers. Shapes: N nodes, M edges, D width, E experts, K experts a node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args, overload

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing, SimpleConv
from torch_geometric.nn.models.basic_gnn import BasicGNN
from torch_geometric.typing import Adj

from gmoe._checks import check_choice, check_count
from gmoe.conv.build import count_experts
from gmoe.conv.graph import Graph, check_batch, parameters_of
from gmoe.conv.moe_conv import MoEConv
from gmoe.conv.registry import ConvFactory, ConvLike, DenseLayers, conv_factory, make_conv
from gmoe.conv.seen import RouteOn, route_parts, seen
from gmoe.dispatch import Backend
from gmoe.inference import LayerwiseInference
from gmoe.moe import claim_router
from gmoe.routers import Router, RouterLike, build_router
from gmoe.routing import Routing

RoutingMode: TypeAlias = Literal["layer", "shared"]
Residual: TypeAlias = Literal["none", "identity", "linear"]


class GNNMoE(LayerwiseInference, BasicGNN):
    r"""A GNN in the manner of PyG's ``GCN``, ``GraphSAGE``, ..., with :class:`MoEConv` layers and residuals.

    .. math::
        h^{(l+1)} = \mathrm{dropout}(\phi(\mathrm{norm}(\mathrm{MoEConv}_l(h^{(l)}, A) + \mathrm{res}(h^{(l)}))))

    The output is dense: with ``jk=None`` the last layer is a plain conv, otherwise a linear layer follows the last
    conv. So a node that no expert takes keeps its residual and still gets its logits.

    Args:
        in_channels: width of the input.
        hidden_channels: width of the hidden layers.
        out_channels: width of the output, such as the number of classes.
        num_layers: number of convs (default 2).
        conv: see :class:`MoEConv` (default ``"gcn"``).
        router: a name or factory, or an instance where one is all it takes: with ``routing="shared"``, or for a
            single MoE layer (default ``"token_choice"``).
            ``None`` builds the dense control: the same model with plain convs in all layers.
        num_experts: E (default 8, or the length of a list of convs).
        k: K, experts per node (default 1).
        routing: ``"layer"`` (default): each layer has a router of its own, on its own input. ``"shared"``: one router
            decides once for each node, from the raw features and their mean over in-edges, and all layers follow.
        route_on: what routers see: ``"both"`` (default) the node and the aggregate of its neighbours, ``"input"``,
            ``"aggregate"``, ``"degree"``, or several of them.
        route_hops: with ``routing="shared"``, how many times the raw features are averaged over in-edges: the
            aggregates are (Ax, ..., A^hops x) (default 1).
        every: layer ``i`` is a MoEConv where ``i % every == every - 1`` (default 1), the output layer excepted.
        dropout: default 0.
        act, act_first, act_kwargs, norm, norm_kwargs, jk: as in PyG's ``BasicGNN`` (defaults: relu, no norm, no
            jumping knowledge; ``jk="last"`` is a plain output projection).
        residual: ``"identity"`` (default; a linear layer where widths differ), ``"linear"`` always, or ``"none"``. The
            output layer has none.
        shared_expert: one more expert on every node of the MoE layers; see :class:`MoEConv` (default ``False``).
        input_dropout: dropout of the input features (default 0).
        in_proj: begin with a linear layer to ``hidden_channels`` (default ``False``).
        router_kwargs: further arguments of the routers.
        backend, local, check_finite: see :class:`MoEConv`.
        **conv_kwargs: further arguments of the convs. ``heads`` divide ``hidden_channels``, and are averaged in the
            output layer, as in PyG's ``GAT``.

    Shapes:
        - as PyG's ``BasicGNN``, and ``batch`` (N,) also makes the graphs separate pools.
        - returns (N, out_channels), and the list of :class:`Routing` with ``return_routing=True`` (one a MoE layer; a
          shared decision once).

    Raises:
        ValueError: no layer would be a MoE; a router instance for several layers; whatever :class:`MoEConv` refuses.

    Example:
        >>> model = GNNMoE(128, 256, 40, num_layers=3, conv="gcn", router="token_choice")
        >>> logits, routings = model(x, edge_index, return_routing=True)
        >>> loss = F.cross_entropy(logits, y) + gmoe.aux_loss(routings)
    """

    supports_edge_weight = True
    supports_edge_attr = True

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        num_layers: int = 2,
        conv: ConvLike | DenseLayers = "gcn",
        router: RouterLike | None = "token_choice",
        *,
        num_experts: int | None = None,
        k: int = 1,
        routing: RoutingMode = "layer",
        route_on: RouteOn = "both",
        route_hops: int = 1,
        every: int = 1,
        dropout: float = 0.0,
        act: Any = "relu",
        act_first: bool = False,
        act_kwargs: dict[str, Any] | None = None,
        norm: Any = None,
        norm_kwargs: dict[str, Any] | None = None,
        jk: str | None = None,
        residual: Residual = "identity",
        shared_expert: bool | str | ConvFactory = False,
        input_dropout: float = 0.0,
        in_proj: bool = False,
        router_kwargs: Mapping[str, Any] | None = None,
        backend: Backend = "auto",
        local: bool | None = None,
        check_finite: bool = False,
        **conv_kwargs: Any,
    ) -> None:
        sizes = {"in_channels": in_channels, "hidden_channels": hidden_channels, "out_channels": out_channels}
        for name, value in {**sizes, "num_layers": num_layers, "every": every, "route_hops": route_hops}.items():
            check_count(name, value)
        check_choice("routing", routing, get_args(RoutingMode))
        parts = route_parts(route_on)
        if not isinstance(conv, DenseLayers):
            num_experts = count_experts(conv, num_experts)
        num_experts = 8 if num_experts is None else num_experts
        check_choice("residual", residual, get_args(Residual))
        hidden = num_layers if jk is not None else num_layers - 1
        moe_layers = [i for i in range(hidden) if i % every == every - 1] if router is not None else []
        if router is not None and not moe_layers:
            raise ValueError(
                f"every: got {every} with num_layers={num_layers} and jk={jk!r}, which leaves no hidden layer for a "
                "MoE; expected more layers, a smaller every, or jk='last'"
            )
        if routing == "layer" and isinstance(router, Router) and len(moe_layers) > 1:
            raise ValueError("router: got an instance for several layers, expected a name or a factory")
        nn.Module.__init__(self)
        router_args = dict(router_kwargs or {})
        shared: Router | None = None
        if routing == "shared" and router is not None:
            widths = {"input": in_channels, "aggregate": route_hops * in_channels, "degree": 1}
            dim = sum(widths[part] for part in parts)
            shared = build_router(router, dim, num_experts, k, router_args)
            shared.check_finite |= check_finite
        super().__init__(
            hidden_channels if in_proj else in_channels,
            hidden_channels,
            num_layers,
            out_channels,
            dropout=dropout,
            act=act,
            act_first=act_first,
            act_kwargs=act_kwargs,
            norm=norm,
            norm_kwargs=norm_kwargs,
            jk=jk,
            conv=conv,
            moe_layers=moe_layers,
            moe_kwargs={
                "num_experts": num_experts,
                "router": router if shared is None else None,
                "k": k if shared is None else shared.k,
                "route_on": parts if shared is None else "input",
                "shared_expert": shared_expert,
                "router_kwargs": router_args if shared is None else None,
                "backend": backend,
                "local": local,
                "check_finite": check_finite,
            },
            conv_kwargs=conv_kwargs,
        )
        self.in_channels = in_channels
        self.routing = routing
        self.route_on = parts
        self.route_hops = route_hops
        self.moe_layers = moe_layers
        self.input_dropout = nn.Dropout(input_dropout)
        self.lin_in = nn.Linear(in_channels, hidden_channels) if in_proj else None
        self.residuals = nn.ModuleList()
        if residual != "none":
            width = hidden_channels if in_proj else in_channels
            for _ in range(hidden):
                plain = residual == "identity" and width == hidden_channels
                self.residuals.append(nn.Identity() if plain else nn.Linear(width, hidden_channels))
                width = hidden_channels
        self.shared_router = shared
        if shared is not None:
            claim_router(shared, self)
            self._mean = SimpleConv(aggr="mean")
            for layer in moe_layers:  # what the convs cost follows from a router that they do not hold
                self.convs[layer].follow(shared)

    def init_conv(self, in_channels: int | tuple[int, int], out_channels: int, **kwargs: Any) -> Any:
        """The conv of the next layer; called by ``BasicGNN``."""
        layer = len(self.convs)
        conv, conv_kwargs = kwargs["conv"], dict(kwargs["conv_kwargs"])
        if isinstance(conv, DenseLayers):
            conv = conv[layer]
        heads = int(conv_kwargs.get("heads", 1))
        if heads > 1:
            if self.jk_mode is None and layer == self.num_layers - 1:
                conv_kwargs["concat"] = False
            elif conv_kwargs.get("concat", True):
                if out_channels % heads:
                    raise ValueError(f"hidden_channels: got {out_channels}, expected a multiple of heads={heads}")
                out_channels //= heads
        if layer in kwargs["moe_layers"]:
            return MoEConv(conv, in_channels, out_channels, **kwargs["moe_kwargs"], **conv_kwargs)
        if not (isinstance(conv, str) or callable(conv)):
            conv = conv[0]  # of several kinds, the first is the dense one
        return make_conv(conv_factory(conv, conv_kwargs), in_channels, out_channels)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        super().reset_parameters()
        for module in (self.lin_in, self.shared_router, *self.residuals):
            if isinstance(module, nn.Linear | Router):
                module.reset_parameters()

    def decide(self, x: Tensor, edge_index: Adj, batch: Tensor | None = None) -> Routing:
        """The shared routing of all nodes from their raw features.

        Raises:
            ValueError: each layer routes for itself.
        """
        if self.shared_router is None:
            raise ValueError("routing: got 'layer', expected 'shared' to decide once")
        check_batch(batch, x.size(0))
        edges = Graph(edge_index, x.size(0), x.size(0), {}).edge_index
        routing: Routing = self.shared_router(self.router_input(x, edge_index), batch, edges)
        return routing

    def router_input(self, x: Tensor, edge_index: Adj) -> Tensor:
        """(N, dim) what a shared router sees: the raw features and their means over in-edges."""
        graph = Graph(edge_index, x.size(0), x.size(0), {})
        powers = [x]
        if "aggregate" in self.route_on:
            for _ in range(self.route_hops):
                powers.append(self._mean(powers[-1], graph.edge_index))
        aggregate = torch.cat(powers[1:], dim=-1) if len(powers) > 1 else None
        return seen(self.route_on, x, aggregate, graph)

    @overload
    def forward(
        self,
        x: Tensor,
        edge_index: Adj,
        edge_weight: Tensor | None = ...,
        edge_attr: Tensor | None = ...,
        batch: Tensor | None = ...,
        batch_size: int | None = ...,
        num_sampled_nodes_per_hop: list[int] | None = ...,
        num_sampled_edges_per_hop: list[int] | None = ...,
        *,
        return_routing: Literal[False] = ...,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        x: Tensor,
        edge_index: Adj,
        edge_weight: Tensor | None = ...,
        edge_attr: Tensor | None = ...,
        batch: Tensor | None = ...,
        batch_size: int | None = ...,
        num_sampled_nodes_per_hop: list[int] | None = ...,
        num_sampled_edges_per_hop: list[int] | None = ...,
        *,
        return_routing: Literal[True],
    ) -> tuple[Tensor, list[Routing]]: ...
    def forward(
        self,
        x: Tensor,
        edge_index: Adj,
        edge_weight: Tensor | None = None,
        edge_attr: Tensor | None = None,
        batch: Tensor | None = None,
        batch_size: int | None = None,
        num_sampled_nodes_per_hop: list[int] | None = None,
        num_sampled_edges_per_hop: list[int] | None = None,
        *,
        return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, list[Routing]]:
        """Logits of all nodes; see the class and PyG's ``BasicGNN``."""
        if num_sampled_nodes_per_hop is not None and edge_weight is not None and edge_attr is not None:
            raise ValueError("edge_attr: got edge_weight too, expected at most one of them where layers are trimmed")
        if x.dim() != 2 or x.size(1) != self.in_channels:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected (number of nodes, {self.in_channels})")
        Graph(edge_index, x.size(0), x.size(0), {})  # checks the edges, also for the dense control
        decision = None if self.shared_router is None else self.decide(x, edge_index, batch)
        routings = [] if decision is None else [decision]
        x = self.input_dropout(x)
        if self.lin_in is not None:
            x = self.lin_in(x)
        xs: list[Tensor] = []
        for layer in range(self.num_layers):
            if num_sampled_nodes_per_hop is not None:
                edge_value = edge_weight if edge_weight is not None else edge_attr
                x, edge_index, edge_value = self._trim(
                    layer, num_sampled_nodes_per_hop, num_sampled_edges_per_hop, x, edge_index, edge_value
                )
                edge_weight = edge_value if edge_weight is not None else None
                edge_attr = edge_value if edge_attr is not None else None
                if batch is not None:
                    batch = batch[: x.size(0)]
            followed = None if decision is None else decision.first(x.size(0))
            x, routing = self._conv(layer, x, edge_index, edge_weight, edge_attr, batch, followed)
            if routing is not None and decision is None:
                routings.append(routing)
            x = self._after(layer, x, batch, batch_size)
            xs.append(x)
        if hasattr(self, "jk"):
            x = self.jk([h[: x.size(0)] for h in xs])  # trimming leaves the later layers fewer nodes
        x = self.lin(x) if hasattr(self, "lin") else x
        return (x, routings) if return_routing else x

    def _conv(
        self,
        layer: int,
        x: Tensor,
        edge_index: Adj,
        edge_weight: Tensor | None,
        edge_attr: Tensor | None,
        batch: Tensor | None,
        decision: Routing | None,
    ) -> tuple[Tensor, Routing | None]:
        """One conv and its residual."""
        conv = self.convs[layer]
        given = {"edge_weight": edge_weight, "edge_attr": edge_attr}
        edge_args = {name: value for name, value in given.items() if value is not None}
        routing = None
        if isinstance(conv, MoEConv):
            out, routing = conv(x, edge_index, **edge_args, batch=batch, routing=decision, return_routing=True)
        else:
            out = conv(x, edge_index, **self._taken(conv, edge_args))
        if layer < len(self.residuals):
            out = out + self.residuals[layer](x)
        return out, routing

    def _taken(self, conv: MessagePassing, edge_args: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a plain conv takes; of several kinds of experts, the first may take less than the others."""
        names = parameters_of(conv)
        known = names.union(*(c.edge_names if isinstance(c, MoEConv) else parameters_of(c) for c in self.convs))
        for name in edge_args:
            if name not in known:
                raise ValueError(f"{name}: got a tensor, but no conv of the model takes it")
        return {name: value for name, value in edge_args.items() if name in names}

    def _after(self, layer: int, x: Tensor, batch: Tensor | None, batch_size: int | None) -> Tensor:
        """Normalisation, activation and dropout, on all but an output conv."""
        if layer == self.num_layers - 1 and self.jk_mode is None:
            return x
        if self.act is not None and self.act_first:
            x = self.act(x)
        norm = self.norms[layer]
        x = norm(x, batch, batch_size) if self.supports_norm_batch else norm(x)
        if self.act is not None and not self.act_first:
            x = self.act(x)
        return self.dropout(x)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.in_channels}, {self.hidden_channels}, {self.out_channels}, "
            f"num_layers={self.num_layers}, routing={self.routing!r})"
        )
