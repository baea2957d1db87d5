"""GNNMoE: a GNN with MoEConv layers. Shapes: N nodes, M edges, D width, E experts, K experts per node."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.loader import NodeLoader
from torch_geometric.nn import GCNConv, JumpingKnowledge
from torch_geometric.nn.resolver import activation_resolver, normalization_resolver
from torch_geometric.typing import Adj

from gmoe._autograd import refuse_transforms
from gmoe._checks import check, check_choice, check_counts
from gmoe.conv.aggregate import FilterConv
from gmoe.conv.graph import Graph, parameters_of
from gmoe.conv.kinds import CONVS, OPTIONS, OWN, ConvLike, Make, factory_of, kinds_of
from gmoe.conv.moe_conv import MoEConv, RouterInput, router_parts, router_view, router_width
from gmoe.conv.separate import run
from gmoe.data.stored import StoredGraph
from gmoe.hub import HubMixin, recorded
from gmoe.models.inference import inference
from gmoe.moe import drawn_apart
from gmoe.routers import ROUTERS, Router, RouterLike, build_router
from gmoe.routing import Routing

Residual: TypeAlias = Literal["none", "identity", "linear"]


class GNNMoE(HubMixin, nn.Module):
    r"""A GNN in the manner of PyG's ``GCN``, ``GraphSAGE``, ..., with :class:`MoEConv` layers and residuals.

    .. math::
        h^{(l+1)} = \mathrm{dropout}(\phi(\mathrm{norm}(\mathrm{MoEConv}_l(h^{(l)}, A) + \mathrm{res}(h^{(l)}))))

    The output is dense: with ``jk=None`` the last layer is a plain conv, otherwise a linear layer follows the last
    conv.

    Args:
        in_channels: width of the input.
        hidden_channels: width of the hidden layers.
        out_channels: width of the output, such as the number of classes.
        num_layers: number of convs (default 2).
        conv: see :class:`MoEConv` (default ``"gcn"``).
        router: a name or factory (default ``"token_choice"``); an instance is allowed with ``shared_router`` or a
            single MoE layer. ``None`` builds the dense baseline: the same model with plain convs in all layers.
        num_experts: E (default 8, or the length of a list of convs).
        k: K, experts per node (default 1).
        shared_router: route each node once, from the raw features, for all layers; by default (``False``) each layer
            has its own router on its own input.
        router_input: what routers see: the ``"node"`` (default), its ``"neighbors"``, its ``"degree"``, or several.
        every: layer ``i`` is a MoEConv where ``i % every == every - 1`` (default 1), the output layer excepted.
        dropout: default 0.
        input_dropout: dropout of the input features (default 0).
        act, norm: as in PyG's ``BasicGNN``: a name, a function or a module (defaults: relu, no norm).
        jk: ``"cat"``, ``"max"``, ``"lstm"``, or ``"last"``, a plain output projection (default ``None``).
        residual: ``"identity"`` (default; a linear layer where widths differ), ``"linear"`` always, or ``"none"``. The
            output layer has none.
        in_proj: begin with a linear layer to ``hidden_channels`` (default ``False``).
        **conv_kwargs: further arguments of :class:`MoEConv` and of the convs. ``heads`` divide ``hidden_channels``, and
            are averaged in the output layer, as in PyG's ``GAT``.

    Shapes:
        - as PyG's ``BasicGNN``; ``edge_index`` may be a :class:`gmoe.Graph`; ``batch`` (N,) also makes the graphs
          separate groups.
        - returns (N, out_channels), and the list of :class:`Routing` with ``return_routing=True`` (one per MoE
          layer; one in all with ``shared_router``).

    Raises:
        ValueError: no layer would be a MoE; a router instance for several layers; whatever :class:`MoEConv` refuses.

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
        in_proj: bool = False,
        **conv_kwargs: Any,
    ) -> None:
        config = recorded(locals(), "conv_kwargs", conv=CONVS | OWN, shared_expert=CONVS | OWN, router=ROUTERS)
        check_counts(in_channels=in_channels, hidden_channels=hidden_channels, out_channels=out_channels)
        check_counts(num_layers=num_layers, every=every)
        check_choice("jk", jk, (None, "cat", "max", "lstm", "last"))
        super().__init__()
        self.config = config
        self.in_channels, self.hidden_channels, self.out_channels = in_channels, hidden_channels, out_channels
        self.num_layers, self.jk_mode, self.router_input = num_layers, jk, router_parts(router_input)
        self.moe_layers = _moe_layers(num_layers, every, jk) if router is not None else []
        of_moe = {name: conv_kwargs.pop(name) for name in OPTIONS if name in conv_kwargs}
        self.local = of_moe.get("local")
        of_moe |= {"num_experts": len(kinds_of(conv, num_experts)), "k": k, "router_input": self.router_input}
        fits = not isinstance(router, Router) or len(self.moe_layers) < 2 or shared_router
        check(fits, "router", "an instance for several layers", "a name or a factory")
        self.shared_router = _shared_router(router, in_channels, of_moe) if shared_router and self.moe_layers else None
        of_moe["router"] = None if shared_router else router
        widths = [hidden_channels if in_proj else in_channels, *[hidden_channels] * (num_layers - 1)]
        self.convs = nn.ModuleList()
        for layer, width in enumerate(widths):
            hidden, options = jk is not None or layer < num_layers - 1, of_moe if layer in self.moe_layers else None
            made = _conv(conv, width, hidden_channels if hidden else out_channels, hidden, options, conv_kwargs)
            self.convs.append(made)
            if isinstance(made, MoEConv) and self.shared_router is not None:  # what it costs follows from the router
                made.k, made.experts_per_token = self.shared_router.k, self.shared_router.experts_per_token
        self.flow = str(self.convs[0].flow)
        self.act = activation_resolver(act)
        check(self.act is None or callable(self.act), "act", repr(act), "a name, a function or None")
        norm_layer = normalization_resolver(norm, hidden_channels) or nn.Identity()
        self.norms = nn.ModuleList(copy.deepcopy(norm_layer) for _ in range(num_layers - (jk is None)))
        self.norm_takes_batch = "batch" in parameters_of(norm_layer)
        self.dropout, self.input_dropout = nn.Dropout(dropout), nn.Dropout(input_dropout)
        if jk is not None:
            if jk != "last":
                self.jk = JumpingKnowledge(jk, hidden_channels, num_layers)
            self.lin = nn.Linear(hidden_channels * (num_layers if jk == "cat" else 1), out_channels)
        self.lin_in = nn.Linear(in_channels, hidden_channels) if in_proj else None
        self.residuals = _residuals(residual, widths[: len(self.norms)], hidden_channels)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        for module in (*self.convs, *self.norms, *self.residuals):
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for name in ("jk", "lin", "lin_in", "shared_router"):
            if (module := getattr(self, name, None)) is not None:
                module.reset_parameters()

    def decide(self, x: Tensor, edge_index: Adj | Graph, batch: Tensor | None = None) -> Routing:
        """The shared routing of all nodes from their raw features.

        Raises:
            ValueError: each layer routes for itself.
        """
        if self.shared_router is None:
            raise ValueError("shared_router: got False, expected True to decide once")
        graph = self._graph(x, edge_index, None, None)
        routing: Routing = self.shared_router(self.view(x, graph), batch, graph.edge_index)
        return routing

    def view(self, x: Tensor, graph: Graph) -> Tensor:
        """(N, dim) what a shared router sees: the raw features, their means over in-edges, the in-degrees."""
        means = graph.mean(x) if "neighbors" in self.router_input else None
        return router_view(self.router_input, x[: graph.num_dst], means, graph)

    def _graph(self, x: Tensor, edge_index: Any, edge_weight: Tensor | None, edge_attr: Tensor | None) -> Graph:
        if not isinstance(x, Tensor) or x.dim() != 2 or x.size(1) != self.in_channels:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x: got shape {got}, expected (number of nodes, {self.in_channels})")
        for name, value in (("edge_weight", edge_weight), ("edge_attr", edge_attr)):
            taken = (c.edge_names if isinstance(c, MoEConv) else parameters_of(c) for c in self.convs)
            if value is not None and not any(name in names for names in taken):  # of kinds, some take less than others
                raise ValueError(f"{name}: got a tensor, but no conv of the model takes it")
        if not isinstance(edge_index, Graph):
            return Graph(edge_index, x.size(0), edge_weight=edge_weight, edge_attr=edge_attr, flow=self.flow)
        if (edge_index.num_src, edge_index.num_dst) != (x.size(0), x.size(0)):
            raise ValueError(f"edge_index: got {edge_index}, expected {x.size(0)} nodes, as x has")
        legal = f"{self.flow!r}, as the convs have"
        check(edge_index.flow == self.flow, "flow", f"a Graph of {edge_index.flow!r}", legal)
        return edge_index.with_args(edge_weight, edge_attr)

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
            raise ValueError("x: got a torch.fx proxy, expected a tensor: in place of to_hetero, take HeteroGNNMoE")
        graph = self._graph(x, edge_index, edge_weight, edge_attr)
        decision = None if self.shared_router is None else self.decide(x, graph, batch)
        routings = [] if decision is None else [decision]

        def step(layer: int, x: Tensor) -> Tensor:
            part, followed, groups = graph, decision, batch
            if num_sampled_nodes_per_hop is not None and num_sampled_edges_per_hop is not None and layer:  # trim
                x = x[: sum(num_sampled_nodes_per_hop[:-layer])]
                part = graph.first(len(x), sum(num_sampled_edges_per_hop[:-layer]))
                groups = None if batch is None else batch[: len(x)]
                followed = None if decision is None else decision.select(slice(0, len(x)))
            out, routing = self.layer(layer, x, part, groups, followed, batch_size)
            routings.extend([] if routing is None or decision is not None else [routing])
            return out

        x = self.through(x, step)
        return (x, routings) if return_routing else x

    def through(self, x: Any, step: Callable[[int, Any], Tensor], each: Callable[..., Tensor] | None = None) -> Tensor:
        """The loop over layers.

        Args:
            x: (N, D) features, or what ``step`` takes for them.
            step: from a layer and its input to its output: :meth:`layer` on a graph, or part by part.
            each: from a module and an input to the output (default: a call).
        """
        each = each or (lambda module, x: module(x))
        x = self.input_dropout(x) if self.training else x
        x = x if self.lin_in is None else each(self.lin_in, x)
        xs = []
        for layer in range(self.num_layers):
            x = step(layer, x)
            if hasattr(self, "jk"):  # else nothing holds the layers in between
                xs.append(x)
        if hasattr(self, "jk"):
            # trimming leaves the later layers fewer nodes; inference may keep all of them on another device
            device = next(self.parameters()).device
            x = self.jk([h[: x.size(0)].to(device) for h in xs]).to(x.device)
        return each(self.lin, x) if self.jk_mode is not None else x

    def layer(
        self,
        layer: int,
        x: Tensor,
        graph: Graph,
        batch: Tensor | None = None,
        routing: Routing | None = None,
        batch_size: int | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """Conv, residual, norm, activation and dropout of a layer; and the routing of a MoE layer."""
        out, routing = self.conv(layer, x, graph, batch, routing)
        return self.after(layer, out, batch, batch_size), routing

    def conv(
        self, layer: int, x: Tensor, graph: Graph, batch: Tensor | None, routing: Routing | None
    ) -> tuple[Tensor, Routing | None]:
        """Conv and residual of a layer, at the graph's destinations; and the routing of a MoE layer."""
        conv: Any = self.convs[layer]
        if isinstance(conv, MoEConv):
            out, routing = conv(x, graph, batch=batch, routing=routing, return_routing=True)
        else:
            out, routing = dense(conv, x, graph), None
        return (out + self.residuals[layer](x[: len(out)]) if layer < len(self.residuals) else out), routing

    def after(self, layer: int, x: Tensor, batch: Tensor | None = None, batch_size: int | None = None) -> Tensor:
        """Normalization, activation and dropout, on all but an output conv."""
        if layer == len(self.norms):
            return x
        norm = self.norms[layer]
        x = norm(x, batch, batch_size) if self.norm_takes_batch else norm(x)
        return self.dropout(x if self.act is None else self.act(x))

    @torch.no_grad()
    def inference(
        self,
        loader: NodeLoader | Data | StoredGraph,
        device: torch.device | str | None = None,
        embedding_device: torch.device | str = "cpu",
        progress_bar: bool = False,
        *,
        batch_size: int | None = None,
        return_routing: bool = False,
        folder: str | Path | None = None,
    ) -> Any:
        """Logits of all nodes, layer by layer in chunks, without gradients: equal to the forward on the whole graph.

        Each layer routes once over all nodes, so that no node's experts depend on its chunk, and GCN's degrees are
        those of the whole graph. Call ``eval()`` first, as for any evaluation.

        Of a :class:`gmoe.StoredGraph`, the features of all nodes are kept on disk, in ``folder``, and memory is that of
        a chunk, its in-edges and their sources. Each chunk is then routed by itself: routers must decide token by token
        (token choice, random, uniform, centroids, or experts' choice with ``inference="threshold"``), norms row by row.

        Args:
            loader: a node loader, of which the graph and the batch size are taken (not what it samples), or the graph:
                ``x``, ``edge_index``, and, where they are there and the convs take them, ``edge_weight``, ``edge_attr``
                and ``batch``. Or a stored graph.
            device: where chunks are computed (default: where the model is).
            embedding_device: where the features of all nodes are kept (default ``"cpu"``).
            progress_bar: show one (default ``False``).
            batch_size: nodes per chunk (default: the loader's, or 1,024).
            return_routing: return the routings too, as :meth:`forward` does.
            folder: of a stored graph, where to write: hidden features, which are removed in the end, and
                ``logits.npy``, as which the result is mapped.

        Raises:
            ValueError: of a stored graph, no ``folder``; ``return_routing`` or another ``embedding_device``,
                which would take memory for all nodes; a model in training; a router, norm, ``jk``, ``flow`` or number
                of hops that needs all nodes at once, by name.
            RuntimeError: a conv that looks further than one hop, such as ``ChebConv``.
        """
        return inference(self, loader, device, embedding_device, progress_bar, batch_size, return_routing, folder)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.in_channels}, {self.hidden_channels}, {self.out_channels}, "
            f"num_layers={self.num_layers}, shared_router={self.shared_router is not None})"
        )


