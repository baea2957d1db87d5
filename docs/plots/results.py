"""What figures show, read from ``results/``. Nothing else here imports from ``experiments``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.show.cells import differences
from experiments.show.closed.curves import Point, above_dense, curves
from experiments.show.closed.regime_map import MODELS as MAP_MODELS
from experiments.show.closed.regime_map import PLACES, WAYS
from experiments.show.closed.regime_map import gains as regime_gains
from experiments.show.closed.results import read_results
from experiments.show.closed.starts import read_confirmed
from experiments.study.routers import ROWS, read_table
from experiments.train.files import read_json
from experiments.train.scores import Difference, mean_std

__all__ = [
    "MAP_MODELS",
    "PLACES",
    "ROWS",
    "WAYS",
    "Difference",
    "Point",
    "above_dense",
    "curves",
    "differences",
    "mean_std",
    "read_confirmed",
    "read_file",
    "read_results",
    "read_table",
    "regime_gains",
]


def read_file(path: Path) -> dict[str, Any]:
    """The content of a result file."""
    return read_json(path, dict[str, Any])
