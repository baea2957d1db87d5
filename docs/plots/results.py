"""What figures show, read from ``results/``. Nothing else here imports from ``experiments``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

from experiments.show.cells import Cells, differences, read_cells, read_study
from experiments.study.routers import ROWS, read_table
from experiments.train.files import read_json
from experiments.train.scores import Difference, mean_std

__all__ = [
    "ROWS",
    "Difference",
    "Gains",
    "differences",
    "mean_std",
    "numbers_of",
    "read_confirmed",
    "read_file",
    "read_finished",
    "read_starts",
    "read_table",
]

Gains: TypeAlias = dict[str, dict[str, Difference]]
"""By column and row, the difference to a control."""

COLUMNS = (
    "digits-graph",
    "cora",
    "citeseer",
    "mosaic",
    "concept",
    "minesweeper",
    "facebook",
    "digits",
)
"""The columns of the study of starts and of its curves, in the order of their tables."""

IN_TABLE = {
    "dense": "dense",
    "dense-flops": "dense-flops",
    "shared": "token-choice",
    "difference-layer-node-constant-unbalanced": "copies",
}
"""Runs of the columns that the table of routers confirms, and their cells there."""


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


def read_starts(folder: Path) -> Cells:
    """The cells of a part of the study of starts, by its folder."""
    return read_cells(folder, COLUMNS)


def read_confirmed(folder: Path) -> Cells:
    """What the study of starts confirmed: by column and run, the summary.

    cifar10 and imagenette are here if they have all runs in the table of routers.
    """
    confirmed = read_starts(folder)
    of_routers = read_cells(folder.parent / "routers", ("cifar10", "imagenette"), IN_TABLE.values())
    for column, cells in of_routers.items():
        if len(cells) == len(IN_TABLE):
            confirmed[column] = {run: cells[cell] for run, cell in IN_TABLE.items()}
    return confirmed
