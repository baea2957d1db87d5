"""What figures show, read from ``results/``. Nothing else here imports from ``experiments``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.study.curves import Point, above_dense, curves
from experiments.study.regime_map import MODELS as MAP_MODELS
from experiments.study.regime_map import PLACES, WAYS
from experiments.study.regime_map import gains as regime_gains
from experiments.study.routers import ROWS, read_cells
from experiments.study.routers import differences as cell_differences
from experiments.study.starts import differences as start_differences
from experiments.study.starts import read_confirmed, read_results
from experiments.train.files import read_json
from experiments.train.scores import interval, mean_std

__all__ = [
    "MAP_MODELS",
    "PLACES",
    "ROWS",
    "WAYS",
    "Gain",
    "Point",
    "above_dense",
    "cell_differences",
    "curves",
    "mean_std",
    "read_cells",
    "read_confirmed",
    "read_file",
    "read_results",
    "regime_gains",
    "start_differences",
]


@dataclass(frozen=True)
class Gain:
    """The mean of differences by seed, in points, with its 95 % interval by Student's t."""

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, differences: Sequence[float]) -> Gain:
        """The gain that differences by seed show."""
        return cls(fmean(differences), *interval(differences), len(differences))

    @property
    def verdict(self) -> str:
        """``"above"`` or ``"below"`` 0 if the whole interval is, else ``"level"``."""
        if self.low > 0:
            return "above"
        return "below" if self.high < 0 else "level"

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


def read_file(path: Path) -> dict[str, Any]:
    """The content of a result file."""
    return read_json(path, dict[str, Any])
