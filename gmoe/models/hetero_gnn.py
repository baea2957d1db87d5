"""HeteroGNNMoE: a GNN with HeteroMoEConv layers.

Shapes: N nodes of a type, D width, E experts, K experts per node.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch_geometric.nn import BatchNorm
from torch_geometric.nn.module_dict import ModuleDict
from torch_geometric.typing import Adj, EdgeType, Metadata, NodeType

from gmoe._autograd import refuse_transforms
from gmoe._checks import (
    INTEGERS,
    check_counts,
    check_range,
    described,
    nearest,
    parameters_of,
    says_what_misfits,
    shown,
)
from gmoe._torch import dtype_of
from gmoe.conv import hetero
from gmoe.conv.graph import Graph
from gmoe.conv.hetero import HeteroMoEConv, NodeTensors, RelationalConv, RelationEdges
from gmoe.models.hetero_inference import inference
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
from gmoe.routers import Router, RouterLike
from gmoe.routing import Routing

Logits: TypeAlias = Tensor | dict[NodeType, Tensor]
"""Those of the target, or of each node type."""


class HeteroGNNMoE(nn.Module):
    r"""A GNN of :class:`HeteroMoEConv` layers: what :class:`GNNMoE` is, for ``HeteroData``.

    .. math::
        h^{(l+1)}_t = \mathrm{dropout}(\phi(\mathrm{norm}_t(\mathrm{HeteroMoEConv}_l(h^{(l)})_t
            + \mathrm{res}_t(h^{(l)}_t)))) \quad \text{for each node type } t

    The last layer is a dense :class:`RelationalConv`, so that a node without an expert still gets
    its logits. With a ``target``, each layer computes only the node types that the target's logits
    depend on.

    Args:
        in_channels: width of the features, of all node types, or of each type that has some: every
            other type gets an embedding of width ``hidden_channels``, learned for each of its
            nodes. If widths differ, a linear layer to ``hidden_channels`` comes first.
        hidden_channels: width of the hidden layers.
        out_channels: width of the output, such as the number of classes.
        metadata: node types and edge types, ``data.metadata()``.
        num_layers: number of relational layers (default 2).
        router: a name or factory (default ``"token_choice"``). ``None`` builds the dense baseline:
            the same model with :class:`RelationalConv` in all layers.
        target: the node type whose logits are wanted; ``None`` (default) is all of them.
        num_nodes_dict: number of nodes of every type, ``data.num_nodes_dict``; needed if a type
            has an embedding.
        every: layer ``i`` is a MoE if ``i % every == every - 1`` (default 1), except for the output
            layer.
        dropout: default 0.
        act, norm: see :class:`GNNMoE` (defaults: relu, no norm). Each node type has its own norms.
        residual: see :class:`GNNMoE`.
        **moe_kwargs: further arguments of :class:`HeteroMoEConv`, such as ``num_experts`` and
            ``k``.

    Shapes:
        - ``x_dict``: (N, D) of each type that has features.
        - ``edge_index_dict``, ``batch_dict``: see :class:`HeteroMoEConv`.
        - ``n_id_dict``: for a mini-batch, ``batch.n_id_dict``: (N,) each node's number in the whole
          graph; needed for types with embeddings. Without it, all nodes of these types take part.
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
        >>> sizes = data.num_nodes_dict
        >>> model = HeteroGNNMoE(
        ...     {"paper": 128}, 64, 349, data.metadata(), target="paper", num_nodes_dict=sizes
        ... )
        >>> logits, routings = model(data.x_dict, data.edge_index_dict, return_routing=True)
        >>> loss = F.cross_entropy(logits, data["paper"].y) + gmoe.aux_loss(routings)
    """

    @says_what_misfits
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
        act: Activation = "relu",
        norm: Norm = None,
        residual: Residual = "identity",
        **moe_kwargs: Any,
    ) -> None:
        _check_options(moe_kwargs)
        check_counts(hidden_channels=hidden_channels, num_layers=num_layers)
        if isinstance(router, Router):
            raise ValueError(
                "router: got an instance for several layers, expected a name or a factory"
            )
        super().__init__()

        # 1. Which layers are MoE, and which node types each layer computes.
        moe_layers = [] if router is None else choose_blocks(num_layers - 1, every)
        inputs, *types_of = _types_by_depth(metadata, target, num_layers)
        self.target = target
        self.routed = [(layer, name) for layer in moe_layers for name in types_of[layer]]

        # 2. The inputs: features, projected if their widths differ, or embeddings.
        if isinstance(in_channels, Mapping):
            feature_widths = dict(in_channels)
        else:
            feature_widths = dict.fromkeys(inputs, in_channels)
        embedded = [name for name in inputs if name not in feature_widths]
        self.widths = {name: feature_widths.get(name, hidden_channels) for name in inputs}
        self.num_nodes_dict = dict(num_nodes_dict or {}) if embedded else {}
        if not self.num_nodes_dict.keys() >= set(embedded):
            raise ValueError(
                f"num_nodes_dict: got {num_nodes_dict}, expected those of {embedded} too"
            )
        check_counts(**{f"in_channels[{name!r}]": size for name, size in self.widths.items()})
        self.embeddings = ModuleDict(
            {name: NodeEmbedding(self.num_nodes_dict[name], hidden_channels) for name in embedded}
        )
        is_projected = len(set(self.widths.values())) > 1
        width = hidden_channels if is_projected else self.widths[inputs[0]]
        projected = {
            name: size
            for name, size in self.widths.items()
            if is_projected and name in feature_widths
        }
        self.lin_in = ModuleDict({name: nn.Linear(size, width) for name, size in projected.items()})

        # 3. The hidden layers: each type has its own residual map and norm.
        moe: Any = partial(HeteroMoEConv, router=router, **moe_kwargs)  # type: ignore[arg-type]
        norm_layer = norm_of(norm, hidden_channels)
        self.norm_takes_batch = "batch" in parameters_of(norm_layer)
        if isinstance(norm_layer, BatchNorm) and norm_layer.module.track_running_stats:
            norm_layer.allow_single_element = True  # a mini-batch may hold one node of a type
        self.convs = nn.ModuleList()
        self.residuals = nn.ModuleList()
        self.norms = nn.ModuleList()
        for layer, types in enumerate(types_of[:-1]):
            conv = moe if layer in moe_layers else RelationalConv
            self.convs.append(conv(width, hidden_channels, metadata, out_types=types))
            added = {name: residual_of(residual, width, hidden_channels) for name in types}
            self.residuals.append(
                ModuleDict({name: part for name, part in added.items() if part is not None})
            )
            self.norms.append(ModuleDict({name: copy.deepcopy(norm_layer) for name in types}))
            width = hidden_channels

        # 4. The output layer, which is dense.
        self.convs.append(RelationalConv(width, out_channels, metadata, out_types=types_of[-1]))
        self.act = activation_of(act)
        self.dropout = nn.Dropout(dropout)

    reset_parameters = reset_parameters

    def forward(
        self,
        x_dict: NodeTensors,
        edge_index_dict: RelationEdges,
        n_id_dict: NodeTensors | None = None,
        *,
        batch_dict: NodeTensors | None = None,
        return_routing: bool = False,
    ) -> Logits | tuple[Logits, list[Routing]]:
        """Logits of the target, (N, out_channels), or of all types, a dict; see the class."""
        refuse_transforms()
        h_dict = self._inputs(x_dict, n_id_dict)
        output: Any = self.convs[-1]
        hetero.check_batches(batch_dict, output.node_types)

        # Sort the edges once for all layers. Relations of types that no layer needs are not read.
        graphs: dict[EdgeType, Adj | Graph] = {}
        for relation, adj in edge_index_dict.items():
            is_needed = {relation[0], relation[-1]} <= h_dict.keys()
            graphs[relation] = hetero.graph_of(relation, adj, h_dict) if is_needed else adj

        routings: list[Routing] = []
        batch_of = batch_dict or {}
        for layer, conv in enumerate(self.convs):
            if isinstance(conv, HeteroMoEConv):
                batches = {name: batch for name, batch in batch_of.items() if name in h_dict}
                out, by_type = conv(h_dict, graphs, batch_dict=batches, return_routing=True)
                routings.extend(by_type.values())
            else:
                out = conv(h_dict, graphs)
            for name, h in out.items():
                out[name] = self.add_residual(layer, name, h, h_dict[name])
                out[name] = self.activate(layer, name, out[name], batch_of.get(name))
            h_dict = out

        logits = h_dict if self.target is None else h_dict[self.target]
        return (logits, routings) if return_routing else logits

    # The next two are also the steps of inference, which runs a layer part by part.

    def add_residual(self, layer: int, name: NodeType, out: Tensor, x: Tensor) -> Tensor:
        """(T, O) a layer's output for nodes of a type, plus the residual of (T, D) its input."""
        if layer == len(self.residuals):
            return out
        residuals: Any = self.residuals[layer]
        return out + residuals[name](x) if name in residuals else out

    def activate(self, layer: int, name: NodeType, h: Tensor, batch: Tensor | None) -> Tensor:
        """Norm, activation and dropout of all nodes of a type; the output layer has none."""
        if layer == len(self.norms):
            return h
        norms: Any = self.norms[layer]
        norm = norms[name]
        # PyG's norms count the graphs by the last node of all, and fail where there is none.
        h = norm(h, batch) if self.norm_takes_batch and len(h) else norm(h)
        return self.dropout(self.act(h))

    inference = inference

    def _inputs(self, x_dict: NodeTensors, n_id_dict: NodeTensors | None) -> dict[NodeType, Tensor]:
        """(N, D) of each node type: its features, projected if widths differ, or its embeddings."""
        h_dict: dict[NodeType, Tensor] = {}
        for name, width in self.widths.items():
            if name in self.embeddings:
                if n_id_dict is not None and name not in n_id_dict:
                    raise ValueError(
                        f"n_id_dict: got no {name!r}, expected numbers in the whole graph"
                    )
                if name in x_dict:
                    raise ValueError(
                        f"x_dict[{name!r}]: got features, expected none: in_channels has no width "
                        "of them"
                    )
                embedding = self.embeddings[name]
                if n_id_dict is None:
                    h_dict[name] = embedding.weight
                    continue
                number = n_id_dict[name]
                if number.dtype not in INTEGERS:
                    raise ValueError(
                        f"n_id_dict[{name!r}]: got {described(number)}, expected (N,) integers"
                    )
                check_range(f"n_id_dict[{name!r}]", number, embedding.weight.size(0))
                h_dict[name] = embedding(number.long())
                continue
            hetero.check_features(name, x_dict.get(name), width, dtype_of(self))
            x = x_dict[name]
            # Without numbers the embeddings are those of all nodes: then features are, too.
            is_whole = x.size(0) == self.num_nodes_dict.get(name, x.size(0))
            if n_id_dict is None and not is_whole:
                raise ValueError(
                    f"n_id_dict: got None for some of the {name!r} nodes, expected numbers in the "
                    "whole graph"
                )
            h_dict[name] = self.lin_in[name](x) if name in self.lin_in else x
        return h_dict


