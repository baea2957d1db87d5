"""Tiny sets of nodes in OGB's layout, and their files."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.train.data import ogb
from experiments.train.data.published import published

NAMES = ogb.NODES
NODES, EDGES = 200, 600
SIZES = {"author": 300, "field_of_study": 20, "institution": 9}
"""Nodes of ogbn-mag that are no papers."""
RELATIONS = (
    ("author", "affiliated_with", "institution"),
    ("author", "writes", "paper"),
    ("paper", "cites", "paper"),
    ("paper", "has_topic", "field_of_study"),
)


def plant(root: Path) -> Path:
    """All sets, tiny."""
    for name in NAMES:
        write_nodes(name, root)
    return root


def write_nodes(name: str, root: Path, nodes: int = NODES) -> Path:
    """One of the sets, whose first feature is the class; returns its folder."""
    random = np.random.default_rng(0)
    said = published(name)
    folder = root / name.replace("-", "_")
    tasks = int(said["num tasks"])
    y = random.integers(2 if tasks > 1 else 7, size=(nodes, tasks))
    x = random.normal(size=(nodes, 128)).round(3)
    x[:, 0] = y[:, 0]
    split = f"split/{said['split']}"
    tables: dict[str, Any]
    if name == "ogbn-mag":
        split = f"{split}/paper"
        tables = typed_tables(random, nodes)
        tables |= {"raw/node-feat/paper/node-feat": x, "raw/node-label/paper/node-label": y}
    else:
        edges = random.integers(nodes, size=(EDGES, 2))
        tables = {"raw/node-label": y, "raw/edge": edges}
        tables |= {"raw/num-node-list": [nodes], "raw/num-edge-list": [EDGES]}
        tables |= {f"raw/{file}": y[:, :1] for file in ("node_year", "node_species")}
        tables |= {"raw/node-feat": x}
    if name == "ogbn-proteins":
        del tables["raw/node-feat"]
        tables["raw/edge-feat"] = random.uniform(size=(EDGES, 8)).round(3)
    parts = np.split(random.permutation(nodes), [nodes // 2, nodes * 3 // 4])
    tables |= {
        f"{split}/{part}": rows
        for part, rows in zip(("train", "valid", "test"), parts, strict=True)
    }
    for file, table in tables.items():
        path = folder / f"{file}.csv.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, np.asarray(table))
    (folder / f"RELEASE_v{said['version']}.txt").write_text("made by a test\n")
    return folder


def typed_tables(random: np.random.Generator, papers: int) -> dict[str, Any]:
    """The edges of ogbn-mag, and what its types of nodes have."""
    sizes = {**SIZES, "paper": papers}
    has = [list(sizes), [str(kind == "paper") for kind in sizes]]
    tables: dict[str, Any] = {
        "raw/triplet-type-list": RELATIONS,
        "raw/num-node-dict": [list(sizes), list(map(str, sizes.values()))],
        "raw/nodetype-has-label": has,
        "split/time/nodetype-has-split": has,
    }
    for relation in RELATIONS:
        folder = f"raw/relations/{'___'.join(relation)}"
        ends = [random.integers(sizes[kind], size=EDGES) for kind in relation[::2]]
        tables |= {f"{folder}/edge": np.stack(ends, 1), f"{folder}/num-edge-list": [EDGES]}
        tables[f"{folder}/edge_reltype"] = np.zeros((EDGES, 1), int)
    return tables


def numbers(path: Path) -> NDArray[np.float64]:
    """A compressed table."""
    return np.loadtxt(path, delimiter=",", ndmin=2)


def write(path: Path, table: NDArray[Any]) -> None:
    """A compressed table, of numbers or text."""
    form = "%s" if table.dtype.kind == "U" else "%.6g"
    with gzip.open(path, "wt") as file:
        np.savetxt(file, table, fmt=form, delimiter=",")
