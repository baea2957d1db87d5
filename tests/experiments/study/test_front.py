"""The front of width from result files: the rule, the tables, the figure, and what is missing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from docs.plots import width as plots
from docs.plots.style import THEMES
from experiments.study.front import (
    Pays,
    at_best_step,
    dense_at,
    difference,
    front_tables,
    over_dense,
    part_of_width,
    pays_table,
    read_front,
    verdicts,
    what_pays,
)
from experiments.study.width import ARMS, COLUMNS, FACTORS, PAIR
from experiments.train.files import read_json
from experiments.train.results import write_json
from experiments.train.scores import Difference
from tests.helpers.run_folders import variant

BASE = [0.70, 0.72, 0.71]
"""Test scores of the dense model 64 wide, split by split."""


def cell(row: str, gains: list[float], flops: float) -> dict[str, Any]:
    """A finished cell, by what it is above the dense model 64 wide on the first splits."""
    values = [base + gain for base, gain in zip(BASE, gains, strict=False)]
    found = variant(row, values, flops=round(flops * 1e9))
    found["val"] = {"mean": 0.7}
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
    gain = over_dense(cells["experts-64"], cells)["flops"]
    assert gain is not None
    assert gain.mean == pytest.approx(100 * (0.010 + 0.011 + 0.009) / 3)
    half = 4.302653 * 0.1 / math.sqrt(3)  # Student's t of two degrees of freedom
    assert gain.low == pytest.approx(gain.mean - half, abs=1e-5)
    assert (gain.side, gain.n) == ("above", 3)


def test_where_the_dense_curve_ends_nothing_is_said(folder: Path) -> None:
    cells = read_front(folder / "width")[COLUMNS[0]]
    assert over_dense(cells["experts-256"], cells)["flops"] is None
    assert verdicts(cells)[0] == (
        "by GFLOPs of a forward, experts win at 64 wide; outside the dense curve at 256 wide"
    )
    assert over_dense(cells["dense-64"], cells)["flops"].mean == 0  # type: ignore[union-attr]


@pytest.mark.parametrize(("val", "gain"), [(0.8, 1.5), (0.6, 2.0)])
def test_the_step_size_that_is_better_in_validation_counts(
    folder: Path, val: float, gain: float
) -> None:
    """On the curve, in the verdict and over graphs; the table has both."""
    other = cell("experts, dense's step size", [0.010, 0.015, 0.020], 8)
    other["val"] = {"mean": val}
    write_json(folder / "width" / COLUMNS[0] / "experts-64-lr1.json", other)
    front = read_front(folder / "width")
    cells = front[COLUMNS[0]]
    found = difference(at_best_step(cells, "experts-64"), cells["dense-64"])
    assert found is not None
    assert found.mean == pytest.approx(gain)
    pays = what_pays(folder)[COLUMNS[0]]
    assert pays.experts.mean == pytest.approx(gain / 0.29)
    assert "| experts, dense's step size | **+0.50 (" in front_tables(front).split("\n\n")[1]


def test_tables_have_n_and_name_what_is_missing(folder: Path) -> None:
    scores, beside, left, *others = front_tables(read_front(folder / "width")).split("\n\n")
    assert "| dense-64 | 71.00 ± 1.00 | 3 | – | 4 | 0.25 | 0.1 | 1.23 | 1 |" in scores
    assert "| experts-64 | 73.00 ± 1.35 | 3 | +2.00 (+0.86 to +3.14), n = 3 | 8 | – | – |" in scores
    assert "| experts-64 | **+1.00 (+0.75 to +1.25), n = 3** | – | – | " in beside
    assert left.startswith(f"Not finished on {COLUMNS[0]}: dense, 16; experts, 16; dense, 32")
    assert others == [f"Not finished on {column}: any model." for column in COLUMNS[1:]]
    nothing = front_tables(read_front(folder / "never begun"))
    assert nothing.count("any model") == len(COLUMNS)


def test_the_figure_has_what_is_finished(folder: Path) -> None:
    short, long, pays = plots.drawings(folder)
    assert pays.numbers.startswith("packages: wider +6.90 (")
    assert short.numbers == long.numbers
    assert "packages: experts-64 +2.00 (" in short.numbers
    assert "experts win at 64 wide" in short.alt
    panels = [axis for axis in short.draw(THEMES[0]).axes if axis.get_visible()]
    shown = ["GFLOPs of a forward", "thousand parameters"]  # the others have one dense model
    assert [axis.get_xlabel() for axis in panels] == shown
    (folder / "width" / COLUMNS[0] / "dense-64.json").unlink()
    assert plots.drawings(folder) == []  # nothing to compare with


def errors_of(row: str, error: float, val: float, metric: str = "accuracy") -> dict[str, Any]:
    """A cell of two splits that differ by 0.02 in whatever they score."""
    mean = error if metric == "rmse" else 1 - error
    found = variant(row, [mean - 0.01, mean + 0.01])
    return found | {"metric": metric, "val": {"mean": val}}


def write_graph(
    folder: Path, study: str, column: str, errors: tuple[float, ...], metric: str = "accuracy"
) -> None:
    """The three arms of a graph, of which the step size 1.0 is the best in validation."""
    path = folder / study / "study.json"
    columns = read_json(path, dict[str, Any])["columns"] if path.exists() else []
    write_json(path, {"columns": [*columns, column], "rows": []})
    worse, best = (2.0, 1.0) if metric == "rmse" else (0.5, 0.9)
    for arm, error in zip(PAIR, errors, strict=True):
        for factor in FACTORS:
            is_best = factor == FACTORS[1]
            own = errors_of(arm, error if is_best else 0.9, best if is_best else worse, metric)
            write_json(folder / study / column / f"{arm}@{factor}.json", own)


def test_what_pays_is_a_share_of_errors_at_the_step_size_of_validation(tmp_path: Path) -> None:
    write_graph(tmp_path, "width-graphs", "cora", (0.20, 0.15, 0.18))
    write_graph(tmp_path, "width-graphs", "molesol", (2.0, 1.0, 1.5), "rmse")
    write_graph(tmp_path, "width-graphs", "actor", (0.60, 0.63, 0.60))
    write_graph(tmp_path, "width-variants", "packages-a_tenth", (0.5, 0.1, 0.5))
    (tmp_path / "width-graphs" / "actor" / "dense-256@3.0.json").unlink()
    found = what_pays(tmp_path)
    assert [*found] == ["packages-a_tenth", "cora", "molesol"]  # actor is not finished
    assert found["cora"].wider.mean == pytest.approx(25)
    assert found["cora"].experts.mean == pytest.approx(10)
    assert found["molesol"].experts.mean == pytest.approx(25)
    assert part_of_width(found) is None
    assert pays_table(found).endswith("Fewer than three graphs are finished.")


def test_the_part_of_width_is_a_slope_over_graphs_that_are_not_made_of_others() -> None:
    def pays(wider: float, experts: float) -> Pays:
        return Pays(wider=Difference.of([wider] * 2), experts=Difference.of([experts] * 2))

    found = {"a": pays(1, 1), "b": pays(2, 0.5), "c": pays(2, 1), "packages-x": pays(9, 9)}
    part = part_of_width(found)
    assert part is not None
    assert part.mean == pytest.approx((1 + 1 + 2) / 9)
    left = [1 - 4 / 9, 0.5 - 8 / 9, 1 - 8 / 9]
    error = math.sqrt(sum(one**2 for one in left) / 2 / 9)
    assert part.high - part.mean == pytest.approx(4.302653 * error)
    assert pays_table(found).endswith("of what four times the width gains, 3 graphs.")
    shown = plots.draw_scatter(found, THEMES[0]).axes[0]
    assert [text.get_text() for text in shown.texts] == [*found]
