"""The data sets, and what training needs of one.

task       What training needs: batches, splits, metric, loss.
graphs     From a graph to batches: made (drawn here), named (PyG's), ogb, own_graph.
images     Images as tasks.
forces     Molecules with energies and forces, as experiments.convert writes them.
"""
