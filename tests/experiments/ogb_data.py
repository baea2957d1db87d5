"""Tiny planted OGB sets, and their files."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from experiments.data.ogb import OGBName
from experiments.planted_ogb import write_planted

NAMES: tuple[OGBName, ...] = get_args(OGBName)
NODES, EDGES, FEATURES, CLASSES = 200, 600, 4, 7


def plant(root: Path) -> Path:
    """All four sets, tiny."""
    for name in NAMES:
        write_planted(name, root, NODES, EDGES, FEATURES, 112 if name == "ogbn-proteins" else CLASSES)
    return root


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
