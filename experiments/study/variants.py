"""Packages with fewer labels, classes, or features: what the gains of width and experts hang on.

Each function is the ``--data`` of a run, and reads ``data/packages.npz``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from experiments.train.data.own_graph import own_graph


def a_tenth() -> Any:
    """A tenth of the training nodes."""
    return _fewer_labels(0.1)


def a_third() -> Any:
    """A third of the training nodes."""
    return _fewer_labels(1 / 3)


def classes_25() -> Any:
    """25 classes: sections that are neighbors in the alphabet are one."""
    return _merged(2)


def classes_10() -> Any:
    """10 classes: five sections that are neighbors in the alphabet are one."""
    return _merged(5)


def features_32() -> Any:
    """The 32 leading components of the words, of 128."""
    data = _packages()
    data.x = data.x[:, :32].contiguous()
    return data


def _packages() -> Any:
    return own_graph(Path("data/packages.npz")).data


def _fewer_labels(share: float) -> Any:
    """The same nodes leave training in every split; validation and test stay."""
    data = _packages()
    stays = torch.rand(data.num_nodes, generator=torch.Generator().manual_seed(0)) < share
    data.train_mask = data.train_mask & stays[:, None]
    return data


def _merged(sections: int) -> Any:
    data = _packages()
    data.y = data.y // sections
    return data
