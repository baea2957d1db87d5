"""Experts inside message passing. Imports the core and torch_geometric."""

from gmoe.conv.graph import Graph
from gmoe.conv.moe_conv import MoEConv

__all__ = ["Graph", "MoEConv"]
