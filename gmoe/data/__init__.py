"""Mini-batches of a graph, in memory or on disk.

All modules need torch_geometric, so nothing is imported here: import each by its name.
"""
