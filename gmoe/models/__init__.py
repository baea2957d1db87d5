"""Whole models.

``gnn`` needs torch_geometric, ``vit`` needs torchvision, so nothing is imported
here: import each by its name.
"""
