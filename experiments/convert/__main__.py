"""Bring data into a form to train from: a graph on disk, or molecules from tables of SMILES.

The commands of :mod:`experiments.convert.graph` and :mod:`experiments.convert.smiles`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experiments.convert import graph, smiles


def main(args: Sequence[str] | None = None) -> None:
    """Entry point; ``molecules`` first asks for SMILES."""
    given = list(sys.argv[1:] if args is None else args)
    if given[:1] == ["molecules"]:
        smiles.main(given[1:])
    else:
        graph.main(given)


if __name__ == "__main__":
    main()