class NodeEmbedding(nn.Embedding):
    """A learned row for each node of a type, drawn as in OGB's example."""

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)


def _check_options(moe_kwargs: Mapping[str, object]) -> None:
    """Refuse what is no option of a layer: without experts, no layer would ask for it."""
    parameters = inspect.signature(HeteroMoEConv).parameters.values()
    of_layers = {one.name for one in parameters if one.kind is one.KEYWORD_ONLY} - {"out_types"}
    for name, value in moe_kwargs.items():
        if name not in of_layers:
            own = inspect.signature(HeteroGNNMoE).parameters
            hint = nearest(name, sorted({*own, *of_layers}))
            raise ValueError(
                f"{name}: got {shown(value)}, expected an argument of HeteroGNNMoE or of "
                f"HeteroMoEConv{hint}"
            )


def _types_by_depth(
    metadata: Metadata, target: NodeType | None, num_layers: int
) -> list[list[NodeType]]:
    """The node types whose features are needed as input, and after each layer.

    Going back from the output, a layer needs what the next one needs, and the sources of the
    relations that end there.
    """
    node_types, edge_types = hetero.checked_metadata(metadata)
    if target not in (None, *node_types):
        raise ValueError(f"target: got {target!r}, expected one of {node_types}")
    needed = [node_types if target is None else [target]]
    for _ in range(num_layers):
        sources = {source for source, _, end in edge_types if end in needed[0]}
        before = {*needed[0], *sources}
        needed.insert(0, [name for name in node_types if name in before])
    return needed
