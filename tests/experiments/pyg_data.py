"""Tiny PyG data sets, written in the raw layouts that PyG's classes read."""

from __future__ import annotations

import json
import pickle
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

Array = NDArray[Any]
NODES, FEATURES, CLASSES, EDGES, SPLITS = 120, 5, 2, 200, 10
"""Of all sets but Planetoid's, whose validation nodes are 500; two classes, so that each has the nodes that a split by
class takes."""


@dataclass(frozen=True)
class Raw:
    """What was written, and what a loader has to make of it."""

    folder: Path
    x: Array
    y: Array
    edges: Array
    """(M, 2), in one direction."""
    masks: dict[str, Array] | None = None
    """(S, N) or (N,) by part; ``None`` where the split is drawn."""

    @property
    def files(self) -> list[str]:
        """The raw files."""
        return sorted(path.name for path in self.folder.iterdir())


class Writer:
    """Draws a small graph and writes it."""

    def __init__(self, root: Path, seed: int = 0) -> None:
        self.root = root
        self.rng = np.random.default_rng(seed)

    def folder(self, *parts: str) -> Path:
        folder = self.root.joinpath(*parts, "raw")
        folder.mkdir(parents=True)
        return folder

    def graph(self, nodes: int = NODES, classes: int = CLASSES) -> tuple[Array, Array, Array]:
        """0/1 features, labels of which every class has its share, and edges without self-loops."""
        x = (self.rng.random((nodes, FEATURES)) < 0.5).astype(np.float32)
        x[:, 0] = 1  # no row is empty
        y = self.rng.permutation(np.arange(nodes) % classes)
        source = self.rng.integers(nodes, size=EDGES)
        edges = np.stack([source, (source + self.rng.integers(1, nodes, size=EDGES)) % nodes], axis=1)
        return x, y, np.unique(edges, axis=0)

    def masks(self, splits: int = SPLITS, dtype: type = bool) -> dict[str, Array]:
        """Half the nodes train, a quarter each validate and test."""
        part = np.stack([self.rng.permutation(np.arange(NODES) % 4) for _ in range(splits)])
        return {
            "train": (part < 2).astype(dtype),
            "val": (part == 2).astype(dtype),
            "test": (part == 3).astype(dtype),
        }

    def planetoid(self, name: str) -> Raw:
        """Pickles of sparse features and one-hot labels; CiteSeer's test nodes have gaps."""
        train, nodes = 6, 540
        x, y, edges = self.graph(nodes, classes=3)
        test = np.arange(nodes - 20, nodes)
        if name == "CiteSeer":
            gap = nodes - 7
            test = test[test != gap]
            x[gap], y[gap] = 0, 0
        test = self.rng.permutation(test)
        graph: dict[int, list[int]] = defaultdict(list)
        for node in range(nodes):
            graph[node] = []
        for source, target in edges.tolist():
            graph[source].append(target)
            graph[target].append(source)
        known = nodes - 20
        label = np.eye(3, dtype=np.int32)[y]
        parts = {
            "x": csr_matrix(x[:train]), "y": label[:train], "allx": csr_matrix(x[:known]), "ally": label[:known],
            "tx": csr_matrix(x[test]), "ty": label[test], "graph": graph,
        }  # fmt: skip
        folder = self.folder(name)
        for part, value in parts.items():
            (folder / f"ind.{name.lower()}.{part}").write_bytes(pickle.dumps(value, protocol=2))
        (folder / f"ind.{name.lower()}.test.index").write_text("".join(f"{node}\n" for node in test))
        mask = np.zeros((3, nodes), dtype=bool)
        mask[0, :train] = mask[1, train : train + 500] = mask[2, test] = True
        masks = dict(zip(("train", "val", "test"), mask, strict=True))
        return Raw(folder, x / x.sum(axis=1, keepdims=True).clip(1), y, edges, masks)

    def shchur(self, folder: str, file: str) -> Raw:
        """Two sparse matrices and labels; names, which are objects, are not read."""
        x, y, edges = self.graph()
        adj, attr = csr_matrix((np.ones(len(edges)), edges.T), shape=(NODES, NODES)), csr_matrix(3 * x)
        path = self.folder(folder)
        arrays = {
            f"{name}_{part}": getattr(value, part)
            for name, value in (("adj", adj), ("attr", attr))
            for part in ("data", "indices", "indptr", "shape")
        }
        names = np.array([f"node {i}" for i in range(NODES)], dtype=object)
        np.savez(path / f"{file}.npz", **arrays, labels=y, node_names=names)
        return Raw(path, x, y, edges)

    def wikics(self) -> Raw:
        """JSON; 20 splits of what is not in the test set."""
        x, y, edges = self.graph()
        part = np.stack([np.append(self.rng.permutation(np.arange(90) % 3), [3] * 30) for _ in range(20)])
        masks = {"train": part == 0, "val": part == 1, "test": part[0] == 3}
        links = [edges[edges[:, 0] == node, 1].tolist() for node in range(NODES)]
        content = {
            "features": x.tolist(), "labels": y.tolist(), "links": links, "train_masks": masks["train"].tolist(),
            "val_masks": masks["val"].tolist(), "test_mask": masks["test"].tolist(),
            "stopping_masks": (part == 2).tolist(),
        }  # fmt: skip
        folder = self.folder()
        (folder / "data.json").write_text(json.dumps(content))
        return Raw(folder, x, y, edges, masks)

    def platonov(self, name: str) -> Raw:
        """One npz, in the form that a user's own graph takes too."""
        x, y, edges = self.graph()
        masks = self.masks()
        folder = self.folder(name)
        arrays: dict[str, Any] = {f"{part}_masks": mask for part, mask in masks.items()}
        np.savez_compressed(folder / f"{name}.npz", node_features=x, node_labels=y, edges=edges, **arrays)
        return Raw(folder, x, y, edges, masks)

    def filtered(self, name: str) -> Raw:
        """The npz in the data root itself."""
        raw = self.platonov(name)
        self.root.mkdir(exist_ok=True)
        (raw.folder / f"{name}.npz").rename(self.root / f"{name}.npz")
        raw.folder.rmdir()
        raw.folder.parent.rmdir()
        return replace(raw, folder=self.root)

    def geom(self, name: str, folder: tuple[str, ...], by_index: bool) -> Raw:
        """Two tables, the first of features as indices (actor) or as numbers, and ten npz with a split each."""
        x, y, edges = self.graph()
        x[0] = 1  # the width follows from the largest index
        masks = self.masks(dtype=np.int64 if by_index else np.uint8)
        path = self.folder(*folder)
        lines = ["node_id\tfeature\tlabel"]
        for node in self.rng.permutation(NODES) if by_index else range(NODES):
            row = np.flatnonzero(x[node]) if by_index else x[node].astype(int)
            lines.append(f"{node}\t{','.join(map(str, row))}\t{y[node]}")
        (path / "out1_node_feature_label.txt").write_text("\n".join(lines) + "\n")
        lines = ["node_id\tnode_id", *(f"{source}\t{target}" for source, target in edges.tolist())]
        (path / "out1_graph_edges.txt").write_text("\n".join(lines) + "\n")
        for split in range(SPLITS):
            arrays = {f"{part}_mask": mask[split] for part, mask in masks.items()}
            np.savez(path / f"{name}_split_0.6_0.2_{split}.npz", **arrays)
        return Raw(path, x, y, edges, masks)

    def write(self, name: str) -> Raw:
        """The data set that the command line calls by this name."""
        if name in ("cora", "citeseer", "pubmed"):
            return self.planetoid({"cora": "Cora", "citeseer": "CiteSeer", "pubmed": "PubMed"}[name])
        if name.startswith("amazon-") and name != "amazon-ratings":
            kind = name.removeprefix("amazon-")
            return self.shchur(kind.capitalize(), f"amazon_electronics_{kind}")
        if name.startswith("coauthor-"):
            return self.shchur(*{"cs": ("CS", "ms_academic_cs"), "physics": ("Physics", "ms_academic_phy")}[name[9:]])
        if name == "wikics":
            return self.wikics()
        if name == "actor":
            return self.geom("film", (), by_index=True)
        if name in ("chameleon", "squirrel"):
            return self.geom(name, (name, "geom_gcn"), by_index=False)
        if name.endswith("-filtered"):
            return self.filtered(name.replace("-", "_"))
        return self.platonov(name.replace("-", "_"))
