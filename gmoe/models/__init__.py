"""Whole models. ``gnn`` and ``hetero_gnn`` need torch_geometric, ``vit`` torchvision: import each
by itself.
"""
