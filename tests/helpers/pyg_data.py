"""Tiny PyG data sets, written in the raw layouts that PyG's classes read."""

from __future__ import annotations

import json
import pickle
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from experiments.train.data.named import PYG, PyGSet, load_graph
from experiments.train.data.task import GraphData

Array = NDArray[Any]
NODES, FEATURES, CLASSES, EDGES, SPLITS = 120, 5, 2, 200, 10
"""Of all sets but Planetoid's, whose validation nodes are 500; two classes, so that each has the
nodes that a split by class takes."""


@dataclass(frozen=True)
class Raw:
    """What was written, and what a loader has to make of it."""

    folder: Path
    x: Array
    y: Array
    edges: Array  # (M, 2), in one direction
    masks: dict[str, Array] | None = None  # (S, N) or (N,) by part; None where the split is drawn


def write_raw(name: str, root: Path) -> Raw:
    """The data set of this name, its folder and files as PyG expects them."""
    given = PYG.get(name)
    if given is None:  # filtered, in the data root itself
        root.mkdir(parents=True, exist_ok=True)
        return platonov(root, f"{name.replace('-', '_')}.npz")
    folder = root / given.folder
    folder.mkdir(parents=True)
    kind = given.cls.__name__
    if kind in ("Amazon", "Coauthor"):
        return shchur(folder, given.files[0])
    if kind == "HeterophilousGraphDataset":
        return platonov(folder, given.files[0])
    return {"Planetoid": planetoid, "WikiCS": wikics, "Actor": actor}[kind](folder, given)


def graph(nodes: int = NODES, classes: int = CLASSES) -> tuple[Array, Array, Array]:
    """0/1 features, labels of which every class has its share, and edges without self-loops."""
    rng = np.random.default_rng(0)
    x = (rng.random((nodes, FEATURES)) < 0.5).astype(np.float32)
    x[:, 0] = x[0] = 1  # no row is empty; of indices, the width follows from the largest
    source = rng.integers(nodes, size=EDGES)
    edges = np.stack([source, (source + rng.integers(1, nodes, size=EDGES)) % nodes], axis=1)
    return x, rng.permutation(np.arange(nodes) % classes), np.unique(edges, axis=0)


def masks(dtype: type = bool) -> dict[str, Array]:
    """Half the nodes train, a quarter each validate and test."""
    rng = np.random.default_rng(1)
    part = np.stack([rng.permutation(np.arange(NODES) % 4) for _ in range(SPLITS)])
    return {
        "train": (part < 2).astype(dtype),
        "val": (part == 2).astype(dtype),
        "test": (part == 3).astype(dtype),
    }


def planetoid(folder: Path, given: PyGSet) -> Raw:
    """Pickles of sparse features and one-hot labels; CiteSeer's test nodes have gaps."""
    train, nodes = 6, 540
    x, y, edges = graph(nodes, classes=3)
    test = np.arange(nodes - 20, nodes)
    if given.kwargs["name"] == "CiteSeer":
        test = test[test != nodes - 7]
        x[nodes - 7], y[nodes - 7] = 0, 0
    test = np.random.default_rng(2).permutation(test)
    links = defaultdict[int, list[int]](list, {node: [] for node in range(nodes)})
    for source, target in edges.tolist():
        links[source].append(target)
        links[target].append(source)
    known, label = nodes - 20, np.eye(3, dtype=np.int32)[y]
    parts = {
        "x": csr_matrix(x[:train]),
        "y": label[:train],
        "allx": csr_matrix(x[:known]),
        "ally": label[:known],
        "tx": csr_matrix(x[test]),
        "ty": label[test],
        "graph": links,
    }
    for file in given.files:
        part = file.rpartition(".")[2]
        content = (
            "".join(f"{node}\n" for node in test).encode()
            if part == "index"
            else pickle.dumps(parts[part], 2)
        )
        (folder / file).write_bytes(content)
    mask = np.zeros((3, nodes), dtype=bool)
    mask[0, :train] = mask[1, train : train + 500] = mask[2, test] = True
    parts = dict(zip(("train", "val", "test"), mask, strict=True))
    return Raw(folder, x / x.sum(axis=1, keepdims=True).clip(1), y, edges, parts)


def shchur(folder: Path, file: str) -> Raw:
    """Two sparse matrices and labels; names, which are objects, are not read."""
    x, y, edges = graph()
    matrices = {
        "adj": csr_matrix((np.ones(len(edges)), edges.T), shape=(NODES, NODES)),
        "attr": csr_matrix(3 * x),
    }
    parts = ("data", "indices", "indptr", "shape")
    arrays = {
        f"{name}_{part}": getattr(value, part) for name, value in matrices.items() for part in parts
    }
    np.savez(
        folder / file,
        **arrays,
        labels=y,
        node_names=np.array([f"node {i}" for i in range(NODES)], dtype=object),
    )
    return Raw(folder, x, y, edges)


def wikics(folder: Path, given: PyGSet) -> Raw:
    """JSON; 20 splits of what is not in the test set."""
    x, y, edges = graph()
    rng = np.random.default_rng(3)
    part = np.stack([np.append(rng.permutation(np.arange(90) % 3), [3] * 30) for _ in range(20)])
    parts = {"train": part == 0, "val": part == 1, "test": part[0] == 3}
    content = {
        "features": x.tolist(),
        "labels": y.tolist(),
        "train_masks": parts["train"].tolist(),
        "links": [edges[edges[:, 0] == node, 1].tolist() for node in range(NODES)],
        "val_masks": parts["val"].tolist(),
        "test_mask": parts["test"].tolist(),
        "stopping_masks": (part == 2).tolist(),
    }
    (folder / given.files[0]).write_text(json.dumps(content))
    return Raw(folder, x, y, edges, parts)


def platonov(folder: Path, file: str) -> Raw:
    """One npz, in the form that a user's own graph takes too."""
    x, y, edges = graph()
    arrays: dict[str, Any] = {f"{part}_masks": mask for part, mask in masks().items()}
    np.savez_compressed(folder / file, node_features=x, node_labels=y, edges=edges, **arrays)
    return Raw(folder, x, y, edges, masks())


def actor(folder: Path, given: PyGSet) -> Raw:
    """Two tables, the first of features as indices, and ten npz with a split each."""
    x, y, edges = graph()
    parts = masks(np.int64)
    rows = [",".join(map(str, np.flatnonzero(row))) for row in x]
    nodes = [
        "node_id\tfeature\tlabel",
        *(f"{node}\t{rows[node]}\t{y[node]}" for node in range(NODES)),
    ]
    links = ["node_id\tnode_id", *(f"{source}\t{target}" for source, target in edges.tolist())]
    for file, lines in zip(given.files, (nodes, links), strict=False):
        (folder / file).write_text("\n".join(lines) + "\n")
    for split, file in enumerate(given.files[2:]):
        np.savez(folder / file, **{f"{part}_mask": mask[split] for part, mask in parts.items()})
    return Raw(folder, x, y, edges, parts)


def load(name: str, root: Path, offline: bool = True) -> GraphData:
    """A data set by name, as the command reads it."""
    return load_graph(name, root, offline=offline)
