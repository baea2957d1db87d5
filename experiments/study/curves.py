"""Test scores over active FLOPs: dense models and two shapes of experts at several widths.

``python -m experiments.sweep curves`` writes ``results/curves/COLUMN/MODEL-WIDTH.json``. A point of
a MoE says something for experts where it lies above the *dense curve*: above what a dense model of
the same FLOPs reaches by width alone. Columns and recipes are those of :mod:`experiments.study.starts`.
``differences`` are the library's default; on mosaic the results also hold ``copies`` that share no
base, see there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import log
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.show.tables import markdown
from experiments.study.starts import COLUMNS, model
from experiments.train.config import RunConfig
from experiments.train.scores import mean_std

SEEDS = (0, 1, 2)

DRAWN = ("mosaic", "minesweeper", "facebook", "digits")
"""The columns of the study that have curves."""

MODELS = {
    "dense": "dense",
    "shared": "shared",
    "differences": "difference-once-node-constant-unbalanced",
}
"""The lines of a column, and what they are called in the study."""

WIDTHS: dict[str, tuple[int, ...]] = {
    # A shared expert doubles the FLOPs: one dense point lies where the widest MoE does.
    "dense": (8, 16, 32, 64, 96),
    "shared": (8, 16, 32, 64),
    "copies": (8, 16, 32, 64),
    "differences": (8, 16, 32, 64),
}
"""The widths of the hidden layers (of a ViT: of its MLPs), by model."""


def points(columns: Sequence[str], root: Path) -> dict[str, RunConfig]:
    """The runs of some columns, all where none are named: ``COLUMN/MODEL-WIDTH`` and configuration.

    Raises:
        ValueError: a column that has no curves.
    """
    if unknown := [name for name in columns if name not in DRAWN]:
        expected = ", ".join(DRAWN)
        raise ValueError(f"columns: got {', '.join(unknown)}, expected some of {expected}")
    found = {}
    for column in columns or DRAWN:
        base = replace(COLUMNS[column], seeds=SEEDS, data_root=root / COLUMNS[column].data_root)
        for line, name in MODELS.items():
            config = model(name, base)
            for width in WIDTHS[line]:
                found[f"{column}/{line}-{width}"] = replace(config, hidden=width)
    return found


@dataclass(frozen=True)
class Point:
    """One model of one width: active FLOPs of a forward, and test scores in percent by seed."""

    width: int
    flops: int
    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Of the scores."""
        return fmean(self.scores)


def curves(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, list[Point]]]:
    """By column and model the finished points, cheapest first."""
    found: dict[str, dict[str, list[Point]]] = {}
    for column, known in results.items():
        lines: dict[str, list[Point]] = {}
        for name, summary in known.items():
            model, _, width = name.rpartition("-")
            scores = tuple(100 * value for value in summary["test"]["values"])
            lines.setdefault(model, []).append(Point(int(width), summary["flops"], scores))
        found[column] = {
            model: sorted(lines[model], key=lambda point: point.flops)
            for model in WIDTHS
            if model in lines
        }
    return found


def above_dense(point: Point, dense: Sequence[Point]) -> float | None:
    """Points above the dense curve, which is straight between its points over the log of FLOPs.

    ``None`` where the curve does not reach.
    """
    for left, right in pairwise(dense):
        if left.flops <= point.flops <= right.flops:
            share = log(point.flops / left.flops) / log(right.flops / left.flops)
            return point.mean - (left.mean + share * (right.mean - left.mean))
    return None


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """In Markdown: a line a point, and how far it lies above the dense curve."""
    found = []
    for column, lines in curves(results).items():
        for name, line in lines.items():
            for point in line:
                gain = above_dense(point, lines.get("dense", [])) if name != "dense" else None
                found.append(
                    {
                        "column": column,
                        "model": f"{name}, {point.width} wide",
                        "MFLOPs": f"{point.flops / 1e6:.0f}",
                        "test": mean_std(point.scores),
                        "above the dense curve": "–" if gain is None else f"{gain:+.2f}",
                    }
                )
    return markdown(found, left=("model",)) if found else "no point is finished yet"
