"""Routers beside a dense model of equal active FLOPs: three of them, and all rows of the table.

``results/routers`` holds a file a data set and row; ``docs/lab/routers.md`` has the table.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from docs.plots.results import ROWS, Difference, Gains, differences, numbers_of, read_table
from docs.plots.style import Drawing, Theme, by_verdict, difference_axis, dot, legend_above, rows

BASE = "dense-flops"
SHORT = {
    "token-choice": "token choice",
    "expert-choice": "expert choice",
    "random": "frozen random router",
}
"""The rows of the short figure, by name of their file."""
PANELS = 4
"""Data sets side by side in the long figure."""


def gains(folder: Path) -> Gains:
    """What is finished, in the order of the table."""
    found: Gains = {}
    for column, cells in read_table(folder).items():
        base = cells[BASE]
        known = {row: cell for row, cell in cells.items() if row != BASE}
        found[column] = {row: Difference.of(differences(cell, base)) for row, cell in known.items()}
    return found


def by_gain(found: Gains) -> Gains:
    """The columns, that of the largest gain of token choice first."""
    order = sorted(found, key=lambda column: -found[column]["token-choice"].mean)
    return {column: found[column] for column in order}


def draw_short(found: Gains, theme: Theme) -> Figure:
    """A line a data set, a dot a router."""
    figure = Figure(figsize=(5.4, 5))
    axis = figure.subplots()
    colors, markers = (theme.blue, theme.orange, theme.gray), ("o", "s", "v")
    for place, known in enumerate(found.values()):
        for number, (row, label) in enumerate(SHORT.items()):
            offset = 0.22 * (number - 1)
            dot(axis, place + offset, known[row], colors[number], markers[number], label=label)
    rows(axis, [f"{column}, n = {known['token-choice'].n}" for column, known in found.items()])
    difference_axis(axis, theme, "points above a dense model of equal active FLOPs")
    legend_above(figure, axis, columns=3)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    return figure


def kind_of(row: str, theme: Theme) -> tuple[str, str, str]:
    """The color, the marker and the name of the kind of a row."""
    if row.startswith("dense"):
        return theme.gray, "D", "dense"
    if row in ("random", "uniform", "oracle"):
        return theme.orange, "v", "without a learned router"
    return theme.blue, "o", "learned router"


def draw_long(found: Gains, theme: Theme) -> Figure:
    """A panel a data set, a line a row of the table."""
    shown = [row for row in ROWS if any(row in known for known in found.values())]
    lines = -(-len(found) // PANELS)
    figure = Figure(figsize=(10.5, 0.9 + 3.1 * lines))
    panels = list(figure.subplots(lines, PANELS, sharex=True, sharey=True, squeeze=False).flat)
    for axis, (column, known) in zip(panels, found.items(), strict=False):
        for place, row in enumerate(shown):
            if row in known:
                color, marker, name = kind_of(row, theme)
                dot(axis, place, known[row], color, marker, label=name)
        axis.set_title(f"{column}, n = {known['token-choice'].n}", fontsize=11)
    for axis in panels[len(found) :]:
        axis.set_visible(False)
    for axis in panels[max(len(found) - PANELS, 0) : len(found)]:
        axis.tick_params(labelbottom=True)  # also where nothing is below
    rows(panels[0], [ROWS[row].label for row in shown])
    for axis in panels:
        axis.spines["left"].set_visible(False)
        axis.tick_params(axis="y", length=0)
        difference_axis(axis, theme, "")
    figure.supxlabel("points above a dense model of equal active FLOPs", fontsize=11)
    legend_above(figure, panels[0], columns=3)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    return figure


def drawings(results: Path) -> list[Drawing]:
    """The short figure and the long one."""
    found = by_gain(gains(results / "routers"))
    short = {column: {row: known[row] for row in SHORT} for column, known in found.items()}
    said = []
    for row, label in SHORT.items():
        verdicts = by_verdict({column: known[row] for column, known in found.items()})
        said.append(f"{label.capitalize()}: {verdicts}")
    beside = "Points above a dense model of equal active FLOPs, with 95 % intervals, by data set."
    alt = f"{beside} {'. '.join(said)}."
    most = by_verdict({column: known["token-choice"] for column, known in found.items()})
    alt_long = f"{beside} All routers and controls; token choice is {most}."
    return [
        Drawing("routers", numbers_of(short), alt, lambda theme: draw_short(short, theme)),
        Drawing(
            "routers-all",
            numbers_of(found),
            alt_long,
            lambda theme: draw_long(found, theme),
            is_wide=True,
        ),
    ]
