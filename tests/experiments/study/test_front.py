"""The front of width from result files: the rule, the tables, the figure, and what is missing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from docs.plots import width as plots
from docs.plots.style import THEMES
from experiments.study.front import dense_at, front_tables, over_dense, read_front, verdicts
from experiments.study.width import ARMS, COLUMNS
from experiments.train.results import write_json
from tests.helpers.run_folders import variant

BASE = [0.70, 0.72, 0.71]
"""Test scores of the dense model 64 wide, split by split."""


def cell(row: str, gains: list[float], flops: float) -> dict[str, Any]:
    """A finished cell, by what it is above the dense model 64 wide on the first splits."""
    values = [base + gain for base, gain in zip(BASE, gains, strict=False)]
    found = variant(row, values, flops=round(flops * 1e9))
    found["config"] |= {"router": "dense" if row.startswith("dense") else "token_choice"}
    return found


CELLS = {
    "dense-64": cell("dense-64", [0, 0, 0], 4),
    "dense-256": cell("dense-256", [0.010, 0.020, 0.030], 16),
    "experts-64": cell("experts-64", [0.015, 0.021, 0.024], 8),
    "experts-256": cell("experts-256", [0.02, 0.02], 17),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A study of which a column is begun, and of which one price is known."""
    labels = {name: arm.label for name, arm in ARMS.items()}
    study = {"columns": COLUMNS, "rows": [*ARMS], "labels": labels, "controls": []}
    write_json(tmp_path / "width" / "study.json", study)
    for row, own in CELLS.items():
        write_json(tmp_path / "width" / COLUMNS[0] / f"{row}.json", own)
    price = {"hours": 1.0, "step": 0.25, "inference": 0.1, "memory": 2**20}
    write_json(tmp_path / "width" / "prices.json", {f"{COLUMNS[0]}/dense-64": price})
    return tmp_path


def test_experts_are_compared_with_the_dense_curve_at_their_cost(folder: Path) -> None:
    """Half way between 4 and 16 in the logarithm is 8; splits are paired."""
    cells = read_front(folder / "width")[COLUMNS[0]]
    dense = dense_at("flops", 8, cells)
    assert dense is not None
    halves = [0.70 + 0.005, 0.72 + 0.010, 0.71 + 0.015]
    assert dense["test"]["values"] == pytest.approx(halves)
    gain = over_dense("experts-64", cells)["flops"]
    assert gain is not None
    assert gain.mean == pytest.approx(100 * (0.010 + 0.011 + 0.009) / 3)
    half = 4.302653 * 0.1 / math.sqrt(3)  # Student's t of two degrees of freedom
    assert gain.low == pytest.approx(gain.mean - half, abs=1e-5)
    assert (gain.side, gain.n) == ("above", 3)


def test_where_the_dense_curve_ends_nothing_is_said(folder: Path) -> None:
    cells = read_front(folder / "width")[COLUMNS[0]]
    assert over_dense("experts-256", cells)["flops"] is None
    assert verdicts(cells)[0] == (
        "by GFLOPs of a forward, experts win at 64 wide; beyond the dense curve at 256 wide"
    )
    assert over_dense("dense-64", cells)["flops"].mean == 0  # type: ignore[union-attr]


def test_tables_have_n_and_name_what_is_missing(folder: Path) -> None:
    scores, beside, left, *others = front_tables(read_front(folder / "width")).split("\n\n")
    assert "| dense-64 | 71.00 ± 1.00 | 3 | 4 | 0.25 | 0.1 | 1.23 | 1 |" in scores
    assert "| experts-64 | 73.00 ± 1.35 | 3 | 8 | – | – | 1.23 | – |" in scores
    assert "| experts-64 | **+1.00 (+0.75 to +1.25), n = 3** | – | – | " in beside
    assert left.startswith(f"Not finished on {COLUMNS[0]}: dense, 16; experts, 16; dense, 32")
    assert others == [f"Not finished on {column}: any model." for column in COLUMNS[1:]]
    nothing = front_tables(read_front(folder / "never begun"))
    assert nothing.count("any model") == len(COLUMNS)


def test_the_figure_has_what_is_finished(folder: Path) -> None:
    short, long = plots.drawings(folder)
    assert short.numbers == long.numbers
    assert "packages: experts-64 +2.00 (" in short.numbers
    assert "experts win at 64 wide" in short.alt
    panels = [axis for axis in short.draw(THEMES[0]).axes if axis.get_visible()]
    assert [axis.get_xlabel() for axis in panels][::4] == ["GFLOPs of a forward", "MiB in training"]
    (folder / "width" / COLUMNS[0] / "dense-64.json").unlink()
    assert plots.drawings(folder) == []  # nothing to compare with
