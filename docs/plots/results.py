"""What figures show, read from ``results/``. Nothing else here imports from ``experiments``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

from experiments.show.cells import Cells, differences, read_study
from experiments.study.front import (
    BASE,
    COSTS,
    HELD_OUT,
    Front,
    Pays,
    at_best_step,
    compared_costs,
    curve,
    difference,
    over_dense,
    part_of_width,
    read_front,
    verdicts,
    what_pays,
)
from experiments.study.routers import ROWS, read_table
from experiments.train.files import read_json
from experiments.train.scores import Difference

__all__ = [
    "BASE",
    "COSTS",
    "HELD_OUT",
    "ROWS",
    "Difference",
    "Front",
    "Gains",
    "Pays",
    "at_best_step",
    "compared_costs",
    "curve",
    "difference",
    "differences",
    "numbers_of",
    "over_dense",
    "part_of_width",
    "read_file",
    "read_finished",
    "read_front",
    "read_published",
    "read_table",
    "verdicts",
    "what_pays",
]

Gains: TypeAlias = dict[str, dict[str, Difference]]
"""By column and row, the difference to a control."""


def read_file(path: Path) -> dict[str, Any]:
    """The content of a result file."""
    return read_json(path, dict[str, Any])


def numbers_of(found: Gains) -> str:
    """Whatever a figure draws of gains, as text: a line a column."""
    lines = []
    for column, known in found.items():
        shown = ", ".join(f"{row} {gain}" for row, gain in known.items())
        lines.append(f"{column}: {shown}")
    return "\n".join(lines)


def read_finished(folder: Path) -> Cells:
    """The finished cells of a study, by its folder: by column and row, the summary."""
    cells: Cells = read_study(folder)["cells"]
    return cells


def read_published(folder: Path) -> tuple[Cells, dict[str, str]]:
    """The finished cells of a study, and the published figures by ``COLUMN/ROW``."""
    study = read_study(folder)
    return study["cells"], study["published"]