def _moe_layers(num_layers: int, every: int, jk: str | None) -> list[int]:
    """The layers with experts; without jumping knowledge the last one is the dense output."""
    found = [i for i in range(num_layers - (jk is None)) if i % every == every - 1]
    got = f"{every} with num_layers={num_layers} and jk={jk!r}, which leaves no hidden layer for a MoE"
    check(found, "every", got, "more layers, a smaller every, or jk='last'")
    return found


def _residuals(residual: Residual, widths: list[int], hidden_channels: int) -> nn.ModuleList:
    """The maps of what is added to each hidden conv."""
    check_choice("residual", residual, get_args(Residual))
    same = [residual == "identity" and width == hidden_channels for width in widths]
    made = [nn.Identity() if s else nn.Linear(w, hidden_channels) for s, w in zip(same, widths, strict=True)]
    return nn.ModuleList([] if residual == "none" else made)


def _shared_router(router: Any, in_channels: int, of_moe: dict[str, Any]) -> Router:
    """A router of raw features for all layers."""
    dim = router_width(of_moe["router_input"], in_channels, in_channels)
    with nullcontext() if of_moe.get("shared_expert") is False else drawn_apart():
        made = build_router(router, dim, of_moe["num_experts"], of_moe["k"], of_moe.get("router_kwargs"))
    made.check_finite |= of_moe.get("check_finite", False)
    return made


