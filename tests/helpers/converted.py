"""Edges that ``convert`` writes into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from experiments.convert.graph import convert

NODES = 150


def run(folder: Path, edges: Any, name: str = "e.npy", nodes: int = NODES, **options: Any) -> Path:
    """Convert edges, an array or a text; arrays among the options go through files."""
    for part, array in {"x": np.ones((nodes, 2)), **options}.items():
        if isinstance(array, np.ndarray):
            np.save(folder / f"{part}.npy", array)
            options[part] = folder / f"{part}.npy"
    if isinstance(edges, np.ndarray):
        np.save(folder / name, edges)
    elif edges is not None:
        (folder / name).write_text(edges, newline="")
    convert(str(folder / name), folder / "out", **options)
    return folder / "out"
