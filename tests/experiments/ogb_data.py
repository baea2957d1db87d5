"""Tiny planted OGB sets, and their files."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from experiments.config import PAPERS, STORED
from experiments.convert import SCRATCH, building, convert, papers
from experiments.data.ogb import OGBName
from experiments.planted import write_planted

NAMES: tuple[OGBName, ...] = get_args(OGBName)
NODES, EDGES, FEATURES, CLASSES = 200, 600, 4, 7


def plant(root: Path) -> Path:
    """All sets, tiny."""
    for name in NAMES:
        write_planted(name, root, NODES, EDGES, FEATURES, CLASSES)
    plant_papers(root, nodes=NODES, edges=EDGES, features=FEATURES, classes=CLASSES)
    return root


def plant_papers(root: Path, **size: int) -> Path:
    """ogbn-papers100M, half of its nodes labeled; returns the folder that it is converted to."""
    write_planted(PAPERS, root, labeled=0.5, **size)
    with building(root / STORED) as folder:
        convert(papers(root, folder / SCRATCH), folder, half=True)
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
