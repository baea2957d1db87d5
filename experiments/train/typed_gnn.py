"""A GNN of nodes of several types: PyG's HeteroConv, of a SAGE a relation, that may hold experts.

Shapes: N nodes of a type, D width.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch_geometric.data import HeteroData
from torch_geometric.nn import HeteroConv, SAGEConv
from torch_geometric.nn.module_dict import ModuleDict
from torch_geometric.typing import EdgeType, NodeType

import gmoe
from gmoe._checks import check
from gmoe.moe import choose_blocks


class TypedGNN(nn.Module):
    r"""Logits of the nodes of one type.

    .. math::
        h_t' = \mathrm{dropout}(\mathrm{relu}(\sum_{r: s \to t} \mathrm{conv}_r(h_s, h_t)))

    The last layer is dense and has no activation. A layer runs only the relations that the logits
    depend on. A type in which none of them ends stays as it is; one without features has an
    embedding, learned for each of its nodes.

    Args:
        data: the whole graph, for its types, widths and numbers of nodes.
        target: the type whose logits are wanted.
        hidden_channels: width of the hidden layers and of the embeddings.
        out_channels: number of classes.
        num_layers: at least 2 with experts.
        router: of each relation of each layer with experts; ``None`` is the dense baseline.
        every: layer ``i`` holds experts if ``i % every == every - 1``.
        dropout: of the hidden layers.
        **moe_kwargs: of :class:`gmoe.MoEConv`.

    Shapes:
        - ``x_dict``: (N, D) of each type with features; ``edge_index_dict``: (2, M) of each
          relation; both of the whole graph.
        - returns (N, out_channels).
    """

    def __init__(
        self,
        data: HeteroData,
        target: NodeType,
        hidden_channels: int,
        out_channels: int,
        num_layers: int,
        *,
        router: Any,
        every: int,
        dropout: float,
        **moe_kwargs: Any,
    ) -> None:
        super().__init__()
        self.target = target
        self.hidden_channels = hidden_channels
        relations_of = relations_by_layer(data.edge_types, target, num_layers)
        moe_layers = [] if router is None else choose_blocks(num_layers - 1, every)
        moe = partial(gmoe.MoEConv, SAGEConv, router=router, **moe_kwargs)

        # 1. The inputs: features, or an embedding of each node.
        self.embeddings = ModuleDict()
        widths: dict[NodeType, int] = {}
        for name in data.node_types:
            widths[name] = data[name].x.size(1) if "x" in data[name] else hidden_channels
            if "x" not in data[name] and any(name in (s, t) for s, _, t in relations_of[0]):
                self.embeddings[name] = nn.Embedding(data[name].num_nodes, hidden_channels)
                nn.init.xavier_uniform_(self.embeddings[name].weight)

        # 2. The layers.
        self.convs = nn.ModuleList()
        for layer, relations in enumerate(relations_of):
            out = out_channels if layer == num_layers - 1 else hidden_channels
            conv: Any = moe if layer in moe_layers else SAGEConv
            convs = {
                relation: conv((widths[relation[0]], widths[relation[-1]]), out)
                for relation in relations
            }
            with warnings.catch_warnings():
                # Types in which no relation ends are not updated, and stay as they are.
                warnings.filterwarnings("ignore", "There exist node types")
                self.convs.append(HeteroConv(convs))
            widths |= {relation[-1]: out for relation in relations}
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x_dict: dict[NodeType, Tensor],
        edge_index_dict: dict[EdgeType, Tensor],
    ) -> Tensor:
        """The logits of the target; see the class."""
        h_dict = x_dict | {name: one.weight for name, one in self.embeddings.items()}
        *hidden, last = self.convs
        for conv in hidden:
            out_dict = conv(h_dict, edge_index_dict)
            h_dict |= {name: self.dropout(out.relu()) for name, out in out_dict.items()}
        logits: Tensor = last(h_dict, edge_index_dict)[self.target]
        return logits


def relations_by_layer(
    edge_types: Sequence[EdgeType], target: NodeType, num_layers: int
) -> list[list[EdgeType]]:
    """The relations that each layer runs: those that the target's logits depend on."""
    needed = {target}
    layers: list[list[EdgeType]] = []
    for _ in range(num_layers):
        layers.insert(0, [relation for relation in edge_types if relation[-1] in needed])
        needed |= {relation[0] for relation in layers[0]}
    check(layers[-1], "data", f"no edges into {target!r}, whose nodes have labels", "some")
    return layers
