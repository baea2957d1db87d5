"""GNNMoE: a GNN with MoEConv layers.

Shapes: N nodes, M edges, D width, O out channels, E experts, K experts per node.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch_geometric.nn import JumpingKnowledge, MessagePassing
from torch_geometric.typing import Adj

from gmoe._autograd import refuse_transforms
from gmoe._checks import check_choice, check_counts, parameters_of, says_what_misfits
from gmoe.conv.build import Trial
from gmoe.conv.graph import Graph
from gmoe.conv.kinds import (
    OPTIONS,
    ConvFactory,
    ConvLike,
    Make,
    base_kind_of,
    by_name,
    check_option,
    class_of,
    factory_of,
    kind_of,
    kinds_of,
)
from gmoe.conv.moe_conv import MoEConv
from gmoe.conv.plain import run
from gmoe.conv.router_input import (
    RouterInput,
    route_nodes,
    router_features,
    router_parts,
    router_width,
)
from gmoe.mixed_weights import Mix
from gmoe.models.inference import inference
from gmoe.models.parts import (
    Activation,
    Norm,
    Residual,
    activation_of,
    norm_of,
    reset_parameters,
    residual_of,
)
from gmoe.moe import choose_blocks
from gmoe.recorded import Recorded, given_to
from gmoe.routers import Router, RouterLike, let_check_finite
from gmoe.routing import Routing, checked_routings
from gmoe.saved import HubMixin
from gmoe.start import (
    Start,
    build_layer_router,
    chosen_k,
    drawn_apart,
    resolved_start,
    saved_by_name,
)

Stored = TypeVar("Stored")
"""A graph on disk, in place of the features of all nodes."""


class GNNMoE(HubMixin, nn.Module):
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
            several of them; or the ``"graph"``, the mean of its nodes by ``batch``: all of them
            then go to the same experts. By default (``None``) the node; of copies with a router in
            each layer the node and its neighbors; to mix weights (``mix="weights"``, see
            :class:`MoEConv`) the graph.
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

    @says_what_misfits
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
        num_kinds = len(kinds_of(conv, num_experts))
        mix: Mix = conv_kwargs.get("mix", "outputs")
        k = chosen_k(mix, k, num_kinds, router)
        conv_kwargs["start"] = _start_of(conv, num_experts, router, k, shared_router, conv_kwargs)
        if shared_router is None:
            shared_router = router is not None and conv_kwargs["start"] == "copies"
        router_input = router_parts(router_input, conv_kwargs["start"], router, shared_router, mix)
        check_counts(
            in_channels=in_channels,
            hidden_channels=hidden_channels,
            out_channels=out_channels,
            num_layers=num_layers,
        )
        check_choice("jk", jk, (None, "cat", "max", "lstm", "last"))
        super().__init__()
        # The defaults are resolved by now: a file says what they were.
        self.recorded = Recorded.of(given_to(GNNMoE, locals()), _named_classes(k, conv_kwargs))
        # Plain ints: NumPy's are counts too, but torch and PyG do not take them everywhere.
        self.in_channels = in_channels = int(in_channels)
        self.hidden_channels = hidden_channels = int(hidden_channels)
        self.out_channels = out_channels = int(out_channels)
        self.num_layers = num_layers = int(num_layers)
        self.jk_mode = jk
        self.router_input = router_input

        # 1. Which layers are MoE. Without jumping knowledge the last conv is the output layer.
        num_hidden = num_layers - 1 if jk is None else num_layers
        moe_layers = _moe_layers(router, shared_router, num_hidden, every)

        # 2. Sort the arguments: those of MoEConv, and those that are left for its convs.
        moe_kwargs = {name: conv_kwargs.pop(name) for name in OPTIONS if name in conv_kwargs}
        _check_options(conv, conv_kwargs)
        self.local = moe_kwargs.get("local")
        moe_kwargs["num_experts"] = num_kinds
        moe_kwargs["k"] = k
        moe_kwargs["router_input"] = self.router_input
        built_router = None
        if router is not None and shared_router and moe_layers:
            built_router = _build_shared_router(router, in_channels, moe_kwargs)
        moe_kwargs["router"] = None if shared_router else router

        # 3. The convs.
        widths = [in_channels, *[hidden_channels] * (num_layers - 1)]
        self.convs = nn.ModuleList()
        for layer, width in enumerate(widths):
            is_hidden = layer < num_hidden
            out = hidden_channels if is_hidden else out_channels
            layer_kwargs = moe_kwargs if layer in moe_layers else None
            self.convs.append(_build_conv(conv, width, out, is_hidden, layer_kwargs, conv_kwargs))
        if built_router is not None:
            for layer_conv in self.convs:
                if isinstance(layer_conv, MoEConv):
                    layer_conv.take_costs(built_router)
        self.flow = str(self.convs[0].flow)

        # 4. Activation, norms and dropouts, the output layer, and the residual maps.
        self.act = activation_of(act)
        norm_layer = norm_of(norm, hidden_channels)
        self.norms = nn.ModuleList(copy.deepcopy(norm_layer) for _ in range(num_hidden))
        self.norm_takes_batch = "batch" in parameters_of(norm_layer)
        self.dropout = nn.Dropout(dropout)
        self.input_dropout = nn.Dropout(input_dropout)
        self._build_output()
        self.residuals = nn.ModuleDict()
        for layer, width in enumerate(widths[:num_hidden]):
            added = residual_of(residual, width, hidden_channels)
            if added is not None:
                self.residuals[str(layer)] = added
        # The last module: saved optimizers go by the order of parameters.
        self.shared_router = built_router

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
        return route_nodes(self.shared_router, self.router_input, seen, batch, graph.edge_index)

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

    def _check_trimming(self, num_sampled_nodes_per_hop: list[int]) -> None:
        """Refuse to trim where a later layer routes by the mean of all nodes of a graph."""
        is_routed_later = any(isinstance(conv, MoEConv) for conv in self.convs[1:])
        if "graph" in self.router_input and self.shared_router is None and is_routed_later:
            raise ValueError(
                f"num_sampled_nodes_per_hop: got {num_sampled_nodes_per_hop} with "
                "router_input='graph' and a router in each layer, expected None, or "
                "shared_router=True: a later layer would route by the mean of fewer nodes"
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
        if isinstance(x, torch.fx.Proxy):
            raise ValueError(
                "x: got a torch.fx proxy, expected a tensor: in place of to_hetero, take "
                "HeteroGNNMoE"
            )
        graph = self._graph(x, edge_index, edge_weight, edge_attr)

        if num_sampled_nodes_per_hop is not None and routings is None:
            self._check_trimming(num_sampled_nodes_per_hop)
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
            x, routing = self.convolve(layer, x, part, part_batch, decision)
            if routing is not None and not is_shared:
                used.append(routing)
            return self.activate(layer, x, part_batch, batch_size)

        x = self.run_layers(x, run_layer)
        return (x, used) if return_routing else x

    def _decisions(
        self, x: Tensor, graph: Graph, batch: Tensor | None, routings: Sequence[Routing] | None
    ) -> list[Routing | None]:
        """The routing of each layer that is known before it runs: a replay's, or the shared one.

        ``None`` for a layer that decides itself, or has no experts.
        """
        have_experts = [isinstance(conv, MoEConv) for conv in self.convs]
        is_shared = self.shared_router is not None
        given: list[Routing] = []
        if routings is not None:
            given = checked_routings(routings, 1 if is_shared else sum(have_experts), "router")
        if is_shared:
            decision = given[0] if given else self.route_once(x, graph, batch)
            return [decision] * self.num_layers
        turns = iter(given)
        return [next(turns, None) if has_experts else None for has_experts in have_experts]

    # The next three are also the steps of inference, which runs a layer part by part.

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

    def convolve(
        self, layer: int, x: Tensor, graph: Graph, batch: Tensor | None, routing: Routing | None
    ) -> tuple[Tensor, Routing | None]:
        """A layer's conv plus its residual at the graph's destinations; and the routing of a MoE.

        Args:
            layer: the number of the layer.
            x: (N, D) its input.
            graph: the whole graph or a part of it.
            batch: (N,) the graph of each node, or ``None``.
            routing: a shared router's decision, or ``None`` to let the layer decide.
        """
        conv = self.convs[layer]
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

    inference = inference
    reset_parameters = reset_parameters

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.in_channels}, {self.hidden_channels}, "
            f"{self.out_channels}, num_layers={self.num_layers}, "
            f"shared_router={self.shared_router is not None})"
        )


def _named_classes(k: int, conv_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The classes of convs and routers that a model is saved with by their names."""
    mix = conv_kwargs.get("mix", "outputs")
    return by_name() | saved_by_name(conv_kwargs["start"], mix, k, conv_kwargs.get("router_kwargs"))


