"""Bring data into a form to train from: a graph on disk, or molecules from tables of SMILES.

The commands of :mod:`experiments.convert.graph`, :mod:`experiments.convert.smiles` and
:mod:`experiments.convert.forces`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module


def main(args: Sequence[str] | None = None) -> None:
    """Entry point; ``molecules`` and ``forces`` first ask for SMILES."""
    given = list(sys.argv[1:] if args is None else args)
    of_smiles = {"molecules": "smiles", "forces": "forces"}
    name = "graph"
    if given and given[0] in of_smiles:
        name = of_smiles[given.pop(0)]
    # The chosen one alone: forces import torch, which help on graphs does without.
    import_module(f"experiments.convert.{name}").main(given)


if __name__ == "__main__":
    main()
