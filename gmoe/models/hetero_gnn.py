"""HeteroGNNMoE: a GNN with HeteroMoEConv layers. Shapes: N nodes of a type, D width, E experts, K
experts per node.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch_geometric.nn import BatchNorm
from torch_geometric.nn.module_dict import ModuleDict
from torch_geometric.typing import Metadata, NodeType

from gmoe._autograd import refuse_transforms
from gmoe._checks import check, check_counts
from gmoe.conv import hetero
from gmoe.conv.graph import parameters_of
from gmoe.conv.hetero import HeteroMoEConv, NodeTensors, RelationalConv, RelationEdges
from gmoe.moe import choose_blocks
from gmoe.models.gnn import Residual, activation_of, norm_of, reset_parameters, residual_of
from gmoe.routers import Router, RouterLike
from gmoe.routing import Routing


class HeteroGNNMoE(nn.Module):
    r"""A GNN of :class:`HeteroMoEConv` layers on PyG's ``HeteroData``, as :class:`GNNMoE` is on
    ``Data``.

    .. math::
        h^{(l+1)}_t = \mathrm{dropout}(\phi(\mathrm{norm}_t(\mathrm{HeteroMoEConv}_l(h^{(l)})_t
            + \mathrm{res}_t(h^{(l)}_t)))) \quad \text{for each node type } t

    The last layer is a dense :class:`RelationalConv`, so that a node that no expert takes still
    gets its logits. With a ``target``, each layer computes only the node types that the target's
    logits follow from.

    Args:
        in_channels: width of the features, of all node types, or of each that has some: every other
            type gets an embedding of width ``hidden_channels``, learned for each of its nodes.
            Where widths differ, a linear layer to ``hidden_channels`` comes first.
        hidden_channels: width of the hidden layers.
        out_channels: width of the output, such as the number of classes.
        metadata: node types and edge types, ``data.metadata()``.
        num_layers: number of relational layers (default 2).
        router: a name or factory (default ``"token_choice"``). ``None`` builds the dense baseline:
            the same model with :class:`RelationalConv` in all layers.
        target: the node type whose logits are wanted; ``None`` (default) is all of them.
        num_nodes_dict: number of nodes of every type, ``data.num_nodes_dict``; needed where a type
            has an embedding.
        every: layer ``i`` is a MoE where ``i % every == every - 1`` (default 1), the output layer
            excepted.
        dropout: default 0.
        act, norm: see :class:`GNNMoE` (defaults: relu, no norm). Each node type has its own norms.
        residual: ``"identity"`` (default; a linear layer where widths differ), ``"linear"`` always,
            or ``"none"``. The output layer has none.
        **moe_kwargs: further arguments of :class:`HeteroMoEConv`, such as ``num_experts`` and
            ``k``.

    Shapes:
        - ``x_dict``: (N, D) of each type that has features.
        - ``edge_index_dict``, ``batch_dict``: see :class:`HeteroMoEConv`.
        - ``n_id_dict``: (N,) of a mini-batch, each node's number in the whole graph,
          ``batch.n_id_dict``; needed for types with embeddings. Without it, these are taken to be
          whole.
        - returns (N, out_channels) of the target, or a dict of all types; with
          ``return_routing=True`` also the list of all layers' and node types' :class:`Routing`, in
          the order of ``routed``.

    Attributes:
        routed: (layer, node type) of each routing.

    Raises:
        ValueError: no layer would be a MoE; a router instance; a type without features and without
            ``num_nodes_dict``; features of a mini-batch without ``n_id_dict``; whatever
            :class:`HeteroMoEConv` refuses.

    Example:
        >>> model = HeteroGNNMoE(
        ...     {"paper": 128}, 64, 349, data.metadata(), target="paper", num_nodes_dict=data.num_nodes_dict
        ... )
        >>> logits, routings = model(data.x_dict, data.edge_index_dict, return_routing=True)
        >>> loss = F.cross_entropy(logits, data["paper"].y) + gmoe.aux_loss(routings)
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
        every: int = 1,
        dropout: float = 0.0,
        act: Any = "relu",
        norm: Any = None,
        residual: Residual = "identity",
        **moe_kwargs: Any,
    ) -> None:
        check_counts(hidden_channels=hidden_channels, num_layers=num_layers)
        check(
            not isinstance(router, Router),
            "router",
            "an instance for several layers",
            "a name or a factory",
        )
        moe_layers = [] if router is None else choose_blocks(num_layers - 1, every)
        super().__init__()
        inputs, *types_of = _types_by_depth(metadata, target, num_layers)
        self.target, self.routed = (
            target,
            [(layer, name) for layer in moe_layers for name in types_of[layer]],
        )
        given = (
            in_channels if isinstance(in_channels, Mapping) else dict.fromkeys(inputs, in_channels)
        )
        self.widths = {name: given.get(name, hidden_channels) for name in inputs}
        embedded = [name for name in inputs if name not in given]
        self.num_nodes_dict = dict(num_nodes_dict or {}) if embedded else {}
        check(
            self.num_nodes_dict.keys() >= set(embedded),
            "num_nodes_dict",
            num_nodes_dict,
            f"those of {embedded} too",
        )
        check_counts(**{f"in_channels[{name!r}]": size for name, size in self.widths.items()})
        self.embeddings = ModuleDict(
            {t: NodeEmbedding(self.num_nodes_dict[t], hidden_channels) for t in embedded}
        )
        projects = len(set(self.widths.values())) > 1
        width = hidden_channels if projects else self.widths[inputs[0]]
        self.lin_in = ModuleDict(
            {t: nn.Linear(d, width) for t, d in self.widths.items() if projects and t in given}
        )
        moe: Any = partial(HeteroMoEConv, router=router, **moe_kwargs)  # type: ignore[arg-type]
        norm_layer = norm_of(norm, hidden_channels)
        self.norm_takes_batch = "batch" in parameters_of(norm_layer)
        if isinstance(norm_layer, BatchNorm) and norm_layer.module.track_running_stats:
            norm_layer.allow_single_element = True  # a mini-batch may hold one node of a type
        self.convs, self.residuals, self.norms = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for layer, types in enumerate(types_of[:-1]):
            conv = moe if layer in moe_layers else RelationalConv
            self.convs.append(conv(width, hidden_channels, metadata, out_types=types))
            added = [] if residual == "none" else types
            self.residuals.append(
                ModuleDict({t: residual_of(residual, width, hidden_channels) for t in added})
            )
            self.norms.append(ModuleDict({t: copy.deepcopy(norm_layer) for t in types}))
            width = hidden_channels
        self.convs.append(RelationalConv(width, out_channels, metadata, out_types=types_of[-1]))
        self.act, self.dropout = activation_of(act), nn.Dropout(dropout)

    reset_parameters = reset_parameters

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
        h_dict = self._inputs(x_dict, n_id_dict)
        graphs = {  # sorted once for all layers
            r: hetero.graph_of(r, adj, h_dict) if {r[0], r[-1]} <= h_dict.keys() else adj
            for r, adj in edge_index_dict.items()
        }
        routings: list[Routing] = []
        layers: Any = zip(
            self.convs, self.residuals, self.norms, strict=False
        )  # the output layer follows
        for conv, residuals, norms in layers:
            if isinstance(conv, HeteroMoEConv):
                out, decided = conv(h_dict, graphs, batch_dict=batch_dict, return_routing=True)
                routings.extend(decided.values())
            else:
                out = conv(h_dict, graphs)
            for name, norm in norms.items():
                h = out[name] + residuals[name](h_dict[name]) if name in residuals else out[name]
                h = norm(h, (batch_dict or {}).get(name)) if self.norm_takes_batch else norm(h)
                out[name] = self.dropout(self.act(h))
            h_dict = out
        logits = self.convs[-1](h_dict, graphs)
        logits = logits if self.target is None else logits[self.target]
        return (logits, routings) if return_routing else logits

    def _inputs(self, x_dict: NodeTensors, n_id_dict: NodeTensors | None) -> dict[NodeType, Tensor]:
        """(N, D) of each node type its features, projected where they are, or its embeddings."""
        h_dict: dict[NodeType, Tensor] = {}
        for name, width in self.widths.items():
            if name in self.embeddings:
                known = n_id_dict is None or name in n_id_dict
                check(known, "n_id_dict", f"no {name!r}", "numbers in the whole graph")
                check(
                    name not in x_dict,
                    f"x_dict[{name!r}]",
                    "features",
                    "none: in_channels has no width of them",
                )
                embedding = self.embeddings[name]
                h_dict[name] = embedding.weight if n_id_dict is None else embedding(n_id_dict[name])
                continue
            hetero.check_features(name, x_dict.get(name), width)
            x = x_dict[name]
            whole = n_id_dict is not None or len(x) == self.num_nodes_dict.get(name, len(x))
            check(
                whole,
                "n_id_dict",
                f"None for some of the {name!r} nodes",
                "numbers in the whole graph",
            )
            h_dict[name] = self.lin_in[name](x) if name in self.lin_in else x
        return h_dict


class NodeEmbedding(nn.Embedding):
    """A learned row for each node of a type, drawn as in OGB's example."""

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)


def _types_by_depth(
    metadata: Metadata, target: NodeType | None, num_layers: int
) -> list[list[NodeType]]:
    """The node types that are needed as input, and after each layer."""
    node_types, edge_types = hetero.checked_metadata(metadata)
    check(target in (None, *node_types), "target", repr(target), f"one of {node_types}")
    needed = [node_types if target is None else [target]]
    for _ in range(num_layers):
        found = {*needed[0], *(source for source, _, end in edge_types if end in needed[0])}
        needed.insert(0, [name for name in node_types if name in found])
    return needed
