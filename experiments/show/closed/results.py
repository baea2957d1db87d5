"""Read the cells of a closed study."""

from __future__ import annotations

from pathlib import Path

from experiments.show.cells import Cells, read_cells

OF_STARTS = (
    "digits-graph",
    "cora",
    "citeseer",
    "mosaic",
    "concept",
    "minesweeper",
    "facebook",
    "digits",
)
COLUMNS: dict[str, tuple[str, ...]] = {
    "starts": OF_STARTS,
    "starts-confirmed": OF_STARTS,
    "curves": OF_STARTS,
    "molecules": (
        "molbace",
        "molbbbp",
        "molesol",
        "molhiv",
        "molbace-100",
        "molbace-100-fresh",
    ),
    "unseen": ("chameleon", "tolokers"),
}
"""The columns of each study, by its folder, in the order of its tables."""


def read_results(folder: Path) -> Cells:
    """The finished cells of a study, by its folder."""
    return read_cells(folder, COLUMNS[folder.name])
