"""The data sets by name."""

from __future__ import annotations

from pathlib import Path

from experiments.data.digits import digits, digits_graph
from experiments.data.mosaic import mosaic
from experiments.data.planetoid import planetoid
from experiments.data.task import Batch, Split, Task

__all__ = ["Batch", "Split", "Task", "load_task"]


def load_task(name: str, root: Path, offline: bool = False) -> Task:
    """Load a data set.

    Args:
        name: of the data set.
        root: folder of the data, given to the loader as it is.
        offline: never download.

    Raises:
        ValueError: an unknown name.
        FileNotFoundError: files are missing and cannot be fetched.
    """
    loaders = {
        "digits": digits,
        "digits-graph": digits_graph,
        "mosaic": mosaic,
        "cora": lambda: planetoid("Cora", root, offline),
        "citeseer": lambda: planetoid("CiteSeer", root, offline),
    }
    if name not in loaders:
        raise ValueError(f"dataset: got {name!r}, expected one of {', '.join(loaders)}")
    return loaders[name]()
