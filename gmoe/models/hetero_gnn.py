"""HeteroGNNMoE: a GNN with HeteroMoEConv layers. Shapes: N nodes of a type, D width, E experts, K experts per node."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor, nn
from torch_geometric.nn import BatchNorm
from torch_geometric.nn.inits import reset
from torch_geometric.nn.module_dict import ModuleDict
from torch_geometric.nn.resolver import activation_resolver, normalization_resolver
from torch_geometric.typing import Metadata, NodeType

from gmoe._autograd import refuse_transforms
from gmoe._checks import check, check_choice, check_counts
from gmoe.conv import hetero
from gmoe.conv.hetero import Aggr, HeteroMoEConv, HeteroRouterInput, NodeTensors, RelationalConv, RelationEdges
from gmoe.dispatch import Backend
from gmoe.routers import Router, RouterLike
from gmoe.routing import Routing

HeteroResidual: TypeAlias = Literal["none", "identity", "linear"]


class HeteroGNNMoE(nn.Module):
    r"""A GNN of :class:`HeteroMoEConv` layers on PyG's ``HeteroData``: what :class:`GNNMoE` is on ``Data``.

    .. math::
        h^{(l+1)}_t = \mathrm{dropout}(\phi(\mathrm{norm}_t(\mathrm{HeteroMoEConv}_l(h^{(l)})_t
            + \mathrm{res}_t(h^{(l)}_t)))) \quad \text{for each node type } t

    The last layer is a dense :class:`RelationalConv`, so that a node that no expert takes still gets its logits. With
    a ``target``, each layer computes only the node types that the target's logits follow from.

    Args:
        in_channels: width of the features, of all node types, or of each that has some: every other type gets an
            embedding, learned for each of its nodes.
        hidden_channels: width of the hidden layers.
        out_channels: width of the output, such as the number of classes.
        metadata: node types and edge types, ``data.metadata()``.
        num_layers: number of relational layers (default 2).
        router: a name or factory (default ``"token_choice"``). ``None`` builds the dense baseline: the same model with
            :class:`RelationalConv` in all layers.
        target: the node type whose logits are wanted; ``None`` (default) is all of them.
        num_nodes_dict: number of nodes of every type, ``data.num_nodes_dict``; needed where a type has an embedding.
        embedding_channels: width of the embeddings (default ``hidden_channels``).
        num_experts: E (default 8).
        k: K, experts per node (default 1).
        every: layer ``i`` is a MoE where ``i % every == every - 1`` (default 1), the output layer excepted.
        in_proj: begin with a linear layer to ``hidden_channels`` for each node type, embeddings of that width
            excepted. ``None`` (default): just where the widths of the types differ.
        dropout: default 0.
        act, norm, norm_kwargs: as in PyG's ``BasicGNN`` (defaults: relu, no norm). Each node type has its own norms.
        residual: ``"identity"`` (default; a linear layer where widths differ), ``"linear"`` always, or ``"none"``. The
            output layer has none.
        aggr, router_input, tie_routers, tie_experts, shared_expert, dense_start, router_kwargs, backend, check_finite:
            see :class:`HeteroMoEConv`. With ``tie_experts`` dense layers share their root weight too.

    Shapes:
        - ``x_dict``: (N, D) of each type that has features.
        - ``edge_index_dict``, ``batch_dict``: see :class:`HeteroMoEConv`.
        - ``n_id_dict``: (N,) of a mini-batch, each node's number in the whole graph, ``batch.n_id_dict``; needed for
          types with embeddings. Without it, these are taken to be whole.
        - returns (N, out_channels) of the target, or a dict of all types; with ``return_routing=True`` also the list of
          all layers' and node types' :class:`Routing`, in the order of ``routed``.

    Attributes:
        routed: (layer, node type) of each routing.

    Raises:
        ValueError: no layer would be a MoE; a router instance; a type without features and without
            ``num_nodes_dict``; features of a mini-batch without ``n_id_dict``; whatever :class:`HeteroMoEConv` refuses.

    Example:
        >>> model = HeteroGNNMoE(
        ...     {"paper": 128}, 64, 349, data.metadata(), target="paper", num_nodes_dict=data.num_nodes_dict
        ... )
        >>> logits, routings = model(data.x_dict, data.edge_index_dict, return_routing=True)
        >>> loss = F.cross_entropy(logits, data["paper"].y) + gmoe.aux_loss(routings)

        OGB's R-GCN for ogbn-mag:

        >>> HeteroGNNMoE(..., router=None, embedding_channels=128, residual="none", dropout=0.5)
    """

    def __init__(
        self,
        in_channels: int | Mapping[NodeType, int],
        hidden_channels: int,
        out_channels: int,
        metadata: Metadata,
        num_layers: int = 2,
        router: RouterLike | None = "token_choice",
        *,
        target: NodeType | None = None,
        num_nodes_dict: Mapping[NodeType, int] | None = None,
        embedding_channels: int | None = None,
        num_experts: int = 8,
        k: int = 1,
        every: int = 1,
        in_proj: bool | None = None,
        dropout: float = 0.0,
        act: Any = "relu",
        norm: Any = None,
        norm_kwargs: Mapping[str, Any] | None = None,
        residual: HeteroResidual = "identity",
        aggr: Aggr = "mean",
        router_input: HeteroRouterInput = "node",
        tie_routers: bool = False,
        tie_experts: bool = False,
        shared_expert: bool = True,
        dense_start: bool = True,
        router_kwargs: Mapping[str, Any] | None = None,
        backend: Backend = "auto",
        check_finite: bool = False,
    ) -> None:
        check_counts(hidden_channels=hidden_channels, out_channels=out_channels, num_layers=num_layers, every=every)
        check_choice("residual", residual, get_args(HeteroResidual))
        metadata = hetero.checked_metadata(metadata)
        moe_layers = _moe_layers(router, num_layers, every)
        super().__init__()
        self.in_channels, self.hidden_channels, self.out_channels = in_channels, hidden_channels, out_channels
        self.num_layers, self.target = num_layers, target
        inputs, *types_of = _types_by_depth(metadata, target, num_layers)
        self.routed = [(layer, name) for layer in moe_layers for name in types_of[layer]]
        self.input = HeteroInput(
            in_channels, hidden_channels, inputs, metadata[0], num_nodes_dict, embedding_channels, in_proj
        )
        options: dict[str, Any] = {"num_experts": num_experts, "router": router, "k": k, "router_input": router_input}
        options |= {"tie_routers": tie_routers, "tie_experts": tie_experts, "router_kwargs": router_kwargs}
        options |= {"shared_expert": shared_expert, "dense_start": dense_start}
        moe: Any = partial(HeteroMoEConv, **options, backend=backend, check_finite=check_finite)
        dense: Any = partial(RelationalConv, share_root=tie_experts)
        norm_layer = _norm(norm, hidden_channels, norm_kwargs)
        self.norm_takes_batch = "batch" in inspect.signature(norm_layer.forward).parameters
        self.convs, self.residuals, self.norms = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        widths = self.input.out_channels
        for layer, types in enumerate(types_of[:-1]):
            conv = moe if layer in moe_layers else dense
            self.convs.append(conv(widths, hidden_channels, metadata, aggr=aggr, out_types=types))
            self.residuals.append(_residuals(residual, {name: widths[name] for name in types}, hidden_channels))
            self.norms.append(ModuleDict({name: copy.deepcopy(norm_layer) for name in types}))
            widths = dict.fromkeys(types, hidden_channels)
        self.convs.append(dense(widths, out_channels, metadata, aggr=aggr, out_types=types_of[-1]))
        self.act = nn.Identity() if act is None else activation_resolver(act)
        self.dropout = nn.Dropout(dropout)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        for part in self.children():
            reset(part)

    def forward(
        self,
        x_dict: NodeTensors,
        edge_index_dict: RelationEdges,
        n_id_dict: NodeTensors | None = None,
        *,
        batch_dict: NodeTensors | None = None,
        return_routing: bool = False,
    ) -> Any:
        """Logits of the target, (N, out_channels), or of all types, a dict; see the class."""
        refuse_transforms()
        h_dict: dict[NodeType, Tensor] = self.input(x_dict, n_id_dict)
        graphs = {  # sorted once for all layers
            r: hetero.graph_of(r, adj, (len(h_dict[r[0]]), len(h_dict[r[-1]])))
            if {r[0], r[-1]} <= h_dict.keys()
            else adj
            for r, adj in edge_index_dict.items()
        }
        routings: list[Routing] = []
        for layer, conv in enumerate(self.convs):
            before = h_dict
            if isinstance(conv, HeteroMoEConv):
                h_dict, decided = conv(before, graphs, batch_dict=batch_dict, return_routing=True)
                routings.extend(decided.values())
            else:
                h_dict = conv(before, graphs)
            if layer < self.num_layers - 1:
                h_dict = {name: self._after(layer, name, before, h, batch_dict or {}) for name, h in h_dict.items()}
        out = h_dict if self.target is None else h_dict[self.target]
        return (out, routings) if return_routing else out

    def _after(
        self, layer: int, node_type: NodeType, before: NodeTensors, h: Tensor, batch_dict: NodeTensors
    ) -> Tensor:
        """Residual, normalization, activation and dropout of a hidden layer."""
        residuals: Any = self.residuals[layer]
        norms: Any = self.norms[layer]
        if node_type in residuals:
            h = h + residuals[node_type](before[node_type])
        h = norms[node_type](h, batch_dict.get(node_type)) if self.norm_takes_batch else norms[node_type](h)
        out: Tensor = self.dropout(self.act(h))
        return out

    def __repr__(self) -> str:
        sizes = f"{self.in_channels}, {self.hidden_channels}, {self.out_channels}, num_layers={self.num_layers}"
        return f"{type(self).__name__}({sizes}, target={self.target!r})"


class HeteroInput(nn.Module):
    """The input of each node type: its features, or an embedding for each node, and a projection where asked for.

    Args:
        in_channels, hidden_channels, num_nodes_dict, embedding_channels, in_proj: see :class:`HeteroGNNMoE`.
        node_types: those that the model looks at.
        all_types: of the graph.

    Attributes:
        out_channels: width of what comes out, by node type.
    """

    def __init__(
        self,
        in_channels: int | Mapping[NodeType, int],
        hidden_channels: int,
        node_types: Sequence[NodeType],
        all_types: Sequence[NodeType],
        num_nodes_dict: Mapping[NodeType, int] | None,
        embedding_channels: int | None,
        in_proj: bool | None,
    ) -> None:
        super().__init__()
        given = in_channels if isinstance(in_channels, Mapping) else dict.fromkeys(all_types, in_channels)
        width = hidden_channels if embedding_channels is None else embedding_channels
        check_counts(embedding_channels=width, **{f"in_channels[{name!r}]": value for name, value in given.items()})
        widths = {name: given.get(name, width) for name in node_types}
        self.in_channels = {name: given[name] for name in node_types if name in given}
        self.num_nodes_dict = dict(num_nodes_dict or {})
        self.embedded = [name for name in node_types if name not in given]
        missing = [name for name in all_types if name not in self.num_nodes_dict]
        because = f"since {self.embedded} have no in_channels and so get embeddings"
        known = not (self.embedded and missing)
        check(known, "num_nodes_dict", num_nodes_dict, f"the number of nodes of {missing} too, {because}")
        self.embeddings = ModuleDict({name: nn.Embedding(self.num_nodes_dict[name], width) for name in self.embedded})
        self.lin = ModuleDict()
        if len(set(widths.values())) > 1 if in_proj is None else in_proj:
            for name in node_types:
                if name in given or width != hidden_channels:
                    self.lin[name] = nn.Linear(widths[name], hidden_channels)
            widths = dict.fromkeys(node_types, hidden_channels)
        self.out_channels = widths
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew; embeddings as in OGB's example."""
        for embedding in self.embeddings.children():
            nn.init.xavier_uniform_(embedding.weight)
        reset(self.lin)

    def forward(self, x_dict: NodeTensors, n_id_dict: NodeTensors | None) -> dict[NodeType, Tensor]:
        """(N, out_channels) of each node type."""
        h_dict: dict[NodeType, Tensor] = {}
        for name, width in self.in_channels.items():
            hetero.check_features(name, x_dict.get(name), width)
            h_dict[name], size = x_dict[name], len(x_dict[name])
            if self.embedded and n_id_dict is None and size != self.num_nodes_dict[name]:
                raise ValueError(
                    f"n_id_dict: got None with {size} of the {self.num_nodes_dict[name]} {name!r} nodes, expected the "
                    "numbers of the mini-batch's nodes, which say whose embeddings to take"
                )
        for name in self.embedded:
            expected = "none, since in_channels has no width for it"
            check(name not in x_dict, f"x_dict[{name!r}]", "features", expected)
            expected = "the numbers of the nodes in the whole graph"
            check(n_id_dict is None or name in n_id_dict, f"n_id_dict[{name!r}]", None, expected)
            embedding: Any = self.embeddings[name]
            h_dict[name] = embedding.weight if n_id_dict is None else embedding(n_id_dict[name])
        return {name: self.lin[name](h) if name in self.lin else h for name, h in h_dict.items()}


