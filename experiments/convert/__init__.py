"""Bring data into a form to train from: ``python -m experiments.convert``.

graph    A graph larger than memory as a folder on disk; DuckDB sorts its edges.
smiles   Tables of SMILES as OGB's molecule sets; RDKit reads them.
forces   Tables of SMILES as configurations with energies and forces, by xTB.
planted  Graphs in OGB's layouts, for where OGB's own cannot be had: ``experiments.planted``.
"""