def _moe_layers(
    router: RouterLike | None, shared_router: bool, num_hidden: int, every: int
) -> list[int]:
    """The numbers of the layers that are MoE; the arguments are those of :class:`GNNMoE`."""
    if router is None:
        return []
    chosen = choose_blocks(num_hidden, every)
    if isinstance(router, Router) and len(chosen) > 1 and not shared_router:
        raise ValueError("router: got an instance for several layers, expected a name or a factory")
    return chosen


def _check_options(conv: ConvLike, conv_kwargs: Mapping[str, object]) -> None:
    """Refuse what is an argument of neither the model nor its layers nor their convs."""
    kind = kinds_of(conv, None)[0]  # of several kinds, the layers check the others
    for option, value in conv_kwargs.items():
        check_option(
            option, value, factory_of(kind), "GNNMoE", inspect.signature(GNNMoE).parameters
        )


def _start_of(
    conv: ConvLike,
    num_experts: int | None,
    router: RouterLike | None,
    k: int,
    shared_router: bool | None,
    conv_kwargs: Mapping[str, Any],
) -> Start:
    """How all layers start; the arguments are those of :class:`GNNMoE`.

    ``None`` is copies only where one decision serves all layers and convs of that class are
    stacked, so that copies share a base: in the study of starts, copies were safe only there. An
    option may still keep a conv from being stacked; its copies then start as the dense layer, too.
    """
    kinds = kinds_of(conv, num_experts)
    are_stacked = kind_of(class_of(factory_of(kinds[0]))).stack is not None
    return resolved_start(
        conv_kwargs.get("start"),
        kinds,
        shared_transform=conv_kwargs.get("shared_transform", False),
        router=router if are_stacked and shared_router is not False else None,
        k=k,
        mix=conv_kwargs.get("mix", "outputs"),
        router_kwargs=conv_kwargs.get("router_kwargs"),
    )


