"""Graphs on which nothing was chosen: does the recipe for your own graph gain there?

``python -m experiments.sweep unseen`` writes ``results/unseen/COLUMN/ARM.json``. Arms, splits and
rule were fixed before the first of these results:

- **Columns.** chameleon, filtered, and tolokers (`Platonov et al., 2023
  <https://arxiv.org/abs/2302.11640>`_), the ten splits of each: no default of the library was
  chosen on them. They were not unknown: runs outside this repository, three splits of tolokers and
  eight of chameleon, were seen before, and are the reason to ask.
- **Recipe.** That of ``python -m experiments.train graph --data-root FILE.npz``, 16 wide and
  evaluated every fifth epoch as the column facebook of :mod:`experiments.study.starts`; tolokers
  by ROC AUC, as its paper. Nothing is tuned for an arm or for a column.
- **Arms.** The dense model; dense of the experts' active FLOPs; a frozen random router in the shape
  of the experts; the experts of the default.
- **Rule.** Validation selects the epoch, and the test set is read once. A *gain*: the paired 95 %
  interval of experts minus dense lies wholly above 0, and its mean is at least :data:`LEAST`. A
  *loss*: the interval lies wholly below 0. Else the two are *not told apart*. A gain is earned by
  experts if the interval against dense of equal FLOPs lies above 0, too, and by the router if that
  against the random router does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.show.tables import markdown
from experiments.study.starts import differences
from experiments.train.checks import check_choice
from experiments.train.config import GraphConfig
from experiments.train.presets import GRAPH
from experiments.train.scores import interval, percent

SPLITS = tuple(range(10))

LEAST = 0.3
"""Points: a smaller mean difference is no gain."""

BASE = replace(GRAPH, hidden=16, eval_every=5, seeds=SPLITS)

COLUMNS: dict[str, GraphConfig] = {
    "chameleon": replace(BASE, data_root=Path("chameleon_filtered.npz")),
    "tolokers": replace(BASE, data_root=Path("tolokers.npz"), metric="roc_auc"),
}
"""The configuration of each column; files are inside the data root of the command line."""

ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {"router": "dense"}),
    "experts": ("experts, the default", {}),
    "random": (
        "experts, frozen random router",
        {"router": "random", "start": "copies", "shared_router": True},
    ),
    "dense-flops": ("dense, equal FLOPs", {"router": "dense", "equal": "flops"}),
}
"""Each arm's line in the table, and what it changes."""


def runs(columns: Sequence[str], root: Path) -> dict[str, GraphConfig]:
    """The runs of some columns, all where none are named: ``COLUMN/ARM`` and configuration."""
    found = {}
    for column in columns or COLUMNS:
        check_choice("columns", column, COLUMNS)
        base = replace(COLUMNS[column], data_root=root / COLUMNS[column].data_root)
        for arm, (_, changes) in ARMS.items():
            found[f"{column}/{arm}"] = replace(base, **changes)
    return found


def verdict(values: Sequence[float]) -> str:
    """What the rule says of differences, experts minus dense, split by split."""
    low, high = interval(values)
    if high < 0:
        return "loss"
    return "gain" if low > 0 and fmean(values) >= LEAST else "not told apart"


def with_interval(values: Sequence[float]) -> str:
    """The mean of differences, and its interval."""
    low, high = interval(values)
    return f"{fmean(values):+.2f} ({low:+.2f} to {high:+.2f})"


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """In Markdown: a line an arm, beside the dense model, and the experts beside it."""
    lines = []
    for column, known in results.items():
        for arm, (label, _) in ARMS.items():
            if arm not in known or "dense" not in known:
                continue
            summary = known[arm]
            line = {
                "graph": column,
                "arm": label,
                "metric": summary["metric"],
                "test (%)": percent(summary["test"]),
                "n": str(summary["test"]["n"]),
                "× FLOPs": f"{summary['flops'] / known['dense']['flops']:.2f}",
                **dict.fromkeys(("− dense", "better in", "− dense, validation"), "–"),
                "experts − this": "–",
                "verdict": "–",
            }
            if arm != "dense":
                values = differences(known, arm, "dense", "test")
                line["− dense"] = with_interval(values)
                line["better in"] = f"{sum(value > 0 for value in values)} of {len(values)}"
                in_validation = differences(known, arm, "dense", "val")
                line["− dense, validation"] = with_interval(in_validation)
                if arm == "experts":
                    line["verdict"] = verdict(values)
                elif "experts" in known:
                    beside = differences(known, "experts", arm, "test")
                    line["experts − this"] = with_interval(beside)
            lines.append(line)
    return markdown(lines, left=("arm", "metric", "verdict")) if lines else "no arm is finished yet"
