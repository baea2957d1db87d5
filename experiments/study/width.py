"""Where width pays: dense models and experts at several widths on large graphs of texts.

    python -m experiments.convert packages available --out data/packages.npz
    python -m experiments.sweep experiments.study.width:RATES
    python -m experiments.sweep width --columns packages --price
    python -m experiments.sweep width --columns arxiv --price
    python -m experiments.sweep experiments.study.width:GRAPHS --price
    python -m experiments.sweep experiments.study.width:VARIANTS --price

``RATES`` chooses the step size of each arm by validation, on two splits of ``packages``. ``WIDTH``
has the arms whose step size is chosen, on ``packages``, where all choices were made, and on the
graphs that confirm. The rule: experts win at a cost where the dense curve, interpolated in the
logarithm of the cost, is below by a paired 95 % interval.

``GRAPHS`` and ``VARIANTS`` ask what the gain of experts hangs on: what four times the width gains.
On smaller graphs validation chooses the step size of each arm again; packages with fewer labels,
classes or features take those of packages. Files are ``data/NAME.npz``, and PyG's raw ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from experiments.show.cells import read_cells
from experiments.study.studies import Row, Study
from experiments.train.config import RunConfig
from experiments.train.files import RESULTS
from experiments.train.presets import GRAPH, MOLECULES, PRESETS

COLUMNS = ("packages", "synsets", "definitions")
"""Graphs; on the first all choices are made."""
OGB = {"arxiv": "ogbn-arxiv", "products": "ogbn-products"}
"""Columns for whoever has OGB's data, in the recipes of OGB's examples."""
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
        "experts-64-lr1": Arm("experts, dense's step size", {}, TEN, "dense-64"),
        "input-again-64": Arm("dense, layers see the input", {**dense, "input_again": True}, TEN),
        "flops-64": Arm("dense, equal FLOPs", {**dense, "equal": "flops"}, TEN, "dense-64"),
        "random-64": Arm("frozen random router", {"router": "random"}, TEN),
        "one-expert-64": Arm("one expert", {"experts": 1}, FIVE, "experts-64"),
        "top-2-64": Arm("experts, K = 2", {"k": 2}, FIVE, "experts-64"),
        "e32-64": Arm("experts, E = 32", {"experts": 32}, FIVE, "experts-64"),
        "dense-400": Arm("dense, equal parameters", {**dense, "hidden": 400}, FIVE, "dense-256"),
    }


ARMS = _arms()


PAIR = ("dense-64", "dense-256", "experts-64")
"""The arms that say what four times the width gains, and what experts gain."""


def rate_rows(arms: Iterable[str] = ARMS, seeds: tuple[int, ...] = TWO) -> dict[str, Row]:
    """Each of some arms that has a step size of its own, at each of them."""
    return {
        f"{name}@{factor}": Row(
            label=f"{ARMS[name].label}, {factor:g} x the step size",
            changes={**ARMS[name].changes, "seeds": seeds},
            lr_factor=factor,
        )
        for name in arms
        if ARMS[name].rate_of is None
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


def _columns(**presets: str) -> dict[str, Any]:
    data = Path("data")
    return {column: replace(PRESETS[name][1], data_root=data) for column, name in presets.items()}


RATES = Study(
    name="width-rates",
    about="The step size of each arm, by validation on two splits of packages.",
    columns=_columns(packages="packages"),
    rows=rate_rows(),
)


@dataclass(frozen=True, kw_only=True)
class WidthStudy(Study):
    """Arms on whole graphs, and on products, whose neighbors are sampled."""

    def config(self, column: str, row: str) -> RunConfig | None:
        """The configuration of a cell; ``None`` where layers would see a sampled input again."""
        is_input_again = "input_again" in self.rows[row].changes
        return None if column == "products" and is_input_again else super().config(column, row)


ROWS = width_rows(chosen_factors(RESULTS / RATES.name))
WIDTH = WidthStudy(
    name="width",
    about="Width and experts at costs; all was chosen on packages, by validation.",
    columns=_columns(**{name: name for name in COLUMNS}, **OGB),
    rows=ROWS,
    controls=tuple(name for name in ("dense-64",) if name in ROWS),
)


def _graphs() -> dict[str, Any]:
    """Smaller graphs in the recipe of a graph of one's own, and molecules in OGB's; cheap ones
    first."""
    data = Path("data")
    metrics: dict[str, Any] = {"facebook": None, "tolokers": "roc_auc", "actor": None}
    columns: dict[str, Any] = {}
    for name in ("digits-graph", "minesweeper", "chameleon-filtered", "cora"):
        columns[name] = replace(GRAPH, dataset=name, data_root=data)
    for name in ("molfreesolv", "molesol"):
        columns[name] = replace(MOLECULES, dataset=f"ogbg-{name}", data_root=data)
    for name, metric in metrics.items():
        columns[name] = replace(GRAPH, data_root=data / f"{name}.npz", metric=metric)
    columns["citeseer"] = replace(GRAPH, dataset="citeseer", data_root=data)
    return columns


GRAPHS = Study(
    name="width-graphs",
    about="Four times the width, and experts, each at the step size that validation chooses.",
    columns=_graphs(),
    rows=rate_rows(PAIR, FIVE),
)
CHANGED = ("a_tenth", "a_third", "classes_25", "classes_10", "features_32")
"""Functions of :mod:`experiments.study.variants`."""
VARIANTS = Study(
    name="width-variants",
    about="Packages with fewer labels, classes, or features; step sizes are those of packages.",
    columns={
        f"packages-{name}": replace(
            GRAPH, epochs=150, data=f"experiments.study.variants:{name}", data_root=Path("data")
        )
        for name in CHANGED
    },
    rows={
        name: replace(row, changes={**row.changes, "seeds": FIVE[:3]})
        for name, row in ROWS.items()
        if name in PAIR
    },
)