def _build_shared_router(
    router: RouterLike, in_channels: int, moe_kwargs: Mapping[str, Any]
) -> Router:
    """Build the router that decides for all layers, from the raw features."""
    dim = router_width(moe_kwargs["router_input"], in_channels, in_channels)
    num_experts = moe_kwargs["num_experts"]
    k = moe_kwargs["k"]
    start = moe_kwargs["start"]
    with drawn_apart(start != "plain"):
        built = build_layer_router(
            start,
            router,
            dim,
            num_experts,
            k,
            moe_kwargs.get("router_kwargs"),
            moe_kwargs.get("mix", "outputs"),
        )
    if moe_kwargs.get("check_finite", False):
        let_check_finite(built, router)
    return built


def _build_conv(
    conv: ConvLike,
    width: int,
    out: int,
    is_hidden: bool,
    moe_kwargs: Mapping[str, Any] | None,
    conv_kwargs: Mapping[str, Any],
) -> MoEConv | MessagePassing:
    """Build the conv of a layer, with experts or plain.

    Args:
        conv: as :class:`GNNMoE` takes it: a kind of conv, or several.
        width: columns of the layer's input.
        out: columns of the layer's output.
        is_hidden: a hidden layer, whose heads are concatenated; the output layer averages them.
        moe_kwargs: arguments of :class:`MoEConv`; ``None`` for a plain conv.
        conv_kwargs: arguments of the convs.
    """
    kinds = kinds_of(conv, None)
    if moe_kwargs is None:
        kinds = kinds[:1]  # of several kinds, the plain conv is of the first
    options = dict(conv_kwargs)
    out_channels = out  # what the conv is asked for: the columns of a single head, if concatenated
    heads, concat = _heads(kinds, options)
    if heads > 1 and "concat" in inspect.signature(factory_of(kinds[0])).parameters:
        options["concat"] = is_hidden and concat
        if options["concat"]:
            if out % heads:
                raise ValueError(
                    f"hidden_channels: got {out}, expected a multiple of heads={heads}"
                )
            out_channels = out // heads
    if moe_kwargs is None:
        built = Make(kinds, width, out_channels, (), options)(0)
        _check_width(built, width, out_channels, out)
    else:
        built = MoEConv(conv, width, out_channels, **moe_kwargs, **options)
        # A transform in front of the experts may change the width that they see.
        seen = width if built.transform is None else built.transform[-1].out_features
        _check_width(built.experts.expert(0), seen, out_channels, out)
    return built


def _heads(kinds: Sequence[str | ConvFactory], options: Mapping[str, Any]) -> tuple[int, bool]:
    """The number of heads, and whether they are concatenated: from arguments and from partials.

    One head for kinds that disagree: the layer's width is then not divided among heads.
    """
    settings = set()
    for kind in kinds:
        bound = kind.keywords if isinstance(kind, partial) else {}
        arguments = {**bound, **options}
        settings.add((arguments.get("heads", 1), arguments.get("concat", True)))
    return settings.pop() if len(settings) == 1 else (1, True)


def _check_width(conv: MessagePassing, in_channels: int, out_channels: int, out: int) -> None:
    """Refuse a conv that does not give its layer's ``out`` columns when asked for ``out_channels``.

    It is run once on a small graph; what does not run there is let through.
    """
    columns = Trial(conv, in_channels).width
    if columns not in (None, out):
        raise ValueError(
            f"conv: got {type(conv).__name__}, which gives {columns} columns for "
            f"out_channels={out_channels}, expected {out}; of several heads, heads= as an argument "
            "of the model, or concat=False"
        )
