"""A small graph in the three forms that a user's own may have."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch_geometric.data import Data

from experiments.data.graph_data import GraphData

NODES, FEATURES, CLASSES, SPLITS = 40, 3, 3, 4
Write = Callable[..., Path]


def arrays(splits: int | None = None, classes: int = CLASSES, seed: int = 0) -> dict[str, NDArray[Any]]:
    """A random graph under the keys of an npz; the last eight nodes are in no split."""
    rng = np.random.default_rng(seed)
    part = np.stack([np.append(rng.permutation(np.arange(NODES - 8) % 4), [4] * 8) for _ in range(splits or 1)])
    masks = {"train": part < 2, "val": part == 2, "test": part == 3}
    edges = np.unique(rng.integers(NODES, size=(90, 2)), axis=0)
    return {
        "node_features": rng.standard_normal((NODES, FEATURES)).astype(np.float32),
        "node_labels": rng.permutation(np.arange(NODES) % classes),
        "edges": edges[edges[:, 0] != edges[:, 1]],
        **{f"{name}_masks": mask if splits else mask[0] for name, mask in masks.items()},
    }


def as_data(given: dict[str, NDArray[Any]], **more: Any) -> Data:
    masks = {name: torch.from_numpy(given[f"{name}_masks"].T.copy()) for name in ("train", "val", "test")}
    data = Data(
        x=torch.from_numpy(given["node_features"]),
        y=torch.from_numpy(given["node_labels"]),
        edge_index=torch.from_numpy(given["edges"].T.copy()),
        **{f"{name}_mask": mask for name, mask in masks.items()},
    )
    data.update(more)
    return data


def write_npz(folder: Path, given: dict[str, NDArray[Any]] | None = None, **changes: Any) -> Path:
    path = folder / "mine.npz"
    content = (arrays() if given is None else given) | changes
    np.savez(path, **{key: value for key, value in content.items() if value is not None})
    return path


def write_pt(folder: Path, given: dict[str, NDArray[Any]] | None = None, **more: Any) -> Path:
    path = folder / "mine.pt"
    torch.save(as_data(arrays() if given is None else given, **more), path)
    return path


def write_csv(
    folder: Path, given: dict[str, NDArray[Any]] | None = None, ids: list[str] | None = None, weight: Any = None
) -> Path:
    given = arrays() if given is None else given
    path = folder / "mine"
    path.mkdir()
    part = np.full(NODES, "", dtype="<U5")
    for name in ("train", "val", "test"):
        part[given[f"{name}_masks"]] = name
    header = [*(["id"] if ids else []), "label", *(f"f{i}" for i in range(given["node_features"].shape[1])), "split"]
    lines = [",".join(header)]
    for node in range(NODES):
        row = [given["node_labels"][node], *given["node_features"][node], part[node]]
        lines.append(",".join([*([ids[node]] if ids else []), *map(str, row)]))
    (path / "nodes.csv").write_text("\n".join(lines) + "\n")
    names = ids or [str(node) for node in range(NODES)]
    lines = ["source,target" + (",weight" if weight is not None else "")]
    for edge, (source, target) in enumerate(given["edges"].tolist()):
        lines.append(f"{names[source]},{names[target]}" + (f",{weight[edge]}" if weight is not None else ""))
    (path / "edges.csv").write_text("\n".join(lines) + "\n")
    return path


FORMS: dict[str, Write] = {
    "npz": write_npz,
    "pt": write_pt,
    "csv": write_csv,
    "csv-ids": partial(write_csv, ids=[f"node {i:03}" for i in range(NODES)]),
}


def assert_holds(graph: GraphData, given: dict[str, NDArray[Any]]) -> None:
    data = graph.data
    torch.testing.assert_close(data.x, torch.from_numpy(given["node_features"].astype(np.float32)))
    assert torch.equal(data.y, torch.from_numpy(given["node_labels"]))
    assert torch.equal(data.edge_index, torch.from_numpy(given["edges"].T))
    assert graph.num_outputs == given["node_labels"].max() + 1


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)
