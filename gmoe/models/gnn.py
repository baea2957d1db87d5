"""GNNMoE: a GNN with MoEConv layers. Shapes: N nodes, M edges, D width, E experts, K experts per
node.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch_geometric.nn import GCNConv, JumpingKnowledge
from torch_geometric.nn.inits import reset
from torch_geometric.nn.resolver import activation_resolver, normalization_resolver
from torch_geometric.typing import Adj

from gmoe._autograd import refuse_transforms
from gmoe._checks import check, check_choice, check_counts
from gmoe.conv.aggregate import FilterConv
from gmoe.conv.graph import Graph, parameters_of
from gmoe.conv.kinds import CONVS, OPTIONS, OWN, ConvLike, Make, Trial, factory_of, kinds_of
from gmoe.conv.moe_conv import MoEConv, RouterInput, router_parts, router_view, router_width
from gmoe.conv.separate import run
from gmoe.hub import HubMixin, recorded
from gmoe.models.inference import inference
from gmoe.moe import check_copies, check_start, choose_blocks, drawn_apart
from gmoe.routers import ROUTERS, Router, RouterLike, build_router
from gmoe.routing import Routing

Residual: TypeAlias = Literal["none", "identity", "linear"]


def reset_parameters(model: nn.Module) -> None:
    """Draw all parameters anew."""
    for part in model.children():
        reset(part)


class GNNMoE(HubMixin, nn.Module):
    r"""A GNN in the manner of PyG's ``GCN``, ``GraphSAGE``, ..., with :class:`MoEConv` layers and
    residuals.

    .. math::
        h^{(l+1)} = \mathrm{dropout}(\phi(\mathrm{norm}(\mathrm{MoEConv}_l(h^{(l)}, A) + \mathrm{res}(h^{(l)}))))

    The output is dense: with ``jk=None`` the last layer is a plain conv, otherwise a linear layer
    follows the last conv.

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
        shared_router: route each node once, from the raw features, for all layers; by default
            (``False``) each layer has its own router on its own input.
        router_input: what routers see: the ``"node"`` (default), its ``"neighbors"``, its
            ``"degree"``, or several.
        every: layer ``i`` is a MoEConv where ``i % every == every - 1`` (default 1), the output
            layer excepted.
        dropout: default 0.
        input_dropout: dropout of the input features (default 0).
        act, norm: as in PyG's ``BasicGNN``: a name, a function or a module (defaults: relu, no
            norm).
        jk: ``"cat"``, ``"max"``, ``"lstm"``, or ``"last"``, a plain output projection (default
            ``None``).
        residual: ``"identity"`` (default; a linear layer where widths differ), ``"linear"`` always,
            or ``"none"``. The output layer has none.
        **conv_kwargs: further arguments of :class:`MoEConv` and of the convs. ``heads``, given here
            or by a ``functools.partial``, divide ``hidden_channels``, and are averaged in the
            output layer, as in PyG's ``GAT``.

    Shapes:
        - as PyG's ``BasicGNN``; ``edge_index`` may be a :class:`gmoe.Graph`; ``batch`` (N,) also
          makes the graphs separate groups.
        - returns (N, out_channels), and the list of :class:`Routing` with ``return_routing=True``
          (one per MoE layer; one in all with ``shared_router``).

    Raises:
        ValueError: no layer would be a MoE; a router instance for several layers; a conv whose
            output has another width than its layer; whatever :class:`MoEConv` refuses.

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
        shared_router: bool = False,
        router_input: RouterInput = "node",
        every: int = 1,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        act: Any = "relu",
        norm: Any = None,
        jk: str | None = None,
        residual: Residual = "identity",
        **conv_kwargs: Any,
    ) -> None:
        conv_kwargs["start"] = check_start(conv_kwargs.get("start"))  # as it is now, to be saved
        config = recorded(locals(), "conv_kwargs", CONVS | OWN | ROUTERS)
        check_counts(
            in_channels=in_channels, hidden_channels=hidden_channels, out_channels=out_channels
        )
        check_counts(num_layers=num_layers)
        # they may be NumPy's, which torch and PyG do not take everywhere
        in_channels, hidden_channels = int(in_channels), int(hidden_channels)
        out_channels, num_layers = int(out_channels), int(num_layers)
        check_choice("jk", jk, (None, "cat", "max", "lstm", "last"))
        super().__init__()
        self.config, self.num_layers, self.jk_mode = config, num_layers, jk
        self.in_channels, self.hidden_channels, self.out_channels = (
            in_channels,
            hidden_channels,
            out_channels,
        )
        num_hidden = num_layers - (
            jk is None
        )  # without jumping knowledge the last conv is the output
        moe_layers = [] if router is None else choose_blocks(num_hidden, every)
        fits = shared_router or len(moe_layers) < 2 or not isinstance(router, Router)
        check(fits, "router", "an instance for several layers", "a name or a factory")
        routed = {name: conv_kwargs.pop(name) for name in OPTIONS if name in conv_kwargs}
        self.local, self.router_input = routed.get("local"), router_parts(router_input)
        routed |= {
            "num_experts": len(kinds_of(conv, num_experts)),
            "k": k,
            "router_input": self.router_input,
        }
        deciding = (
            _shared_router(router, in_channels, routed) if shared_router and moe_layers else None
        )
        routed["router"] = None if shared_router else router
        widths = [in_channels, *[hidden_channels] * (num_layers - 1)]
        self.convs = nn.ModuleList()
        for layer, width in enumerate(widths):
            hidden, options = layer < num_hidden, routed if layer in moe_layers else None
            made = _conv(
                conv,
                width,
                hidden_channels if hidden else out_channels,
                hidden,
                options,
                conv_kwargs,
            )
            self.convs.append(made)
            if options and deciding:  # what a layer costs follows from its router
                made.k, made.experts_per_token = deciding.k, deciding.experts_per_token
        self.flow = str(self.convs[0].flow)
        self.act, norm_layer = activation_of(act), norm_of(norm, hidden_channels)
        self.norms = nn.ModuleList(copy.deepcopy(norm_layer) for _ in range(num_hidden))
        self.norm_takes_batch = "batch" in parameters_of(norm_layer)
        self.dropout, self.input_dropout = nn.Dropout(dropout), nn.Dropout(input_dropout)
        if jk not in (None, "last"):
            self.jk = JumpingKnowledge(jk, hidden_channels, num_layers)
        if jk is not None:
            self.lin = nn.Linear(hidden_channels * (num_layers if jk == "cat" else 1), out_channels)
        added = [] if residual == "none" else widths[:num_hidden]
        self.residuals = nn.ModuleList(
            residual_of(residual, width, hidden_channels) for width in added
        )
        self.shared_router = deciding

    def view(self, x: Tensor, graph: Graph) -> Tensor:
        """(N, dim) what a shared router sees: the raw features, their means over in-edges, the
        in-degrees.
        """
        return router_view(self.router_input, x, x[: graph.num_dst], None, graph)

    def _takes(self, name: str) -> bool:
        """Whether a conv takes this edge argument; of kinds, some take less than others."""
        return any(
            name in (c.edge_names if isinstance(c, MoEConv) else parameters_of(c))
            for c in self.convs
        )

    def _graph(
        self, x: Tensor, edge_index: Any, edge_weight: Tensor | None, edge_attr: Tensor | None
    ) -> Graph:
        for name, value in {"edge_weight": edge_weight, "edge_attr": edge_attr}.items():
            check(
                value is None or self._takes(name),
                name,
                "a tensor, but no conv of the model takes it",
                None,
            )
        if not isinstance(edge_index, Graph):
            return Graph(
                edge_index, len(x), edge_weight=edge_weight, edge_attr=edge_attr, flow=self.flow
            )
        return edge_index.fitting((len(x), len(x)), self.flow, edge_weight, edge_attr)

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
        return_routing: bool = False,
    ) -> Any:
        """Logits of all nodes; see the class and PyG's ``BasicGNN``."""
        refuse_transforms()
        if isinstance(x, torch.fx.Proxy):
            raise ValueError(
                "x: got a torch.fx proxy, expected a tensor: in place of to_hetero, take HeteroGNNMoE"
            )
        graph = self._graph(x, edge_index, edge_weight, edge_attr)
        shared = self.shared_router
        decision = None if shared is None else shared(self.view(x, graph), batch, graph.edge_index)
        routings = [] if decision is None else [decision]

        def step(layer: int, x: Tensor) -> Tensor:
            part, followed, groups = graph, decision, batch
            if (
                num_sampled_nodes_per_hop is not None
                and num_sampled_edges_per_hop is not None
                and layer
            ):  # trim
                x = x[: sum(num_sampled_nodes_per_hop[:-layer])]
                part = graph.first(len(x), sum(num_sampled_edges_per_hop[:-layer]))
                groups = None if batch is None else batch[: len(x)]
                followed = None if decision is None else decision.select(slice(0, len(x)))
            x, routing = self.conv(layer, x, part, groups, followed)
            if routing is not None and decision is None:
                routings.append(routing)
            return self.after(layer, x, groups, batch_size)

        x = self.through(x, step)
        return (x, routings) if return_routing else x

    def through(self, x: Any, step: Callable[[int, Any], Tensor]) -> Tensor:
        """The loop over layers.

        Args:
            x: (N, D) features, or what ``step`` takes for them.
            step: from a layer and its input to its output, on the whole graph or part by part.
        """
        x = self.input_dropout(x) if self.training else x
        xs = []
        for layer in range(self.num_layers):
            x = step(layer, x)
            if hasattr(self, "jk"):  # else nothing holds the layers in between
                xs.append(x)
        if not xs:
            return x
        # trimming leaves the later layers fewer nodes; inference may keep all of them on another
        # device
        device = next(self.parameters()).device
        return self.lin(self.jk([h[: len(x)].to(device) for h in xs])).to(x.device)

    def conv(
        self, layer: int, x: Tensor, graph: Graph, batch: Tensor | None, routing: Routing | None
    ) -> tuple[Tensor, Routing | None]:
        """Conv and residual of a layer, at the graph's destinations; and the routing of a MoE
        layer.
        """
        conv = self.convs[layer]
        if isinstance(conv, MoEConv):
            out, routing = conv(x, graph, batch=batch, routing=routing, return_routing=True)
        else:
            out, routing = dense(conv, x, graph), None
        return (
            out + self.residuals[layer](x[: len(out)]) if layer < len(self.residuals) else out
        ), routing

    def after(
        self, layer: int, x: Tensor, batch: Tensor | None = None, batch_size: int | None = None
    ) -> Tensor:
        """Normalization, activation and dropout, on all but an output conv; and the output of
        ``jk="last"``.
        """
        if layer == len(self.norms):
            return x
        norm = self.norms[layer]
        x = norm(x, batch, batch_size) if self.norm_takes_batch else norm(x)
        x = self.dropout(self.act(x))
        return self.lin(x) if self.jk_mode == "last" and layer == self.num_layers - 1 else x

    inference = inference
    reset_parameters = reset_parameters

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.in_channels}, {self.hidden_channels}, {self.out_channels}, "
            f"num_layers={self.num_layers}, shared_router={self.shared_router is not None})"
        )


