"""A small graph in the three forms that a user's own may have."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch_geometric.data import Data

from experiments.train.data.task import GraphData

NODES, FEATURES, CLASSES, SPLITS = 40, 3, 3, 4
PARTS = ("train", "val", "test")
Arrays = dict[str, NDArray[Any]]
Write = Callable[..., Path]


def arrays(splits: int | None = None, classes: int = CLASSES, seed: int = 0) -> Arrays:
    """A random graph under the keys of an npz; the last eight nodes are in no split."""
    rng = np.random.default_rng(seed)
    part = np.stack(
        [np.append(rng.permutation(np.arange(NODES - 8) % 4), [4] * 8) for _ in range(splits or 1)]
    )
    masks = {"train": part < 2, "val": part == 2, "test": part == 3}
    edges = np.unique(rng.integers(NODES, size=(90, 2)), axis=0)
    return {
        "node_features": rng.standard_normal((NODES, FEATURES)).astype(np.float32),
        "node_labels": rng.permutation(np.arange(NODES) % classes),
        "edges": edges[edges[:, 0] != edges[:, 1]],
        **{f"{name}_masks": mask if splits else mask[0] for name, mask in masks.items()},
    }


GIVEN = arrays()


def by_pyg(given: Arrays) -> Arrays:
    """The same under PyG's names, in PyG's shapes."""
    masks = {f"{part}_mask": given[f"{part}_masks"].T for part in PARTS if f"{part}_masks" in given}
    return {
        "x": given["node_features"],
        "y": given["node_labels"],
        "edge_index": given["edges"].T,
        **masks,
    }


def write_npz(folder: Path, given: Arrays = GIVEN, **changes: Any) -> Path:
    path = folder / "mine.npz"
    np.savez(path, **{key: value for key, value in (given | changes).items() if value is not None})
    return path


def write_pyg_npz(folder: Path, given: Arrays = GIVEN) -> Path:
    return write_npz(folder, by_pyg(given))


def as_data(given: Arrays, **more: Any) -> Data:
    data = Data(**{name: torch.from_numpy(value.copy()) for name, value in by_pyg(given).items()})
    data.update(more)
    return data


def write_pt(folder: Path, given: Arrays = GIVEN, **more: Any) -> Path:
    path = folder / "mine.pt"
    torch.save(as_data(given, **more), path)
    return path


def write_csv(
    folder: Path, given: Arrays = GIVEN, ids: list[str] | None = None, **columns: list[Any]
) -> Path:
    """``columns`` take the place of others, or come beside them; ``weight`` is the edges'."""
    path = folder / "mine"
    path.mkdir()
    names = ids or [str(node) for node in range(NODES)]
    ends = [[names[node] for node in column] for column in given["edges"].T]
    edges = {"source": ends[0], "target": ends[1]} | (
        {"weight": columns.pop("weight")} if "weight" in columns else {}
    )
    nodes: dict[str, Any] = {"id": ids} if ids else {}
    nodes |= {"label": given["node_labels"]} | {
        f"f{i}": column for i, column in enumerate(given["node_features"].T)
    }
    if "train_masks" in given:
        nodes["split"] = [
            next((part for part in PARTS if given[f"{part}_masks"][node]), "")
            for node in range(NODES)
        ]
    pd.DataFrame(nodes | columns).to_csv(path / "nodes.csv", index=False)
    pd.DataFrame(edges).to_csv(path / "edges.csv", index=False)
    return path


FORMS: dict[str, Write] = {
    "npz": write_npz,
    "npz by PyG's names": write_pyg_npz,
    "pt": write_pt,
    "csv": write_csv,
    "csv with ids": partial(write_csv, ids=[f"node {i:03}" for i in range(NODES)]),
}


def assert_holds(graph: GraphData, given: Arrays) -> None:
    data = graph.data
    torch.testing.assert_close(data.x, torch.from_numpy(given["node_features"].astype(np.float32)))
    assert torch.equal(data.y, torch.from_numpy(given["node_labels"]))
    assert torch.equal(data.edge_index, torch.from_numpy(given["edges"].T))
    assert graph.num_outputs == given["node_labels"].max() + 1
