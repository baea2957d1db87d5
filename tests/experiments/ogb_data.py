"""Tiny planted OGB sets, and their files."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.config import PAPERS, STORED
from experiments.convert import convert
from experiments.data.ogb import OGB
from experiments.planted import write_planted

NAMES = tuple(OGB)
NODES, EDGES, CLASSES = 200, 600, 7


def plant(root: Path) -> Path:
    """All sets, tiny."""
    for name in NAMES:
        write_planted(name, root, NODES, EDGES, CLASSES)
    plant_papers(root, nodes=3_000, edges=EDGES, classes=CLASSES)
    return root


def plant_papers(root: Path, **size: int) -> Path:
    """ogbn-papers100M, of whose nodes 1.4 % are labeled; returns the folder that it is converted to."""
    write_planted(PAPERS, root, **size)
    convert(PAPERS, root / STORED, root, half=True)
    return root / STORED


def numbers(path: Path) -> NDArray[np.float64]:
    """A compressed table."""
    with gzip.open(path, "rt") as file:
        return np.loadtxt(file, delimiter=",", ndmin=2)


def write(path: Path, content: str | NDArray[Any]) -> None:
    """Text or a table, compressed."""
    with gzip.open(path, "wt") as file:
        if isinstance(content, str):
            file.write(content)
        else:
            np.savetxt(file, content, fmt="%.6g", delimiter=",")


def truncate(path: Path) -> None:
    """Leave the first half."""
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