def activation_of(act: Any) -> Any:
    """The activation of that name, or a function or module as it is; ``None`` is the identity."""
    found = activation_resolver(act) or nn.Identity()
    check(callable(found), "act", repr(act), "a name, a function or None")
    return found


def norm_of(norm: Any, width: int) -> Any:
    """The norm of that name, or a module as it is; ``None`` is the identity."""
    return normalization_resolver(norm, width) or nn.Identity()


def residual_of(residual: Residual, width: int, out: int) -> nn.Module:
    """The map of what is added to a hidden layer, if something is."""
    check_choice("residual", residual, Residual)
    return nn.Identity() if residual == "identity" and width == out else nn.Linear(width, out)


def _shared_router(router: Any, in_channels: int, routed: dict[str, Any]) -> Router:
    """A router of raw features for all layers."""
    dim = router_width(routed["router_input"], in_channels, in_channels)
    with drawn_apart(routed.get("start") != "plain"):
        made = build_router(
            router, dim, routed["num_experts"], routed["k"], routed.get("router_kwargs")
        )
    check_copies(routed["start"], made)
    made.check_finite |= routed.get("check_finite", False)
    return made


def _conv(
    kind: Any, width: int, out: int, hidden: bool, routed: dict[str, Any] | None, options: Any
) -> Any:
    """The conv of a layer, with experts or plain.

    Heads share the width of a hidden layer, else they are averaged.
    """
    kinds, options, asked = kinds_of(kind, None), dict(options), out
    if routed is None:
        kinds = kinds[:1]  # of several kinds, the first is the dense one
    heads, concat = _heads(kinds, options)
    if heads > 1 and "concat" in inspect.signature(factory_of(kinds[0])).parameters:
        options["concat"] = hidden and concat
        if options["concat"]:
            check(out % heads == 0, "hidden_channels", out, f"a multiple of heads={heads}")
            asked = out // heads
    if routed is None:
        made = Make(kinds, width, asked, (), options)(0)
        _check_width(made, width, asked, out)
        return made
    made = MoEConv(kind, width, asked, **routed, **options)
    seen = width if made.transform is None else made.transform[-1].out_features
    _check_width(made.experts.expert(0), seen, asked, out)
    return made


