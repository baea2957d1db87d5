"""Whole models.

``gnn`` and ``hetero_gnn`` need torch_geometric, ``vit`` needs torchvision, so nothing is imported
here: import each by its name.
"""