def _conv(
    kind: ConvLike, width: int, out: int, hidden: bool, of_moe: dict[str, Any] | None, conv_kwargs: dict[str, Any]
) -> nn.Module:
    """The conv of a layer, with experts or plain. Heads share the width of a hidden layer, else they are averaged."""
    first, options, heads = kinds_of(kind, None)[:1], dict(conv_kwargs), int(conv_kwargs.get("heads", 1))
    if heads > 1 and "concat" in inspect.signature(factory_of(first[0])).parameters:
        options.setdefault("concat", hidden)
        options["concat"] &= hidden
        if options["concat"]:
            check(out % heads == 0, "hidden_channels", out, f"a multiple of heads={heads}")
            out //= heads
    if of_moe is not None:
        return MoEConv(kind, width, out, **of_moe, **options)
    return Make(first, width, out, (), options)(0)  # of several kinds, the first is the dense one


def dense(conv: Any, x: Tensor, graph: Graph) -> Tensor:
    """(N_dst, O) a plain conv; GCN on a part with the norms of the whole graph."""
    if isinstance(conv, FilterConv):
        out: Tensor = conv(x, graph)
        return out[: graph.num_dst]
    if not isinstance(conv, GCNConv) or not conv.normalize or graph.scale_of is None:
        return run(conv, graph, x, x)
    exact = torch.promote_types(x.dtype, torch.float32)
    matrix = graph.normalized(improved=conv.improved, loops=conv.add_self_loops, dtype=exact)
    ends, weight = torch.stack([matrix.edges.sender, matrix.edges.receiver]), matrix.weight
    if matrix.diagonal is not None:
        node = torch.arange(graph.num_dst, device=x.device)
        ends, weight = torch.cat([ends, node.expand(2, -1)], dim=1), torch.cat([weight, matrix.diagonal])
    plain = copy.copy(conv)  # another thread may be running the conv itself
    plain.flow, plain.normalize = "source_to_target", False
    found: Tensor = plain(x, ends, weight)
    return found[: graph.num_dst]
