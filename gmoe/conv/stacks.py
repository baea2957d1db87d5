"""Which convs have experts that are stacked, and how."""

from __future__ import annotations

from torch_geometric.nn import (
    GATConv,
    GATv2Conv,
    GCNConv,
    GINConv,
    GraphConv,
    MessagePassing,
    SAGEConv,
    TransformerConv,
)

from gmoe.conv.aggregate import GCNExperts, GINExperts, GraphConvExperts, SAGEExperts
from gmoe.conv.experts import StackedExperts
from gmoe.conv.filter_conv import FilterConv
from gmoe.conv.filters import FilterExperts
from gmoe.conv.gat_experts import GATExperts
from gmoe.conv.gatv2_experts import GATv2Experts
from gmoe.conv.mlp_conv import MLPConv, MLPConvExperts
from gmoe.conv.transformer_experts import TransformerExperts

STACKS: dict[type[MessagePassing], type[StackedExperts]] = {
    FilterConv: FilterExperts,
    GATConv: GATExperts,
    GATv2Conv: GATv2Experts,
    GCNConv: GCNExperts,
    GINConv: GINExperts,
    GraphConv: GraphConvExperts,
    MLPConv: MLPConvExperts,
    SAGEConv: SAGEExperts,
    TransformerConv: TransformerExperts,
}


def stack_of(conv: MessagePassing) -> type[StackedExperts] | None:
    """How to stack experts like this conv; ``None`` where its class, or an option of it, has no such way."""
    stack = STACKS.get(type(conv))
    return stack if stack is not None and conv.flow == "source_to_target" and stack.accepts(conv) else None
