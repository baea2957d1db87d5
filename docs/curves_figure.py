"""Draw test scores over active FLOPs: ``python -m docs.curves_figure``.

It writes ``docs/figures/curves-light.png`` and ``docs/figures/curves-dark.png`` from
``results/curves``: a panel a data set, a line a model, a point a width. A bar is one sample
standard deviation over three seeds to either side.
"""

from __future__ import annotations

from pathlib import Path
from statistics import stdev
from typing import Any, TypeAlias

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from docs.router_figure import FIGURES, ROOT, drawn_in
from experiments.study.curves import Point, curves
from experiments.study.starts import read_results
from experiments.train.scores import mean_std

NAMES = {
    "dense": "dense",
    "shared": "beside a shared expert",
    "copies": "copies that share nothing",
    "differences": "copies that share a base, routed once (default)",
}
MARKERS = {"dense": "D", "shared": "s", "copies": "o", "differences": "^"}
THEMES = {
    # the text's color, and one color a model
    "light": (
        "#24292f",
        {"dense": "#6e7781", "shared": "#bc4c00", "copies": "#0969da", "differences": "#1a7f37"},
    ),
    "dark": (
        "#e6edf3",
        {"dense": "#8b949e", "shared": "#f0883e", "copies": "#58a6ff", "differences": "#3fb950"},
    ),
}

Lines: TypeAlias = dict[str, dict[str, list[Point]]]
"""By column and model, the points."""


def description(found: Lines) -> str:
    """The drawn numbers as text. The files hold it, so that a test can tell an old one."""
    lines = []
    for column, models in found.items():
        for model, points in models.items():
            shown = (f"{point.flops / 1e6:.1f} {mean_std(point.scores)}" for point in points)
            lines.append(f"{column} {model}: {', '.join(shown)}")
    return "\n".join(lines)


def draw_panel(axis: Axes, column: str, models: dict[str, list[Point]], colors: Any) -> None:
    """Lines of one data set."""
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
    # The powers of two: an octave is a doubling of the FLOPs.
    axis.xaxis.set_major_locator(LogLocator(base=2, numticks=5))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.minorticks_off()
    axis.set_title(column, fontsize=11)
    axis.set_xlabel("MFLOPs")
    axis.spines[["top", "right"]].set_visible(False)


def draw(found: Lines, theme: str, path: Path) -> None:
    """One file, for a light or a dark page."""
    ink, colors = THEMES[theme]
    with drawn_in(ink):
        figure = Figure(figsize=(4 + 2.6 * len(found), 3.8))
        panels = figure.subplots(1, len(found), squeeze=False)[0]
        for axis, (column, models) in zip(panels, found.items(), strict=True):
            draw_panel(axis, column, models, colors)
        panels[0].set_ylabel("test score (%)")
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="upper center", ncols=2, fontsize=9, frameon=False)
        figure.tight_layout(rect=(0, 0, 1, 0.87))
        note = {"Description": description(found)}
        figure.savefig(path, dpi=110, transparent=True, metadata=note)


def main(folder: Path = FIGURES) -> None:
    """Draw both files."""
    found = curves(read_results(ROOT / "results" / "curves"))
    for theme in THEMES:
        draw(found, theme, folder / f"curves-{theme}.png")


if __name__ == "__main__":
    main()
