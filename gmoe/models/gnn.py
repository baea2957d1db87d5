"""GNNMoE: a PyG-style GNN with MoEConv layers. Shapes: N nodes, M edges, D width, E experts, K experts per node."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.loader import NodeLoader
from torch_geometric.nn.models.basic_gnn import BasicGNN
from torch_geometric.typing import Adj
from tqdm import tqdm

from gmoe._autograd import refuse_transforms
from gmoe._checks import check, check_choice, check_count, check_counts
from gmoe.conv.aggregate import FilterConv
from gmoe.conv.base import NodeChunks, powers
from gmoe.conv.graph import Graph, check_batch, parameters_of
from gmoe.conv.kinds import CONVS, OWN, ConvFactory, ConvLike, CopyOf, Make, factory_of, kinds_of
from gmoe.conv.moe_conv import MoEConv, RouterInput, router_parts, router_view, router_width
from gmoe.data.stored import StoredGraph
from gmoe.dispatch import Backend
from gmoe.hub import HubMixin, recorded
from gmoe.models.disk import check_one_hop, dense_chunked, inference_on_disk
from gmoe.moe import drawn_apart
from gmoe.routers import ROUTERS, Router, RouterLike, build_router
from gmoe.routing import Routing

Residual: TypeAlias = Literal["none", "identity", "linear"]


class GNNMoE(HubMixin, BasicGNN):
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
        router_hops: with ``shared_router``, how many times the raw features are averaged over in-edges: the neighbors
            are (Ax, ..., A^hops x) (default 1).
        every: layer ``i`` is a MoEConv where ``i % every == every - 1`` (default 1), the output layer excepted.
        dropout: default 0.
        act, act_first, act_kwargs, norm, norm_kwargs, jk: as in PyG's ``BasicGNN`` (defaults: relu, no norm, no
            jumping knowledge; ``jk="last"`` is a plain output projection).
        residual: ``"identity"`` (default; a linear layer where widths differ), ``"linear"`` always, or ``"none"``. The
            output layer has none.
        shared_expert, dense_start: see :class:`MoEConv` (default ``True``): with the same seed, a new model equals the
            dense one (``router=None``).
        input_dropout: dropout of the input features (default 0).
        in_proj: begin with a linear layer to ``hidden_channels`` (default ``False``).
        router_kwargs: further arguments of the routers.
        backend, local, check_finite: see :class:`MoEConv`.
        **conv_kwargs: further arguments of the convs. ``heads`` divide ``hidden_channels``, and are averaged in the
            output layer, as in PyG's ``GAT``.

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

    supports_edge_weight = True
    supports_edge_attr = True

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        num_layers: int = 2,
        conv: ConvLike = "gcn",
        router: RouterLike | None = "token_choice",
        *,
        num_experts: int | None = None,
        k: int = 1,
        shared_router: bool = False,
        router_input: RouterInput = "node",
        router_hops: int = 1,
        every: int = 1,
        dropout: float = 0.0,
        act: Any = "relu",
        act_first: bool = False,
        act_kwargs: dict[str, Any] | None = None,
        norm: Any = None,
        norm_kwargs: dict[str, Any] | None = None,
        jk: str | None = None,
        residual: Residual = "identity",
        shared_expert: bool | str | ConvFactory = True,
        dense_start: bool = True,
        input_dropout: float = 0.0,
        in_proj: bool = False,
        router_kwargs: Mapping[str, Any] | None = None,
        backend: Backend = "auto",
        local: bool | None = None,
        check_finite: bool = False,
        **conv_kwargs: Any,
    ) -> None:
        config = recorded(locals(), "conv_kwargs", conv=CONVS | OWN, shared_expert=CONVS | OWN, router=ROUTERS)
        check_counts(in_channels=in_channels, hidden_channels=hidden_channels, out_channels=out_channels, every=every)
        check_counts(num_layers=num_layers, router_hops=router_hops)
        nn.Module.__init__(self)
        self.config = config
        self.router_input, self.router_hops = router_parts(router_input), router_hops
        self.moe_layers = _moe_layers(num_layers, every, jk) if router is not None else []
        num_experts = len(kinds_of(conv, num_experts))
        decider = None
        if shared_router and router is not None:
            dim = router_width(self.router_input, in_channels, router_hops * in_channels)
            with nullcontext() if shared_expert is False else drawn_apart():
                decider = build_router(router, dim, num_experts, k, router_kwargs)
            decider.check_finite |= check_finite
        elif isinstance(router, Router):
            check(len(self.moe_layers) < 2, "router", "an instance for several layers", "a name or a factory")
        own = {"router": router, "router_input": self.router_input, "router_kwargs": router_kwargs}
        of_moe: dict[str, Any] = own if decider is None else {"router": None}
        of_moe |= {"num_experts": num_experts, "k": k, "shared_expert": shared_expert}
        of_moe |= {"dense_start": dense_start, "backend": backend, "local": local, "check_finite": check_finite}
        sizes = (hidden_channels if in_proj else in_channels, hidden_channels, num_layers, out_channels)
        of_gnn = (dropout, act, act_first, act_kwargs, norm, norm_kwargs, jk)
        super().__init__(*sizes, *of_gnn, conv=conv, of_moe=of_moe, conv_kwargs=conv_kwargs)
        check(self.act is None or callable(self.act), "act", repr(act), "a name, a function or None")
        self.in_channels, self.local = in_channels, local
        self.input_dropout = nn.Dropout(input_dropout)
        self.lin_in = nn.Linear(in_channels, hidden_channels) if in_proj else None
        self.residuals = self._build_residuals(residual)
        self.shared_router = decider
        if decider is not None:
            for layer in self.moe_layers:  # what the convs cost follows from a router that they do not hold
                self.convs[layer].k, self.convs[layer].experts_per_token = decider.k, decider.experts_per_token

    def _build_residuals(self, residual: Residual) -> nn.ModuleList:
        """What is added to each hidden conv."""
        check_choice("residual", residual, get_args(Residual))
        widths = [self.hidden_channels] * (self.num_layers - (self.jk_mode is None))
        if widths and self.lin_in is None:
            widths[0] = self.in_channels
        plain = residual == "identity"
        same = self.hidden_channels
        found = [nn.Identity() if plain and width == same else nn.Linear(width, same) for width in widths]
        return nn.ModuleList([] if residual == "none" else found)

    def init_conv(self, in_channels: int | tuple[int, int], out_channels: int, **kwargs: Any) -> Any:
        """The conv of the next layer; called by ``BasicGNN``."""
        layer = len(self.convs)
        conv, conv_kwargs = kwargs["conv"], dict(kwargs["conv_kwargs"])
        if isinstance(conv, DenseLayers):
            conv = conv.of(layer)
        heads = int(conv_kwargs.get("heads", 1))
        if heads > 1 and "concat" in inspect.signature(factory_of(kinds_of(conv, None)[0])).parameters:  # not averaged
            if self.jk_mode is None and layer == self.num_layers - 1:
                conv_kwargs["concat"] = False
            elif conv_kwargs.get("concat", True):
                check(out_channels % heads == 0, "hidden_channels", out_channels, f"a multiple of heads={heads}")
                out_channels //= heads
        if layer in self.moe_layers:
            return MoEConv(conv, in_channels, out_channels, **kwargs["of_moe"], **conv_kwargs)
        first = kinds_of(conv, None)[:1]  # of several kinds, the first is the dense one
        return Make(first, in_channels, out_channels, (), conv_kwargs)(0)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        super().reset_parameters()
        for module in (self.lin_in, self.shared_router, *self.residuals):
            if isinstance(module, nn.Linear | Router):
                module.reset_parameters()

    @property
    def flow(self) -> str:
        """PyG's ``flow`` of the first layer, which a shared router's means over neighbors follow."""
        return str(self.convs[0].flow)

    def decide(self, x: Tensor, edge_index: Adj | Graph, batch: Tensor | None = None) -> Routing:
        """The shared routing of all nodes from their raw features.

        Raises:
            ValueError: each layer routes for itself.
        """
        if self.shared_router is None:
            raise ValueError("shared_router: got False, expected True to decide once")
        graph = self._graph(x, edge_index, None, None)
        check_batch(batch, x.size(0))
        routing: Routing = self.shared_router(self.router_view(x, graph), batch, graph.in_flow(self.flow).edge_index)
        return routing

    def router_view(self, x: Tensor, edge_index: Adj | Graph) -> Tensor:
        """(N, dim) what a shared router sees: the raw features, their means over in-edges, the in-degrees."""
        graph = self._graph(x, edge_index, None, None)
        graph = graph if graph.is_sparse else graph.in_flow(self.flow)
        # of the raw features, since the first layer may sum the same
        return self._view(x, graph, lambda h: graph.mean(h, keep=True if h is x else None))

    def _view(self, x: Tensor, graph: Graph, mean: Callable[[Tensor], Tensor]) -> Tensor:
        """(N, dim) the same, of features averaged over in-edges once, twice, ..."""
        means = powers(mean, x, self.router_hops) if "neighbors" in self.router_input else None
        return router_view(self.router_input, x, means, graph)

    def _graph(self, x: Tensor, edge_index: Any, edge_weight: Tensor | None, edge_attr: Tensor | None) -> Graph:
        if not isinstance(x, Tensor) or x.dim() != 2 or x.size(1) != self.in_channels:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x: got shape {got}, expected (number of nodes, {self.in_channels})")
        if not isinstance(edge_index, Graph):
            graph = Graph(edge_index, x.size(0), edge_weight=edge_weight, edge_attr=edge_attr)
            graph.constant = False  # no later call sees it
            return graph
        if (edge_index.num_src, edge_index.num_dst) != (x.size(0), x.size(0)):
            raise ValueError(f"edge_index: got {edge_index}, expected {x.size(0)} nodes, as x has")
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
        trimmed = num_sampled_nodes_per_hop is not None
        if trimmed and edge_weight is not None and edge_attr is not None:
            raise ValueError("edge_attr: got edge_weight too, expected at most one of them where layers are trimmed")
        if trimmed and isinstance(edge_index, Graph):
            raise ValueError("edge_index: got a Graph, expected (2, number of edges) where layers are trimmed")
        self._check_edge_args(edge_weight, edge_attr)
        graph = self._graph(x, edge_index, edge_weight, edge_attr)
        if graph.constant is False:  # a tensor of this call: sums of it that the graph keeps end with the first layer
            x = x.view_as(x)
        decision = None if self.shared_router is None else self.decide(x, graph, batch)
        routings = [] if decision is None else [decision]
        given: Tensor | None = x
        x = self.input_dropout(x)
        if self.lin_in is not None:
            x = self.lin_in(x)
        xs: list[Tensor] = []
        value = edge_weight if edge_weight is not None else edge_attr
        for layer in range(self.num_layers):
            if trimmed:
                x, edge_index, value = self._trim(
                    layer, num_sampled_nodes_per_hop, num_sampled_edges_per_hop, x, edge_index, value
                )
                own = {} if value is None else {"edge_weight" if edge_weight is not None else "edge_attr": value}
                graph = Graph(edge_index, x.size(0), **own)
                graph.constant = False
                batch = None if batch is None else batch[: x.size(0)]
            followed = None if decision is None else decision.select(slice(x.size(0)))
            conv = self.convs[layer]
            if isinstance(conv, MoEConv):
                seen = graph.seeing(x is given)
                out, routing = conv(x, seen, batch=batch, routing=followed, return_routing=True)
                if decision is None:
                    routings.append(routing)
            else:
                adj = graph if isinstance(conv, FilterConv) else graph.adj
                out = conv(x, adj, **graph.args_for(conv))
            if layer < len(self.residuals):
                out = out + self.residuals[layer](x)
            x = self._after(layer, out, batch, batch_size)
            given = None
            if hasattr(self, "jk"):  # else nothing holds the layers in between
                xs.append(x)
        if hasattr(self, "jk"):
            x = self.jk([h[: x.size(0)] for h in xs])  # trimming leaves the later layers fewer nodes
        x = self.lin(x) if hasattr(self, "lin") else x
        return (x, routings) if return_routing else x

    def _check_edge_args(self, edge_weight: Tensor | None, edge_attr: Tensor | None) -> None:
        """Of several kinds of experts, some take less than the others, but some conv of the model takes each."""
        for name, value in (("edge_weight", edge_weight), ("edge_attr", edge_attr)):
            if value is not None and not any(
                name in (conv.edge_names if isinstance(conv, MoEConv) else parameters_of(conv)) for conv in self.convs
            ):
                raise ValueError(f"{name}: got a tensor, but no conv of the model takes it")

    def _after(self, layer: int, x: Tensor, batch: Tensor | None, batch_size: int | None) -> Tensor:
        """Normalization, activation and dropout, on all but an output conv."""
        if layer == self.num_layers - 1 and self.jk_mode is None:
            return x
        if self.act is not None and self.act_first:
            x = self.act(x)
        norm = self.norms[layer]
        x = norm(x, batch, batch_size) if self.supports_norm_batch else norm(x)
        if self.act is not None and not self.act_first:
            x = self.act(x)
        return self.dropout(x)

    @torch.no_grad()
    def inference(
        self,
        loader: NodeLoader | Data | StoredGraph,
        device: torch.device | str | None = None,
        embedding_device: torch.device | str = "cpu",
        progress_bar: bool = False,
        cache: bool = False,
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
            cache: keep the chunks between layers (default ``False``).
            batch_size: nodes per chunk (default: the loader's, or 1,024).
            return_routing: return the routings too, as :meth:`forward` does.
            folder: of a stored graph, where to write: hidden features, which are removed in the end, and
                ``logits.npy``, as which the result is mapped.

        Raises:
            ValueError: of a stored graph, no ``folder``; ``cache``, ``return_routing`` or another ``embedding_device``,
                which would take memory for all nodes; a model in training; a router, norm, ``jk``, ``flow`` or number
                of hops that needs all nodes at once, by name.
            RuntimeError: a conv that looks further than one hop, such as ``ChebConv``.
        """
        data: Any = loader if isinstance(loader, Data | StoredGraph) else loader.data
        data = data[0] if isinstance(data, tuple) else data
        if batch_size is None:
            batch_size = 1024 if isinstance(loader, Data | StoredGraph) else int(loader.batch_size or 1)
        check_count("batch_size", batch_size)
        own = next(self.parameters()).device if device is None else torch.device(device)
        if isinstance(data, StoredGraph):
            if folder is None:
                raise ValueError("folder: got None, expected where to write the embeddings of a stored graph")
            in_memory = {"embedding_device": str(embedding_device) != "cpu", "cache": cache}
            for name, value in (in_memory | {"return_routing": return_routing}).items():
                check(not value, name, "what takes memory for all nodes", "the default, where the graph is stored")
            return inference_on_disk(self, data, Path(folder), batch_size, own, progress_bar)
        check(folder is None, "folder", f"{str(folder)!r} for a graph in memory", None)
        if not isinstance(data, Data) or data.x is None or data.edge_index is None:
            raise ValueError(f"loader: got one over {type(data).__name__}, expected a Data with x and edge_index")
        home = torch.device(embedding_device)
        graph = self._graph(data.x, data.edge_index, data.get("edge_weight"), data.get("edge_attr"))
        chunks = NodeChunks(graph, batch_size, own, cache)
        x, batch = data.x.to(home), data.get("batch")
        check_batch(batch, x.size(0))
        batch = None if batch is None else batch.to(own)

        def rows(module: nn.Module | None, x: Tensor) -> Tensor:
            if module is None or isinstance(module, nn.Identity):
                return x
            return torch.cat([module(part.to(own)).to(home) for part in x.split(batch_size)])

        routings: list[Routing] = []
        decision = None
        if self.shared_router is not None:
            near = chunks if graph.is_sparse else chunks.in_flow(self.flow)
            view = self._view(x, near.graph, near.mean).to(own)
            decision = self.shared_router(view, batch, near.graph.edge_index.to(own))
            routings.append(decision)
        x, xs = rows(self.lin_in, x), []
        for layer in tqdm(range(self.num_layers), desc="Layers", disable=not progress_bar):
            conv = self.convs[layer]
            if isinstance(conv, MoEConv):
                out, routing = conv.forward_chunked(x, chunks, batch, decision)
                if decision is None:
                    routings.append(routing)
            else:
                check_one_hop(conv, x.size(1), self.local)
                out = dense_chunked(conv, x, chunks)
            if layer < len(self.residuals):
                out = out + rows(self.residuals[layer], x)
            # all nodes at once, since some norms look at all of them
            x = self._after(layer, out.to(own), batch, None).to(home)
            if hasattr(self, "jk"):
                xs.append(x)
        if hasattr(self, "jk"):
            x = self.jk([h.to(own) for h in xs]).to(home)
        x = rows(getattr(self, "lin", None), x)
        return (x, routings) if return_routing else x

    def inference_per_layer(self, *args: Any, **kwargs: Any) -> Tensor:
        """Refused: the experts of a chunk's nodes are decided among all nodes.

        Raises:
            RuntimeError: always; call :meth:`inference`.
        """
        raise RuntimeError("inference_per_layer: a chunk cannot be routed by itself; call inference")

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


class DenseLayers:
    """The convs of a dense GNN, layer by layer, as factories of copies.

    Args:
        model: the dense GNN.
        upcycle: copy the parameters too.

    Raises:
        ValueError: a model that computes something else than its layers one after the other.
    """

    def __init__(self, model: BasicGNN, upcycle: bool) -> None:
        if type(model).forward is not BasicGNN.forward or model._forward_hooks or model._forward_pre_hooks:
            legal = "one whose forward is BasicGNN's, such as PyG's GCN, without hooks, since both would be lost"
            raise ValueError(f"model: got {type(model).__name__}, which computes something else, expected {legal}")
        self.model = model
        self.upcycle = upcycle

    def of(self, layer: int) -> CopyOf:
        """A factory of copies of one layer."""
        return CopyOf(self.model.convs[layer], self.upcycle)

    def __call__(self, in_channels: Any, out_channels: int) -> Any:
        """The first layer, for what asks for any."""
        return self.of(0)(in_channels, out_channels)
