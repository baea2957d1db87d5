"""GNNMoE: a GNN with MoEConv layers.

Shapes: N nodes, n of them destinations, M edges, D width, O out channels, E experts, K experts per
node.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch_geometric.nn import JumpingKnowledge

from gmoe._checks import check, check_choice, parameters_of
from gmoe.conv.graph import Graph
from gmoe.conv.kinds import ConvLike, by_name, kinds_of
from gmoe.conv.moe_conv import MoEConv
from gmoe.conv.router_input import RouterInput, router_parts
from gmoe.models.layered import LayeredGNN
from gmoe.models.layers import (
    are_stacked,
    build_conv,
    build_shared_router,
    layers_with_experts,
    start_of,
    take_costs,
    taken_from,
)
from gmoe.models.parts import Activation, Nodes, Norm, Residual, activated, norm_of, residual_of
from gmoe.recorded import Recorded, given_to
from gmoe.routers import ROUTERS, RouterLike
from gmoe.routing import Routing


class GNNMoE(LayeredGNN):
    r"""A GNN like PyG's ``GCN``, ``GraphSAGE``, ..., with :class:`MoEConv` layers and residuals.

    .. math::
        h^{(l+1)} = \mathrm{dropout}(\phi(\mathrm{norm}(
            \mathrm{MoEConv}_l(h^{(l)}, A) + \mathrm{res}(h^{(l)}))))

    The output layer is dense: with ``jk=None`` the last layer is a plain conv, otherwise a linear
    layer follows the last conv.

    Args:
        in_channels: width of the input.
        hidden_channels: width of the hidden layers.
        out_channels: width of the output, such as the number of classes.
        num_layers: number of convs (default 2).
        conv: see :class:`MoEConv` (default ``"gcn"``).
        router: a name or factory (default ``"token_choice"``); an instance is allowed with
            ``shared_router`` or a single MoE layer. ``None`` builds the dense baseline: the same
            model with plain convs in all layers.
        num_experts: E (default 8, or the length of a list of convs).
        k: K, experts per node (default 1).
        shared_router: route each node once, from the raw features, for all layers (``True``), or
            let each layer route by its own input (``False``). By default (``None``) once if the
            layers start as copies.
        router_input: what routers see: the ``"node"``, its ``"neighbors"``, its ``"degree"``, or
            several of them. By default (``None``) the node; of copies with a router in each layer
            the node and its neighbors.
        every: layer ``i`` is a MoEConv if ``i % every == every - 1`` (default 1), except for the
            output layer.
        dropout: default 0.
        input_dropout: dropout of the input features (default 0).
        act, norm: as in PyG's ``BasicGNN``: a name, a function or a module (defaults: relu, no
            norm).
        jk: ``"cat"``, ``"max"``, ``"lstm"``, or ``"last"``, a plain output projection (default
            ``None``).
        residual: what is added to the output of a hidden layer: its input, where widths are equal
            (``"identity"``, default), a linear map of it (``"linear"``), or nothing (``"none"``).
        **conv_kwargs: further arguments of :class:`MoEConv` and of the convs. By default, layers
            have ``start="copies"`` if they are routed once, their convs are of one kind that is
            stacked (GCN, SAGE, GIN, GAT, ...), and the router is one of ``gmoe.ROUTERS``, or an
            instance, whose weights of a node sum to 1; else ``"shared"``. ``heads``, given here
            or by a ``functools.partial``, divide ``hidden_channels``; the output layer averages
            them, as in PyG's ``GAT``.

    Shapes:
        - as PyG's ``BasicGNN``; ``edge_index`` may be a :class:`gmoe.Graph`; ``batch`` (N,) also
          makes the graphs separate groups.
        - returns (N, out_channels), and the list of :class:`Routing` with ``return_routing=True``
          (one per MoE layer; one in all with ``shared_router``).
        - ``routings``: such a list, of an earlier call on the same nodes; no router is asked.
        - ``num_sampled_nodes_per_hop``, ``num_sampled_edges_per_hop``: of a sampled batch, as in
          PyG: later layers leave out what no longer reaches the seeds. Where experts choose, they
          choose among the nodes that are left.

    Raises:
        ValueError: no layer would be a MoE; a router instance for several layers; a conv whose
            output is not as wide as its layer; whatever :class:`MoEConv` refuses.

    Example:
        >>> model = GNNMoE(128, 256, 40, num_layers=3, conv="gcn", router="token_choice")
        >>> logits, routings = model(x, edge_index, return_routing=True)
        >>> loss = F.cross_entropy(logits, y) + gmoe.aux_loss(routings)
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        num_layers: int = 2,
        *,
        conv: ConvLike = "gcn",
        router: RouterLike | None = "token_choice",
        num_experts: int | None = None,
        k: int = 1,
        shared_router: bool | None = None,
        router_input: RouterInput | None = None,
        every: int = 1,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        act: Activation = "relu",
        norm: Norm = None,
        jk: str | None = None,
        residual: Residual = "identity",
        **conv_kwargs: Any,
    ) -> None:
        kinds = kinds_of(conv, num_experts)
        conv_kwargs["start"] = start_of(
            kinds, router, k, shared_router, are_stacked(kinds), conv_kwargs
        )
        if shared_router is None:
            shared_router = router is not None and conv_kwargs["start"] == "copies"
        router_input = router_parts(router_input, conv_kwargs["start"], router, shared_router)
        check_choice("jk", jk, (None, "cat", "max", "lstm", "last"))
        super().__init__(
            in_channels, hidden_channels, out_channels, num_layers, dropout, input_dropout, act
        )
        # The defaults are resolved by now: a file says what they were.
        self.recorded = Recorded.of(given_to(GNNMoE, locals()), by_name() | ROUTERS)
        self.jk_mode = jk
        self.joins_layers = jk not in (None, "last")
        self.router_input = router_input

        # 1. Which layers are MoE. Without jumping knowledge the last conv is the output layer.
        num_hidden = self.num_layers - 1 if jk is None else self.num_layers
        if router is not None:
            legal = "at least 2, or a jk: the only conv is the output layer, which has no experts"
            check(num_hidden, "num_layers", 1, legal)
        moe_layers = layers_with_experts(router, shared_router, num_hidden, every)

        # 2. Sort the arguments: those of MoEConv, and those that are left for its convs.
        moe_kwargs = taken_from(conv_kwargs, kinds[0], GNNMoE)
        self.local = moe_kwargs.get("local")
        moe_kwargs |= {"num_experts": len(kinds), "k": k, "router_input": router_input}
        built_router = None
        if router is not None and shared_router and moe_layers:
            built_router = build_shared_router(router, self.in_channels, moe_kwargs)
        moe_kwargs["router"] = None if shared_router else router

        # 3. The convs.
        self.convs = nn.ModuleList()
        for layer in range(self.num_layers):
            is_hidden = layer < num_hidden
            out = self.hidden_channels if is_hidden else self.out_channels
            # No arguments of experts for a layer without them.
            own = moe_kwargs if layer in moe_layers else None
            width = self.conv_width(layer)
            self.convs.append(build_conv(conv, width, out, is_hidden, own, conv_kwargs))
        if built_router is not None:
            take_costs(built_router, self.convs)

        # 4. Norms, the output layer, and the residual maps.
        hidden_norm = norm_of(norm, self.hidden_channels)
        self.norms = nn.ModuleList(copy.deepcopy(hidden_norm) for _ in range(num_hidden))
        self.norm_takes_batch = "batch" in parameters_of(hidden_norm)
        if self.joins_layers:
            self.jk = JumpingKnowledge(jk, self.hidden_channels, self.num_layers)
        if jk is not None:
            num_joined = self.num_layers if jk == "cat" else 1
            self.lin = nn.Linear(self.hidden_channels * num_joined, self.out_channels)
        self.residuals = nn.ModuleDict()
        for layer in range(num_hidden):
            added = residual_of(residual, self.conv_width(layer), self.hidden_channels)
            if added is not None:
                self.residuals[str(layer)] = added
        # The last module: saved optimizers go by the order of parameters.
        self.shared_router = built_router

    def has_experts(self, layer: int) -> bool:
        return isinstance(self.convs[layer], MoEConv)

    def convolve(
        self, layer: int, x: Tensor, graph: Graph, batch: Tensor | None, routing: Routing | None
    ) -> tuple[Tensor, Routing | None]:
        """(n, D) a layer's conv plus its residual; see the base class."""
        out, routing = super().convolve(layer, x, graph, batch, routing)
        if str(layer) in self.residuals:
            out = out + self.residuals[str(layer)](x[: out.size(0)])
        return out, routing

    def finish(
        self, layer: int, x: Tensor, out: Tensor, nodes: Nodes, routing: Routing | None
    ) -> tuple[Tensor, Routing | None]:
        """(n, D) norm, activation and dropout of a hidden layer; see the base class."""
        if layer < len(self.norms):  # the conv that is the output layer has no norm
            out = self.activate(layer, out, nodes.batch, nodes.batch_size)
        return out, None

    def activate(
        self, layer: int, x: Tensor, batch: Tensor | None = None, batch_size: int | None = None
    ) -> Tensor:
        """(n, D) norm, activation and dropout of a hidden layer."""
        norm = self.norms[layer]
        x = norm(x, batch, batch_size) if self.norm_takes_batch else norm(x)
        return activated(x, self.act, self.dropout)

    def leave(self, outputs: Sequence[Tensor]) -> Tensor:
        x = outputs[-1]
        if self.joins_layers:
            # Trimming leaves fewer nodes to later layers.
            x = self.jk([output[: x.size(0)] for output in outputs])
        return x if self.jk_mode is None else self.lin(x)
