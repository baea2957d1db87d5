"""Tiny planted OGB sets, and their files."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from experiments.convert import STORED, papers
from experiments.data.ogb import OGBName
from experiments.planted_ogb import write_planted
from experiments.planted_papers import PapersPlanter
from experiments.stored import convert

NAMES: tuple[OGBName, ...] = get_args(OGBName)
NODES, EDGES, FEATURES, CLASSES = 200, 600, 4, 7


def plant(root: Path) -> Path:
    """All sets, tiny."""
    for name in NAMES:
        write_planted(name, root, NODES, EDGES, FEATURES, 112 if name == "ogbn-proteins" else CLASSES)
    plant_papers(root, nodes=NODES, edges=EDGES, features=FEATURES, classes=CLASSES)
    return root


def plant_papers(root: Path, **size: int) -> Path:
    """ogbn-papers100M, half of its nodes labeled; returns the folder that it is converted to."""
    PapersPlanter(**size, labeled=0.5, seed=0, homophily=0.65, label_noise=0.15).write(root)
    convert(papers(root), root / STORED, half=True, shown=False)
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
