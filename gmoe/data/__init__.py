"""Mini-batches of a graph, in memory or on disk. Each module needs torch_geometric: import it by
itself.
"""
