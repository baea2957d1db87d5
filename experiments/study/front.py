"""What the study of width found: the accuracy of dense models and experts at a cost, and who wins.

Experts win at a cost where the dense curve, interpolated in the logarithm of the cost, is below
them by a paired 95 % interval. Pairs are splits that all of these models ran. Beyond the cheapest
and the most expensive dense model nothing is said. Cells that are missing are named.

A model that ran with two step sizes counts at the one that is better in validation on that graph.

What it hangs on, over graphs: the share of a dense model's errors that experts remove, beside the
share that four times the width removes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

import numpy as np

from experiments.show.cells import read_study
from experiments.show.tables import markdown
from experiments.study.width import ARMS, COLUMNS, FACTORS, PAIR
from experiments.train.config import ERRORS
from experiments.train.scores import Difference, gains, of_shared_seeds, scored, unit

Cell: TypeAlias = Mapping[str, Any]
Front: TypeAlias = dict[str, dict[str, dict[str, Any]]]
"""By column and row, the summary of a run; its ``costs`` are those of :data:`COSTS` that are
known."""

COSTS = {
    "flops": ("GFLOPs of a forward", 1e9),
    "step": ("CPU seconds of a step", 1),
    "inference": ("CPU seconds of inference", 1),
    "parameters": ("thousand parameters", 1e3),
    "memory": ("MiB in training", 2**20),
}
"""What a cost is called, and how many of it are one of its unit."""


OTHER_STEPS = {"dense-64": "dense-64-lr2", "experts-64": "experts-64-lr1"}
"""Rows of the same model at another step size than that which two splits of packages chose."""
BASE = "dense-64"
"""What scores are shown relative to, split by split: splits differ by more than models do."""


def read_front(folder: Path) -> Front:
    """The finished cells of the study in a folder; none if it was not begun."""
    if not (folder / "study.json").exists():
        return {}
    study = read_study(folder)
    prices = study["prices"]
    return {
        column: {
            row: dict(cell, costs=costs_of(cell, prices.get(f"{column}/{row}", {})))
            for row, cell in cells.items()
        }
        for column, cells in study["cells"].items()
    }


def costs_of(cell: Cell, price: Mapping[str, float]) -> dict[str, float]:
    """FLOPs and parameters, which a run counts, and what ``--price`` measured, in units."""
    known = {**price, "flops": cell["flops"], "parameters": cell["parameters"]}
    return {name: known[name] / one for name, (_, one) in COSTS.items() if name in known}


def curve(cells: Mapping[str, Cell], kind: str) -> list[str]:
    """The rows of ``"dense"`` or ``"experts"`` that differ in nothing but width, by width."""
    found = [match for row in cells if (match := re.fullmatch(rf"{kind}-(\d+)", row))]
    return [match.string for match in sorted(found, key=lambda match: int(match[1]))]


def at_best_step(cells: Mapping[str, Cell], row: str) -> Cell:
    """A model at that one of its step sizes that is best in validation."""
    rows = (row, OTHER_STEPS.get(row, row))
    return best_of([cells[one] for one in rows if one in cells])


def best_of(cells: Sequence[Cell]) -> Cell:
    """The cell of the best validation."""
    best = min if cells[0]["metric"] in ERRORS else max
    return best(cells, key=lambda cell: float(cell["val"]["mean"]))


def difference(cell: Cell, other: Cell) -> Difference | None:
    """How much better a model is, split by split of those that both ran; ``None`` if there is no
    such split."""
    values = gains(cell["metric"], *of_shared_seeds(cell, other))
    return Difference.of(values) if values else None


def dense_at(cost: str, value: float, cells: Mapping[str, Cell]) -> Cell | None:
    """The dense curve at a cost, as a summary: between two models, a share of each score.

    ``None`` where dense models are not on both sides.
    """
    dense = [at_best_step(cells, row) for row in curve(cells, "dense")]
    known = [cell for cell in dense if cost in cell["costs"]]
    below = [cell for cell in known if cell["costs"][cost] <= value]
    above = [cell for cell in known if cell["costs"][cost] >= value]
    if not below or not above:
        return None
    left = max(below, key=lambda cell: cell["costs"][cost])
    right = min(above, key=lambda cell: cell["costs"][cost])
    low, high = (cell["costs"][cost] for cell in (left, right))
    share = 0.0 if low == high else log(value / low) / log(high / low)
    ours, theirs = of_shared_seeds(left, right)
    seeds = [seed for seed in left["config"]["seeds"] if seed in right["config"]["seeds"]]
    values = [(1 - share) * one + share * other for one, other in zip(ours, theirs, strict=True)]
    return {"config": {"seeds": seeds}, "test": {"values": values}}


def over_dense(cell: Cell, cells: Mapping[str, Cell]) -> dict[str, Difference | None]:
    """By cost, a model minus the dense curve there; ``None`` where the curve does not reach."""
    found: dict[str, Difference | None] = {}
    for cost, value in cell["costs"].items():
        dense = dense_at(cost, value, cells)
        found[cost] = None if dense is None else difference(cell, dense)
    return found


def compared_costs(cells: Mapping[str, Cell]) -> list[str]:
    """The costs that two dense models or more have: of fewer there is no curve."""
    dense = [cells[row]["costs"] for row in curve(cells, "dense")]
    return [cost for cost in COSTS if sum(cost in costs for costs in dense) > 1]


def verdicts(cells: Mapping[str, Cell]) -> list[str]:
    """A clause a cost: at which widths experts win, and at which they do not."""
    rows = curve(cells, "experts")
    found = {row: over_dense(at_best_step(cells, row), cells) for row in rows}
    said = []
    for cost in compared_costs(cells):
        by_side: dict[str, list[str]] = {}
        for row in rows:
            if cost in found[row]:
                gain = found[row][cost]
                side = "outside the dense curve" if gain is None else SIDES[gain.side]
                by_side.setdefault(side, []).append(row.partition("-")[2])
        if by_side:
            parts = [f"{side} at {', '.join(widths)} wide" for side, widths in by_side.items()]
            said.append(f"by {COSTS[cost][0]}, experts {'; '.join(parts)}")
    return said


SIDES = {"above": "win", "level": "are level", "below": "lose"}


def missing(front: Front, column: str) -> list[str]:
    """The arms of which a column has no cell."""
    return [arm.label for name, arm in ARMS.items() if name not in front.get(column, {})]


def front_tables(front: Front) -> str:
    """Of each column two tables: scores and costs of all models, and all others beside the dense
    curve; then what is not finished."""
    tables = []
    for column in dict.fromkeys([*COLUMNS, *front]):
        cells = front.get(column, {})
        if cells:
            tables.append(markdown([_scores(column, cell, cells) for cell in cells.values()]))
        if rows := [row for row in cells if row not in curve(cells, "dense")]:
            tables.append(markdown([_beside(column, cells[row], cells) for row in rows]))
        if left := missing(front, column):
            what = "; ".join(left) if cells else "any model"
            tables.append(f"Not finished on {column}: {what}.")
    return "\n\n".join(tables)


def _scores(column: str, cell: Cell, cells: Mapping[str, Cell]) -> dict[str, str]:
    metric = cell["metric"]
    gain = difference(cell, cells[BASE]) if BASE in cells else None
    line = {column: cell["label"], f"test {metric}{unit(metric)}": scored(metric, cell["test"])}
    line["n"] = str(cell["test"]["n"])
    line["− dense, 64"] = "–" if gain is None or cell is cells[BASE] else f"{gain}, n = {gain.n}"
    for cost, (label, _) in COSTS.items():
        value = cell["costs"].get(cost)
        line[label] = "–" if value is None else f"{float(f'{value:.3g}'):,g}"
    return line


def _beside(column: str, cell: Cell, cells: Mapping[str, Cell]) -> dict[str, str]:
    """A line: minus the dense curve at each equal cost; in bold where it is below."""
    found = over_dense(cell, cells)
    line = {f"{column}, − the dense curve at equal": cell["label"]}
    for cost, (name, _) in COSTS.items():
        gain = found.get(cost)
        text = "–" if gain is None else f"{gain}, n = {gain.n}"
        line[name] = f"**{text}**" if gain is not None and gain.side == "above" else text
    return line


# What it hangs on ---------------------------------------------------------------------------------

STUDIES = ("width", "width-variants", "width-graphs")
"""Folders of results with the arms of :data:`~experiments.study.width.PAIR`."""
HELD_OUT = ("synsets", "definitions", "chameleon-filtered", "tolokers", "actor")
"""Graphs on which nothing was ever chosen."""


@dataclass(frozen=True, kw_only=True)
class Pays:
    """On a graph, the errors of a dense model that others of the same splits remove, in %."""

    wider: Difference
    """A dense model four times as wide."""
    experts: Difference
    """Experts of the same width."""


def what_pays(results: Path) -> dict[str, Pays]:
    """By graph, for those of which all three arms are finished."""
    found = {}
    for study in STUDIES:
        path = results / study / "study.json"
        columns = read_study(path.parent)["cells"] if path.exists() else {}
        for column, cells in columns.items():
            narrow, wide, experts = (chosen(cells, arm) for arm in PAIR)
            if narrow and wide and experts:
                found[column] = Pays(
                    wider=errors_removed(wide, narrow), experts=errors_removed(experts, narrow)
                )
    return found


def chosen(cells: Mapping[str, Cell], arm: str) -> Cell | None:
    """The cell of an arm, of all its step sizes the best in validation."""
    if arm in cells:
        return at_best_step(cells, arm)
    ran = [cells[row] for factor in FACTORS if (row := f"{arm}@{factor}") in cells]
    return best_of(ran) if len(ran) == len(FACTORS) else None


def errors_removed(cell: Cell, narrow: Cell) -> Difference:
    """How much smaller a model's errors are, in % of those of another, split by split."""
    metric = cell["metric"]
    ours, theirs = of_shared_seeds(cell, narrow)
    is_error = metric in ERRORS
    errors = fmean(theirs) if is_error else 1 - fmean(theirs)
    return Difference.of(
        [(100 if is_error else 1) * gain / errors for gain in gains(metric, ours, theirs)]
    )


