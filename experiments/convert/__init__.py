"""Bring data into a form to train from: ``python -m experiments.convert``.

smiles   Tables of SMILES as OGB's molecule sets; RDKit reads them.
forces   Tables of SMILES as configurations with energies and forces, by xTB.
"""
