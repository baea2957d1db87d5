"""A small graph in the folder format of StoredGraph, written by its description alone."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch_geometric.data import Data


def by_destination(data: Data) -> Data:
    """The graph with its edges in the order in which they are stored."""
    source, destination = data.edge_index
    order = source.argsort(stable=True)
    order = order[destination[order].argsort(stable=True)]
    return Data(**{**data.to_dict(), "edge_index": data.edge_index[:, order]})


def store(folder: Path, data: Data, half: bool = False, **further: Any) -> Data:
    """Write the graph, and return what a loader of it in memory has to be given."""
    ordered = by_destination(data)
    assert ordered.num_nodes is not None
    degree = ordered.edge_index[1].bincount(minlength=ordered.num_nodes)
    arrays = {
        "start": torch.cat([torch.zeros(1, dtype=torch.int64), degree.cumsum(0)]),
        "source": ordered.edge_index[0].int(),
        "x": ordered.x.half() if half else ordered.x.float(),
        **({} if ordered.y is None else {"y": ordered.y}),
        **further,
    }
    write(folder, {name: np.asarray(value) for name, value in arrays.items()})
    ordered.x = arrays["x"].float()
    return ordered


def write(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    listed = {}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
        digest = hashlib.sha256((folder / f"{name}.npy").read_bytes()).hexdigest()
        listed[name] = {
            "file": f"{name}.npy",
            "dtype": array.dtype.name,
            "shape": list(array.shape),
            "sha256": digest,
        }
    sizes = {"num_nodes": len(arrays["start"]) - 1, "num_edges": len(arrays["source"])}
    (folder / "graph.json").write_text(
        json.dumps({"format": 1, **sizes, "arrays": listed, "name": "test"})
    )
