"""Test scores over active FLOPs: dense models and two shapes of experts at several widths.

``results/curves/COLUMN/MODEL-WIDTH.json`` holds a point. A point of a MoE says something for
experts where it lies above the *dense curve*: above what a dense model of the same FLOPs reaches
by width alone. ``differences`` are the library's default; on mosaic the results also hold
``copies`` that share no base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log
from statistics import fmean
from typing import Any

from experiments.show.tables import markdown
from experiments.train.scores import mean_std

MODELS = ("dense", "shared", "copies", "differences")
"""The lines of a column, in the order of the table."""


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
    by_column: dict[str, dict[str, list[Point]]] = {}
    for column, known in results.items():
        lines: dict[str, list[Point]] = {}
        for name, summary in known.items():
            model, _, width = name.rpartition("-")
            scores = tuple(100 * value for value in summary["test"]["values"])
            lines.setdefault(model, []).append(Point(int(width), summary["flops"], scores))
        by_column[column] = {
            model: sorted(lines[model], key=lambda point: point.flops)
            for model in MODELS
            if model in lines
        }
    return by_column


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
    rows = []
    for column, lines in curves(results).items():
        for name, line in lines.items():
            for point in line:
                gain = above_dense(point, lines.get("dense", [])) if name != "dense" else None
                rows.append(
                    {
                        "column": column,
                        "model": f"{name}, {point.width} wide",
                        "MFLOPs": f"{point.flops / 1e6:.0f}",
                        "test": mean_std(point.scores),
                        "above the dense curve": "–" if gain is None else f"{gain:+.2f}",
                    }
                )
    return markdown(rows, left=("model",)) if rows else "no point is finished yet"