def part_of_width(found: Mapping[str, Pays]) -> Difference | None:
    """What experts gain as a part of what width gains: the slope of a line through 0 over graphs.

    Variants of packages are not counted, since they are no graphs of their own; ``None`` for fewer
    than three graphs.
    """
    counted = [pays for column, pays in found.items() if not column.startswith("packages-")]
    if len(counted) < 3:
        return None
    wider = np.array([pays.wider.mean for pays in counted])
    experts = np.array([pays.experts.mean for pays in counted])
    squares = float(wider @ wider)
    slope = float(wider @ experts) / squares
    left = experts - slope * wider
    variance = float(left @ left) / (len(counted) - 1) / squares
    return Difference.around(slope, variance, len(counted))


def pays_table(found: Mapping[str, Pays]) -> str:
    """A line a graph, and the part over all."""
    lines = [
        {
            "errors removed, %": column if column not in HELD_OUT else f"{column}, held out",
            "four times the width": f"{pays.wider}, n = {pays.wider.n}",
            "experts": f"{pays.experts}, n = {pays.experts.n}",
        }
        for column, pays in found.items()
    ]
    part = part_of_width(found)
    said = "Fewer than three graphs are finished."
    if part is not None:
        said = (
            f"Experts have {part.text('.2f')} of what four times the width gains, {part.n} graphs."
        )
    return "\n\n".join([*([markdown(lines)] if lines else []), said])
