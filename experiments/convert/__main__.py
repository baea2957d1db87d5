"""Bring data into a form to train from: a graph on disk, or molecules from tables of SMILES.

The commands of :mod:`experiments.convert.graph`, :mod:`experiments.convert.smiles` and
:mod:`experiments.convert.forces`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experiments.convert import forces, graph, smiles


def main(args: Sequence[str] | None = None) -> None:
    """Entry point; ``molecules`` and ``forces`` first ask for SMILES."""
    given = list(sys.argv[1:] if args is None else args)
    of_smiles = {"molecules": smiles.main, "forces": forces.main}
    if given[:1] and given[0] in of_smiles:
        of_smiles[given[0]](given[1:])
    else:
        graph.main(given)


if __name__ == "__main__":
    main()
