"""Tiny planted OGB sets, and their files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from experiments.convert.graph import convert
from experiments.convert.planted import write_planted
from experiments.train.config import PAPERS
from experiments.train.data.ogb import MEGABYTES
from experiments.train.data.on_disk import STORED

NAMES = tuple(MEGABYTES)
NODES, EDGES, CLASSES = 200, 600, 7


def plant(root: Path) -> Path:
    """All sets, tiny."""
    for name in NAMES:
        write_planted(name, root, NODES, EDGES, CLASSES)
    plant_papers(root, nodes=3_000, edges=EDGES, classes=CLASSES)
    return root


def plant_papers(root: Path, **size: int) -> Path:
    """ogbn-papers100M, of whose nodes 1.4 % are labeled.

    Returns the folder that it is converted to.
    """
    write_planted(PAPERS, root, **size)
    convert(PAPERS, root / STORED, root, half=True)
    return root / STORED


def numbers(path: Path) -> NDArray[np.float64]:
    """A compressed table."""
    return np.loadtxt(path, delimiter=",", ndmin=2)


def write(path: Path, table: NDArray[np.float64]) -> None:
    """A compressed table."""
    np.savetxt(path, table, fmt="%.6g", delimiter=",")
