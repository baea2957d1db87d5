"""Configurations as ``experiments.convert forces`` writes them, without RDKit and xTB."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from experiments.train.data.forces import PARTS

KINDS = (1, 6, 8)
"""The elements."""


def write_configurations(
    path: Path, molecules: int = 20, each: int = 2, sources: int = 1, **changes: Any
) -> Path:
    """Write random molecules whose atoms are drawn to their middle by springs.

    The parts take turns, and every third molecule is trained on, too. Sources take turns with
    configurations, and all label the same ones; each has another energy of an atom. ``changes``
    are other arrays, or ``None`` for one that is left out.
    """
    random = np.random.default_rng(0)
    rows: dict[str, list[Any]] = {
        name: [] for name in ("part", "molecule", "atoms", "source", "energy", "z", "pos", "force")
    }
    for molecule in range(molecules):
        z = random.choice(KINDS, size=random.integers(3, 7))
        part = 0 if molecule % 3 == 2 else molecule % len(PARTS)
        for number in range(each):
            source = number % sources
            if source == 0:
                pos = random.normal(size=(len(z), 3)) * 2
                pos -= pos.mean(axis=0)
            rows["part"].append(part)
            rows["molecule"].append(molecule)
            rows["atoms"].append(len(z))
            rows["source"].append(source)
            rows["energy"].append(float((pos**2).sum() / 2 - (30 + source) * z.sum()))
            rows["z"].extend(z)
            rows["pos"].extend(pos)
            rows["force"].extend(-pos)
    arrays = {name: np.array(values) for name, values in rows.items()} | changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path
