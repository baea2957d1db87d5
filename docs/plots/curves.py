"""Test scores over active FLOPs: a panel a data set, a line a model, a point a width.

``results/curves/COLUMN/MODEL-WIDTH.json`` holds a point; ``docs/lab/starts.md`` has the table. A
point of a MoE says something for experts where it lies above the *dense curve*: above what a dense
model of the same FLOPs reaches by width alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, TypeAlias

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from docs.plots.results import mean_std, read_starts
from docs.plots.style import Drawing, Theme, legend_above

NAMES = {
    "dense": "dense",
    "shared": "experts beside a shared one",
    "copies": "copies that share nothing",
    "differences": "copies that share a base (default)",
}
MARKERS = {"dense": "D", "shared": "s", "copies": "o", "differences": "^"}


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


Lines: TypeAlias = dict[str, dict[str, list[Point]]]
"""By column and model, the points."""


def curves(results: Mapping[str, Mapping[str, Any]]) -> Lines:
    """By column and model the finished points, cheapest first."""
    by_column: Lines = {}
    for column, known in results.items():
        lines: dict[str, list[Point]] = {}
        for name, summary in known.items():
            model, _, width = name.rpartition("-")
            scores = tuple(100 * value for value in summary["test"]["values"])
            lines.setdefault(model, []).append(Point(int(width), summary["flops"], scores))
        by_column[column] = {
            model: sorted(lines[model], key=lambda point: point.flops)
            for model in NAMES
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


def numbers(found: Lines) -> str:
    """Whatever is drawn, as text."""
    lines = []
    for column, models in found.items():
        for model, points in models.items():
            shown = (f"{point.flops / 1e6:.1f} {mean_std(point.scores)}" for point in points)
            lines.append(f"{column} {model}: {', '.join(shown)}")
    return "\n".join(lines)


def draw_panel(axis: Axes, column: str, models: dict[str, list[Point]], theme: Theme) -> None:
    """The lines of one data set; a bar is one standard deviation to either side."""
    colors = {
        "dense": theme.gray,
        "shared": theme.orange,
        "copies": theme.violet,
        "differences": theme.blue,
    }
    for model, points in models.items():
        axis.errorbar(
            [point.flops / 1e6 for point in points],
            [point.mean for point in points],
            yerr=[stdev(point.scores) for point in points],
            fmt=f"{MARKERS[model]}-",
            color=colors[model],
            markersize=5,
            linewidth=1.4,
            elinewidth=1.2,
            label=NAMES[model],
        )
    axis.set_xscale("log")
    costs = [point.flops for points in models.values() for point in points]
    # The powers of two, where there are some: an octave is a doubling of the FLOPs.
    is_wide = max(costs) > 4 * min(costs)
    axis.xaxis.set_major_locator(LogLocator(base=2, numticks=6) if is_wide else MaxNLocator(4))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.minorticks_off()
    axis.grid(color=theme.gray, alpha=0.25, linewidth=0.6)
    axis.set_title(column, fontsize=11)
    axis.set_xlabel("active MFLOPs")
    axis.set_ylabel("test score (%)")


def draw(found: Lines, theme: Theme) -> Figure:
    """Two panels side by side at most, so that a phone can show them."""
    side_by_side = min(2, len(found))
    lines = -(-len(found) // side_by_side)
    figure = Figure(figsize=(5.4, 0.8 + 2.7 * lines))
    panels = list(figure.subplots(lines, side_by_side, squeeze=False).flat)
    for axis, (column, models) in zip(panels, found.items(), strict=False):
        draw_panel(axis, column, models, theme)
    for axis in panels[len(found) :]:
        axis.set_visible(False)
    fullest = max(range(len(found)), key=lambda number: len(list(found.values())[number]))
    legend_above(figure, panels[fullest], columns=2)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.55 / (0.8 + 2.7 * lines)))
    return figure


def said_of(column: str, models: dict[str, list[Point]]) -> str:
    """How far the points of the default lie above the dense curve, where it reaches."""
    dense = models.get("dense", [])
    above = [above_dense(point, dense) for point in models.get("differences", [])]
    known = [gain for gain in above if gain is not None]
    if not known:
        return f"{column} not known yet"
    ends = dict.fromkeys([f"{min(known):+.1f}", f"{max(known):+.1f}"])
    return f"{column} {' to '.join(ends)} points"


def drawings(results: Path) -> list[Drawing]:
    """One figure of all that is finished."""
    found = curves(read_starts(results / "curves"))
    said = "; ".join(said_of(column, models) for column, models in found.items())
    alt = (
        "Test score over active MFLOPs, a line a model, a point a width. Height of the default "
        f"over the curve of dense models: {said}."
    )
    return [Drawing("curves", numbers(found), alt, lambda theme: draw(found, theme))]
