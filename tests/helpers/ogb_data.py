"""Tiny planted OGB sets, and their files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from experiments.convert.planted import write_planted
from experiments.train.data.ogb import MEGABYTES

NAMES = tuple(MEGABYTES)
NODES, EDGES, CLASSES = 200, 600, 7


def plant(root: Path) -> Path:
    """All sets, tiny."""
    for name in NAMES:
        write_planted(name, root, NODES, EDGES, CLASSES)
    return root


def numbers(path: Path) -> NDArray[np.float64]:
    """A compressed table."""
    return np.loadtxt(path, delimiter=",", ndmin=2)


def write(path: Path, table: NDArray[np.float64]) -> None:
    """A compressed table."""
    np.savetxt(path, table, fmt="%.6g", delimiter=",")
