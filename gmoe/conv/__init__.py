"""Experts inside message passing. Imports the core and torch_geometric."""

from gmoe.conv.filter_conv import FilterConv
from gmoe.conv.hetero import HeteroMoEConv, RelationalConv
from gmoe.conv.mlp_conv import MLPConv
from gmoe.conv.moe_conv import MoEConv

__all__ = ["FilterConv", "HeteroMoEConv", "MLPConv", "MoEConv", "RelationalConv"]
