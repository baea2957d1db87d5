"""A graph whose tensors are in memory-mapped files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data


def open_mapped(path: Path) -> Tensor:
    """What a ``.npy`` file holds, as a tensor that must not be written to."""
    with warnings.catch_warnings():  # torch warns of memory that cannot be written to
        warnings.simplefilter("ignore")
        return torch.from_numpy(np.load(path, mmap_mode="r"))


def map_to(folder: Path, data: Data, half: bool = False) -> Data:
    """Write the graph, its edges by destination, and map it; features in half precision if asked.

    Edge arguments follow their edges.
    """
    folder.mkdir(parents=True, exist_ok=True)
    order = data.edge_index[1].argsort(stable=True)
    tensors: dict[str, Any] = data.to_dict()
    tensors["edge_index"] = data.edge_index[:, order].contiguous()
    for name in ("edge_weight", "edge_attr"):
        if name in data:
            tensors[name] = data[name][order]
    if half:
        tensors["x"] = data.x.half()
    for name, tensor in tensors.items():
        np.save(folder / f"{name}.npy", tensor.numpy())
    return Data(**{name: open_mapped(folder / f"{name}.npy") for name in tensors})


def create_mapped(path: Path, shape: tuple[int, ...]) -> Tensor:
    """A new ``.npy`` file of float32 as a tensor: what is written to it is in the file."""
    return torch.from_numpy(np.lib.format.open_memmap(path, "w+", np.float32, shape))