def _check_width(conv: Any, in_channels: int, asked: int, out: int) -> None:
    """Refuse a conv that, asked for some columns, does not give those of the layer."""
    found = Trial(conv, in_channels).width
    got = f"{type(conv).__name__}, which gives {found} columns for out_channels={asked}"
    legal = f"{out}; of several heads, heads= as an argument of the model, or concat=False"
    check(found in (None, out), "conv", got, legal)


def _heads(kinds: Sequence[Any], options: Mapping[str, Any]) -> tuple[int, bool]:
    """The number of heads, and if they are concatenated, as arguments and partials say.

    One head for kinds that disagree: the layer's width is then not divided among heads.
    """
    given = [(kind.keywords if isinstance(kind, partial) else {}) | dict(options) for kind in kinds]
    first, *others = {(said.get("heads", 1), said.get("concat", True)) for said in given}
    return (1, True) if others else first


def dense(conv: Any, x: Tensor, graph: Graph) -> Tensor:
    """(N_dst, O) a plain conv; GCN on a part with the norms of the whole graph."""
    if isinstance(conv, FilterConv):
        return conv(x, graph)[: graph.num_dst]
    if not isinstance(conv, GCNConv) or not conv.normalize or graph.scale_of is None:
        return run(conv, graph, x, x)
    matrix = graph.normalized(improved=conv.improved, loops=conv.add_self_loops, dtype=x.dtype)
    ends, weight = torch.stack([matrix.edges.sender, matrix.edges.receiver]), matrix.weight
    if matrix.diagonal is not None:
        node = torch.arange(graph.num_dst, device=x.device)
        ends, weight = (
            torch.cat([ends, node.expand(2, -1)], dim=1),
            torch.cat([weight, matrix.diagonal]),
        )
    plain = copy.copy(conv)  # another thread may be running the conv itself
    plain.flow, plain.normalize = "source_to_target", False
    return plain(x, ends, weight)[: graph.num_dst]
