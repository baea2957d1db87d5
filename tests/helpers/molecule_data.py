"""Ten molecules as SMILES, and a molecule set that needs no RDKit."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.train.data.published import published

TEN = {
    "CCO": 1,
    "C": 0,  # an atom without bonds
    "c1ccccc1O": 1,
    "c1ccccc1N": 0,
    "c1ccncc1": 1,
    "C/C=C/C": 0,
    "N[C@@H](C)C(=O)O": 0,
    "[Na+].[Cl-]": 1,
    "c1ccc2ccccc2c1": 0,
    "Cc1ccc([B-2]2(c3ccc(C)cc3)=NCCO2)cc1": 1,  # five bonds at boron, which RDKit refuses
}
"""The label of each; the benzenes share a scaffold."""


def write_table(path: Path, labels: Sequence[str] = ("HIV_active",), **columns: Any) -> Path:
    """A table of :data:`TEN`, whose labels are all the same unless ``columns`` say otherwise."""
    given = {label: list(TEN.values()) for label in labels} | columns
    lines = [",".join(["smiles", *given])]
    for row, smiles in enumerate(TEN):
        lines.append(",".join([smiles, *(str(values[row]) for values in given.values())]))
    text = "\n".join(lines) + "\n"
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def write_set(root: Path, name: str = "ogbg-molhiv", graphs: int = 60, seed: int = 0) -> Path:
    """A set in OGB's layout: rings and chains of random atoms; returns its folder.

    The first label is whether a graph is a ring, or how many atoms it has; one in ten is missing,
    unless there is only one.
    """
    random, said = np.random.default_rng(seed), published(name)
    folder = root / name.replace("-", "_")
    nodes = random.integers(3, 9, graphs)
    is_ring = random.integers(0, 2, graphs)
    edges = [
        np.stack([np.arange(n - 1 + ring), (np.arange(n - 1 + ring) + 1) % n], axis=1)
        for n, ring in zip(nodes, is_ring, strict=True)
    ]
    total, bonds = int(nodes.sum()), sum(map(len, edges))
    tasks = int(said["num tasks"])
    is_binary = said["task type"] == "binary classification"
    y = np.repeat((is_ring if is_binary else nodes / 4)[:, None].astype(float), tasks, axis=1)
    if tasks > 1:
        y[random.random(y.shape) < 0.1] = np.nan
    order = random.permutation(graphs)
    tables: dict[str, Any] = {
        "raw/edge": np.concatenate(edges),
        "raw/edge-feat": random.integers(0, 2, (bonds, 3)),
        "raw/node-feat": random.integers(0, 2, (total, 9)),
        "raw/num-node-list": nodes,
        "raw/num-edge-list": [len(one) for one in edges],
        "raw/graph-label": y,
        "split/scaffold/train": order[: graphs * 6 // 10],
        "split/scaffold/valid": order[graphs * 6 // 10 : graphs * 8 // 10],
        "split/scaffold/test": order[graphs * 8 // 10 :],
    }
    for file, table in tables.items():
        path = folder / f"{file}.csv.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savetxt(path, np.asarray(table), fmt="%g", delimiter=",")
    (folder / f"RELEASE_v{said['version']}.txt").write_text("made by a test\n")
    return folder
