"""Experts inside message passing. Imports the core and torch_geometric."""

from gmoe.conv.graph import Graph
from gmoe.conv.hetero import HeteroMoEConv, RelationalConv
from gmoe.conv.moe_conv import MoEConv

__all__ = ["Graph", "HeteroMoEConv", "MoEConv", "RelationalConv"]
