"""Test scores over active FLOPs: a panel a data set, a line a model, a point a width.

``results/curves`` holds a file a data set, model and width; ``docs/lab/starts.md`` has the table.
"""

from __future__ import annotations

from pathlib import Path
from statistics import stdev
from typing import TypeAlias

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from docs.plots.results import Point, above_dense, curves, mean_std, read_results
from docs.plots.style import Drawing, Theme, legend_above

NAMES = {
    "dense": "dense",
    "shared": "experts beside a shared one",
    "copies": "copies that share nothing",
    "differences": "copies that share a base (default)",
}
MARKERS = {"dense": "D", "shared": "s", "copies": "o", "differences": "^"}

Lines: TypeAlias = dict[str, dict[str, list[Point]]]
"""By column and model, the points."""


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
    found = curves(read_results(results / "curves"))
    said = "; ".join(said_of(column, models) for column, models in found.items())
    alt = (
        "Test score over active MFLOPs, a line a model, a point a width. Height of the default "
        f"over the curve of dense models: {said}."
    )
    return [Drawing("curves", numbers(found), alt, lambda theme: draw(found, theme))]
