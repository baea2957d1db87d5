"""GNNMoE: a GNN with MoEConv layers.

Shapes: N nodes, M edges, D width, O out channels, E experts, K experts per node.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn
from torch_geometric.nn import JumpingKnowledge
from torch_geometric.typing import Adj

from gmoe._autograd import refuse_transforms
from gmoe._checks import (
    check,
    check_choice,
    check_counts,
    described,
    parameters_of,
)
from gmoe.conv.graph import Graph
from gmoe.conv.kinds import (
    OPTIONS,
    ConvLike,
    base_kind_of,
    by_name,
    check_option,
    factory_of,
    kinds_of,
)
from gmoe.conv.moe_conv import MoEConv
from gmoe.conv.plain import run
from gmoe.conv.router_input import (
    RouterInput,
    router_features,
    router_parts,
)
from gmoe.models.blocks import block_norm_of, build_block, check_blocks
from gmoe.models.inference import inference
from gmoe.models.layers import build_conv, build_shared_router, start_of, take_costs
from gmoe.models.parts import (
    FFN,
    Activation,
    Norm,
    Residual,
    activation_of,
    norm_of,
    reset_parameters,
    residual_of,
)
from gmoe.moe import MoE, MoELayer, checked_routings, choose_blocks
from gmoe.recorded import Recorded, given_to
from gmoe.routers import ROUTERS, Router, RouterLike
from gmoe.routing import Routing
from gmoe.saved import Pretrained

Stored = TypeVar("Stored")
"""A graph on disk, in place of the features of all nodes."""


class GNNMoE(Pretrained, nn.Module):
    r"""A GNN like PyG's ``GCN``, ``GraphSAGE``, ..., with :class:`MoEConv` layers and residuals.

    .. math::
        h^{(l+1)} = \mathrm{dropout}(\phi(\mathrm{norm}(
            \mathrm{MoEConv}_l(h^{(l)}, A) + \mathrm{res}(h^{(l)}))))

    The output layer is dense: with ``jk=None`` the last layer is a plain conv, otherwise a linear
    layer follows the last conv.

    With ``ffn``, layers are pre-norm residual blocks with a feed-forward part instead, between
    linear layers, as in `Platonov et al., 2023 <https://arxiv.org/abs/2302.11640>`_ and in graph
    transformers:

    .. math::
        h^{(l+1)} = h^{(l)} + \mathrm{FFN}(\mathrm{conv}(\mathrm{norm}(h^{(l)}), A))

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
        ffn: build blocks with a feed-forward part (default ``None``): an MLP as wide as the hidden
            layers, with dropout and ``act``. ``"dense"``: the experts are those of the convs.
            ``"experts"``: convs are plain, and in place of the MLP there is a :class:`MoE` of them,
            as :func:`moefy` has it in a ViT. One router decides for all blocks, by raw features;
            with ``shared_router=False`` one in each block sees what the conv gives, which may have
            any number of columns. ``norm`` is by default a ``nn.LayerNorm``, and has
            to treat each node by itself; another follows the last block.
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
            output is not as wide as its layer; with ``ffn``, ``jk`` other than ``"last"``, or
            another residual than the identity; whatever :class:`MoEConv` refuses.

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
        ffn: FFN | None = None,
        **conv_kwargs: Any,
    ) -> None:
        num_kinds = len(kinds_of(conv, num_experts))
        conv_kwargs["start"] = start_of(
            conv, num_experts, router, k, shared_router, ffn, conv_kwargs
        )
        if shared_router is None:
            shared_router = router is not None and conv_kwargs["start"] == "copies"
        routes_blocks = ffn == "experts" and not shared_router  # each block by what its conv gives
        router_input = router_parts(
            router_input, conv_kwargs["start"], router, shared_router or routes_blocks
        )
        check_counts(
            in_channels=in_channels,
            hidden_channels=hidden_channels,
            out_channels=out_channels,
            num_layers=num_layers,
        )
        check_choice("jk", jk, (None, "cat", "max", "lstm", "last"))
        check_blocks(ffn, conv, jk, residual, router_input if routes_blocks else None)
        super().__init__()
        # The defaults are resolved by now: a file says what they were.
        self.recorded = Recorded.of(given_to(GNNMoE, locals()), by_name() | ROUTERS)
        # Plain ints: NumPy's are counts too, but torch and PyG do not take them everywhere.
        self.in_channels = in_channels = int(in_channels)
        self.hidden_channels = hidden_channels = int(hidden_channels)
        self.out_channels = out_channels = int(out_channels)
        self.num_layers = num_layers = int(num_layers)
        # Behind blocks, there is a linear layer in any case.
        self.jk_mode = jk = jk if ffn is None else "last"
        self.router_input = router_input

        # 1. Which layers are MoE. Without jumping knowledge the last conv is the output layer.
        num_hidden = num_layers - 1 if jk is None else num_layers
        moe_layers = _moe_layers(router, shared_router, num_hidden, every)

        # 2. Sort the arguments: those of MoEConv, and those that are left for its convs.
        moe_kwargs = _taken_from(conv_kwargs, conv)
        self.local = moe_kwargs.get("local")
        moe_kwargs |= {"num_experts": num_kinds, "k": k, "router_input": router_input}
        built_router = None
        if router is not None and shared_router and moe_layers:
            built_router = build_shared_router(router, in_channels, moe_kwargs)
        moe_kwargs["router"] = None if shared_router else router

        # 3. The convs, and what is behind them in a block.
        self.act = activation_of(act)
        self.input = None if ffn is None else nn.Linear(in_channels, hidden_channels)
        self.convs = nn.ModuleList()
        self.ffns = nn.ModuleList()
        for layer in range(num_layers):
            # No arguments of experts for a layer without them.
            own = moe_kwargs if layer in moe_layers else None
            self._add_layer(conv, layer < num_hidden, own, conv_kwargs, ffn, dropout)
        if built_router is not None:
            take_costs(built_router, [*self.convs, *self.ffns])
        self.flow = str(self.convs[0].flow)

        # 4. Norms and dropouts, the output layer, and the residual maps.
        self._build_norms(norm, ffn, num_hidden)
        self.dropout = nn.Dropout(dropout)
        self.input_dropout = nn.Dropout(input_dropout)
        self._build_output()
        self._build_residuals("none" if ffn is not None else residual, num_hidden)
        # The last module: saved optimizers go by the order of parameters.
        self.shared_router = built_router

    def _add_layer(
        self,
        conv: ConvLike,
        is_hidden: bool,
        moe_kwargs: Mapping[str, Any] | None,
        conv_kwargs: Mapping[str, Any],
        ffn: FFN | None,
        dropout: float,
    ) -> None:
        """Build the next conv, and in a block what is behind it; see :func:`build_conv`."""
        if ffn is None:
            width = self.hidden_channels if len(self.convs) else self.in_channels
            out = self.hidden_channels if is_hidden else self.out_channels
            self.convs.append(build_conv(conv, width, out, is_hidden, moe_kwargs, conv_kwargs))
            return
        built, part = build_block(
            ffn, conv, self.hidden_channels, dropout, self.act, moe_kwargs, conv_kwargs
        )
        self.convs.append(built)
        self.ffns.append(part)

    def _build_norms(self, norm: Norm, ffn: FFN | None, num_hidden: int) -> None:
        """Build the norm of each hidden layer; with blocks, one follows the last of them."""
        make = norm_of if ffn is None else block_norm_of
        layer = make(norm, self.hidden_channels)
        number = num_hidden if ffn is None else num_hidden + 1
        self.norms = nn.ModuleList(copy.deepcopy(layer) for _ in range(number))
        self.norm_takes_batch = "batch" in parameters_of(layer)

    def _build_residuals(self, residual: Residual, num_hidden: int) -> None:
        """Build the residual maps of the hidden layers; blocks have their own residuals."""
        widths = [self.in_channels, *[self.hidden_channels] * (num_hidden - 1)]
        self.residuals = nn.ModuleDict()
        for layer, width in enumerate(widths[:num_hidden]):
            added = residual_of(residual, width, self.hidden_channels)
            if added is not None:
                self.residuals[str(layer)] = added

    def _build_output(self) -> None:
        """Build the output layer behind the convs; with ``jk=None`` the last conv is the output."""
        if self._joins_layers:
            self.jk = JumpingKnowledge(self.jk_mode, self.hidden_channels, self.num_layers)
        if self.jk_mode is not None:
            num_joined = self.num_layers if self.jk_mode == "cat" else 1
            self.lin = nn.Linear(self.hidden_channels * num_joined, self.out_channels)

    @property
    def _joins_layers(self) -> bool:
        """The output follows from all layers, not from the last one alone."""
        return self.jk_mode not in (None, "last")

    def shared_router_input(self, x: Tensor, graph: Graph) -> Tensor:
        """(N, dim) what a shared router sees: raw features, their means over in-edges, in-degrees.

        Args:
            x: (N, D) raw features.
            graph: the graph; of a part of a graph, the result has its destinations only.
        """
        return router_features(self.router_input, x, x[: graph.num_dst], None, graph)

    def route_once(self, x: Tensor, graph: Graph, batch: Tensor | None) -> Routing | None:
        """Decide once for all layers, by the raw features; ``None`` without a shared router."""
        if self.shared_router is None:
            return None
        seen = self.shared_router_input(x, graph)
        routing: Routing = self.shared_router(seen, batch, graph.edge_index)
        return routing

    def has_experts(self, layer: int) -> bool:
        """True if a layer has experts: its conv, or the feed-forward part of its block."""
        parts = [self.convs[layer], *self.ffns[layer : layer + 1]]
        return any(isinstance(part, MoELayer) for part in parts)

    def _takes(self, name: str) -> bool:
        """True if at least one conv takes this edge argument."""
        for conv in self.convs:
            names = conv.edge_names if isinstance(conv, MoEConv) else parameters_of(conv)
            if name in names:
                return True
        return False

    def _graph(
        self,
        x: Tensor,
        edge_index: Adj | Graph,
        edge_weight: Tensor | None,
        edge_attr: Tensor | None,
    ) -> Graph:
        """The graph of a call, sorted once for all layers."""
        for name, value in {"edge_weight": edge_weight, "edge_attr": edge_attr}.items():
            if value is not None and not self._takes(name):
                raise ValueError(
                    f"{name}: got a tensor, but no conv of the model takes it, expected None"
                )
        if isinstance(edge_index, Graph):
            return edge_index.fitting((x.size(0), x.size(0)), self.flow, edge_weight, edge_attr)
        return Graph(
            edge_index, x.size(0), edge_weight=edge_weight, edge_attr=edge_attr, flow=self.flow
        )

    def forward(
        self,
        x: Tensor,
        edge_index: Adj | Graph,
        edge_weight: Tensor | None = None,
        edge_attr: Tensor | None = None,
        batch: Tensor | None = None,
        batch_size: int | None = None,
        num_sampled_nodes_per_hop: list[int] | None = None,
        num_sampled_edges_per_hop: list[int] | None = None,
        *,
        routings: Sequence[Routing] | None = None,
        return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, list[Routing]]:
        """Logits of all nodes; see the class and PyG's ``BasicGNN``."""
        refuse_transforms()
        if not isinstance(x, Tensor):  # of to_hetero a proxy, of HeteroConv a pair
            raise ValueError(
                f"x: got {described(x)}, expected a tensor; for nodes of several types, put a "
                "MoEConv for each relation into PyG's HeteroConv"
            )
        graph = self._graph(x, edge_index, edge_weight, edge_attr)

        decisions = self._decisions(x, graph, batch, routings)
        is_shared = self.shared_router is not None
        used = [decision for decision in decisions[:1] if decision is not None and is_shared]

        def run_layer(layer: int, x: Tensor) -> Tensor:
            part = graph
            part_batch = batch
            decision = decisions[layer]
            if (
                layer
                and num_sampled_nodes_per_hop is not None
                and num_sampled_edges_per_hop is not None
            ):
                # Trim a sampled graph: what its last hops found no longer reaches the seeds.
                x = x[: sum(num_sampled_nodes_per_hop[:-layer])]
                part = graph.first(len(x), sum(num_sampled_edges_per_hop[:-layer]))
                part_batch = None if batch is None else batch[: len(x)]
                if decision is not None and is_shared:
                    decision = decision.select(slice(0, len(x)))
            x = self.enter(x) if layer == 0 else x
            out, of_conv = self.convolve(layer, x, part, part_batch, decision)
            x, of_block = self.finish(
                layer, x, out, part_batch, batch_size, decision, part.edge_index
            )
            if not is_shared:
                used.extend(routing for routing in (of_conv, of_block) if routing is not None)
            return x

        x = self.run_layers(x, run_layer)
        return (x, used) if return_routing else x

    def _decisions(
        self, x: Tensor, graph: Graph, batch: Tensor | None, routings: Sequence[Routing] | None
    ) -> list[Routing | None]:
        """The routing of each layer that is known before it runs: a replay's, or the shared one.

        ``None`` for a layer that decides itself, or has no experts.
        """
        have_experts = [self.has_experts(layer) for layer in range(self.num_layers)]
        is_shared = self.shared_router is not None
        given: list[Routing] = []
        if routings is not None:
            given = checked_routings(routings, 1 if is_shared else sum(have_experts), "router")
        if is_shared:
            decision = given[0] if given else self.route_once(x, graph, batch)
            return [decision] * self.num_layers
        turns = iter(given)
        return [next(turns, None) if has_experts else None for has_experts in have_experts]

    # The next ones are also the steps of inference, which runs a layer part by part.

    def run_layers(
        self, x: Tensor | Stored, run_layer: Callable[[int, Tensor | Stored], Tensor]
    ) -> Tensor:
        """Run one layer after the other, and join their outputs if ``jk`` asks for it.

        Args:
            x: (N, D) features, or what ``run_layer`` takes for them.
            run_layer: called with the number of a layer and its input; returns its output.
        """
        if self.training:  # otherwise x may be a graph on disk, which inference runs on
            x = self.input_dropout(x)
        output = run_layer(0, x)
        outputs = [output] if self._joins_layers else []  # else keep only the last one in memory
        for layer in range(1, self.num_layers):
            output = run_layer(layer, output)
            if self._joins_layers:
                outputs.append(output)
        if not self._joins_layers:
            return output
        # Trimming leaves fewer nodes to later layers; inference may keep all outputs on the CPU.
        num_nodes = output.size(0)
        device = next(self.parameters()).device
        joined = self.jk([hidden[:num_nodes].to(device) for hidden in outputs])
        return self.lin(joined).to(output.device)

    def enter(self, x: Tensor) -> Tensor:
        """What the first layer sees of the features: in a model of blocks, a linear layer's output.

        ``act`` follows, behind dropout.
        """
        if self.input is None:
            return x
        return self.act(self.dropout(self.input(x)))

    def before_conv(self, layer: int, x: Tensor) -> Tensor:
        """What the conv of a layer and its router see of the layer's input: in a block its norm."""
        return self.norms[layer](x) if self.ffns else x

    def convolve(
        self, layer: int, x: Tensor, graph: Graph, batch: Tensor | None, routing: Routing | None
    ) -> tuple[Tensor, Routing | None]:
        """A layer's conv plus its residual at the graph's destinations; and the routing of a MoE.

        In a block, the norm is before the conv, and the residual comes after it, in :meth:`finish`.

        Args:
            layer: the number of the layer.
            x: (N, D) its input.
            graph: the whole graph or a part of it.
            batch: (N,) the graph of each node, or ``None``.
            routing: a shared router's decision, or ``None`` to let the layer decide.
        """
        conv = self.convs[layer]
        x = self.before_conv(layer, x)
        if isinstance(conv, MoEConv):
            out, routing = conv(x, graph, batch=batch, routing=routing, return_routing=True)
        else:
            run_kind = base_kind_of(type(conv)).run
            out = run(conv, graph, x, x) if run_kind is None else run_kind(conv, x, graph)
            routing = None
        if str(layer) in self.residuals:
            out = out + self.residuals[str(layer)](x[: out.size(0)])
        return out, routing

    def activate(
        self, layer: int, x: Tensor, batch: Tensor | None = None, batch_size: int | None = None
    ) -> Tensor:
        """Norm, activation and dropout of a hidden layer; and the output layer of ``jk="last"``."""
        is_output = layer == len(self.norms)  # the conv that is the output layer has no norm
        if is_output:
            return x
        norm = self.norms[layer]
        x = norm(x, batch, batch_size) if self.norm_takes_batch else norm(x)
        x = self.dropout(self.act(x))
        if self.jk_mode == "last" and layer == self.num_layers - 1:
            x = self.lin(x)
        return x

    def feed_forward(
        self,
        layer: int,
        x: Tensor,
        out: Tensor,
        batch: Tensor | None = None,
        routing: Routing | None = None,
        edge_index: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """The rest of a block: its feed-forward part, and the residual; and the routing of a MoE.

        Args:
            layer: the number of the block.
            x: (N, D) its input.
            out: (n, C) the output of its conv at the n destinations, the first of the N nodes.
            batch: (n,) the graph of each destination, or ``None``.
            routing: a decision for these, or ``None`` to let the block decide.
            edge_index: the edges among them, or ``None``.
        """
        part = self.ffns[layer]
        if not isinstance(part, MoE):
            return x[: out.size(0)] + part(out), None
        if routing is None and part.router is not None:
            routing = part.router(out, batch, edge_index)
        return x[: out.size(0)] + part(out, routing=routing), routing

    def finish(
        self,
        layer: int,
        x: Tensor,
        out: Tensor,
        batch: Tensor | None = None,
        batch_size: int | None = None,
        routing: Routing | None = None,
        edge_index: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """What follows the conv of a layer: :meth:`activate`, or the rest of a block.

        The output layer behind the last block is a norm and a linear layer. The arguments are
        those of :meth:`feed_forward`.
        """
        if not self.ffns:
            return self.activate(layer, out, batch, batch_size), None
        x, routing = self.feed_forward(layer, x, out, batch, routing, edge_index)
        if layer == self.num_layers - 1:
            x = self.lin(self.norms[-1](x))
        return x, routing

    inference = inference
    reset_parameters = reset_parameters

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.in_channels}, {self.hidden_channels}, "
            f"{self.out_channels}, num_layers={self.num_layers}, "
            f"shared_router={self.shared_router is not None})"
        )


def _moe_layers(
    router: RouterLike | None, shared_router: bool, num_hidden: int, every: int
) -> list[int]:
    """The numbers of the layers that are MoE; the arguments are those of :class:`GNNMoE`."""
    if router is None:
        return []
    legal = "at least 2, or a jk: the only conv is the output layer, which has no experts"
    check(num_hidden, "num_layers", 1, legal)
    chosen = choose_blocks(num_hidden, every)
    if isinstance(router, Router) and len(chosen) > 1 and not shared_router:
        raise ValueError("router: got an instance for several layers, expected a name or a factory")
    return chosen


def _taken_from(conv_kwargs: dict[str, Any], conv: ConvLike) -> dict[str, Any]:
    """Take the arguments of layers with experts away from those of convs.

    What is an argument of neither, nor of the model, is refused.
    """
    moe_kwargs = {name: conv_kwargs.pop(name) for name in OPTIONS if name in conv_kwargs}
    kind = kinds_of(conv, None)[0]  # of several kinds, the layers check the others
    for option, value in conv_kwargs.items():
        check_option(
            option, value, factory_of(kind), "GNNMoE", inspect.signature(GNNMoE).parameters
        )
    return moe_kwargs