def _moe_layers(router: RouterLike | None, num_layers: int, every: int) -> list[int]:
    """The layers that are a MoE: every n-th, the output layer excepted."""
    if router is None:
        return []
    instance = isinstance(router, Router)
    check(not instance, "router", "an instance for several node types", "a name or a factory")
    layers = list(range(every - 1, num_layers - 1, every))
    got = f"{every} with num_layers={num_layers}, which leaves no hidden layer for a MoE"
    check(layers, "every", got, "more layers or a smaller every")
    return layers


def _types_by_depth(metadata: Metadata, target: NodeType | None, num_layers: int) -> list[list[NodeType]]:
    """The node types that are needed as input, and after each layer."""
    node_types, edge_types = metadata
    if target is not None:
        check_choice("target", target, node_types)
    needed = [list(node_types) if target is None else [target]]
    for _ in range(num_layers):
        met = {*needed[0], *(source for source, _, end in edge_types if end in needed[0])}
        needed.insert(0, [name for name in node_types if name in met])
    return needed


def _residuals(residual: HeteroResidual, widths: Mapping[NodeType, int], hidden_channels: int) -> ModuleDict:
    def build(width: int) -> nn.Module:
        same = residual == "identity" and width == hidden_channels
        return nn.Identity() if same else nn.Linear(width, hidden_channels)

    return ModuleDict({} if residual == "none" else {name: build(width) for name, width in widths.items()})


def _norm(norm: Any, width: int, norm_kwargs: Mapping[str, Any] | None) -> nn.Module:
    if norm is None:
        return nn.Identity()
    built: nn.Module = normalization_resolver(norm, width, **(norm_kwargs or {}))
    if isinstance(built, BatchNorm) and built.module.track_running_stats:
        built.allow_single_element = True  # a mini-batch may hold one node of a type
    return built
