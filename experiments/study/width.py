"""Where width pays: dense models and experts at several widths on large graphs of texts.

    python -m experiments.convert packages available --out data/packages.npz
    python -m experiments.sweep experiments.study.width:RATES
    python -m experiments.sweep experiments.study.width:WIDTH --columns packages --price

``RATES`` chooses the step size of each arm by validation, on two splits of ``packages``. ``WIDTH``
has the arms whose step size is chosen, on ``packages``, where all choices were made, and on the
graphs that confirm. The rule: experts win at a cost where the dense curve, interpolated in the
logarithm of the cost, is below by a paired 95 % interval.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from experiments.show.cells import read_cells
from experiments.study.studies import Row, Study
from experiments.train.files import RESULTS
from experiments.train.presets import PRESETS

COLUMNS = ("packages", "synsets", "definitions")
"""Graphs; on the first all choices are made."""
WIDTHS = (16, 32, 64, 128, 256)
FACTORS = (0.3, 1.0, 3.0)
"""Of the recipe's step size, which is 0.01."""
TWO, FIVE, TEN = (tuple(range(n)) for n in (2, 5, 10))


@dataclass(frozen=True)
class Arm:
    """A model of the study."""

    label: str
    changes: Mapping[str, Any]
    seeds: tuple[int, ...] = FIVE
    rate_of: str | None = None
    """The arm whose step size it takes; by default it has its own."""
    lr_factor: float = field(default=1.0, kw_only=True)
    """By what that step size is multiplied, in a control."""


def _arms() -> dict[str, Arm]:
    arms = {}
    for width in WIDTHS:
        seeds = TEN if width == 64 else FIVE
        hidden = {"hidden": width}
        arms[f"dense-{width}"] = Arm(f"dense, {width}", {"router": "dense", **hidden}, seeds)
        arms[f"experts-{width}"] = Arm(f"experts, {width}", hidden, seeds)
    dense = {"router": "dense"}
    return arms | {
        "dense-64-lr2": Arm("dense, twice the step size", dense, TEN, "dense-64", lr_factor=2),
        "input-again-64": Arm("dense, layers see the input", {**dense, "input_again": True}, TEN),
        "flops-64": Arm("dense, equal FLOPs", {**dense, "equal": "flops"}, TEN, "dense-64"),
        "random-64": Arm("frozen random router", {"router": "random"}, TEN),
        "one-expert-64": Arm("one expert", {"experts": 1}, FIVE, "experts-64"),
        "top-2-64": Arm("experts, K = 2", {"k": 2}, FIVE, "experts-64"),
        "e32-64": Arm("experts, E = 32", {"experts": 32}, FIVE, "experts-64"),
        "dense-400": Arm("dense, equal parameters", {**dense, "hidden": 400}, FIVE, "dense-256"),
    }


ARMS = _arms()


def rate_rows() -> dict[str, Row]:
    """Each arm that has a step size of its own, at each of them."""
    return {
        f"{name}@{factor}": Row(
            label=f"{arm.label}, {factor:g} x the step size",
            changes={**arm.changes, "seeds": TWO},
            lr_factor=factor,
        )
        for name, arm in ARMS.items()
        if arm.rate_of is None
        for factor in FACTORS
    }


def chosen_factors(folder: Path) -> dict[str, float]:
    """By arm, the factor of the best validation, of arms that ran with all of them."""
    cells = read_cells(folder, COLUMNS[:1]).get(COLUMNS[0], {})
    chosen = {}
    for name in ARMS:
        ran = {factor: cells.get(f"{name}@{factor}") for factor in FACTORS}
        scores = {factor: cell["val"]["mean"] for factor, cell in ran.items() if cell}
        if len(scores) == len(FACTORS):
            chosen[name] = max(scores, key=lambda factor: scores[factor])
    return chosen


def width_rows(factors: Mapping[str, float]) -> dict[str, Row]:
    """The arms whose step size is chosen."""
    return {
        name: Row(
            label=arm.label,
            changes={**arm.changes, "seeds": arm.seeds},
            lr_factor=arm.lr_factor * factors[arm.rate_of or name],
        )
        for name, arm in ARMS.items()
        if (arm.rate_of or name) in factors
    }


def _columns(*names: str) -> dict[str, Any]:
    return {name: replace(PRESETS[name][1], data_root=Path("data")) for name in names}


RATES = Study(
    name="width-rates",
    about="The step size of each arm, by validation on two splits of packages.",
    columns=_columns(COLUMNS[0]),
    rows=rate_rows(),
)

ROWS = width_rows(chosen_factors(RESULTS / RATES.name))
WIDTH = Study(
    name="width",
    about="Width and experts at costs; all was chosen on packages, by validation.",
    columns=_columns(*COLUMNS),
    rows=ROWS,
    controls=tuple(name for name in ("dense-64",) if name in ROWS),
)
