"""Draw the routers beside a dense model of equal FLOPs: ``python -m docs.router_figure``.

It writes ``docs/figures/routers-light.png`` and ``docs/figures/routers-dark.png`` from
``results/routers``. Each dot is a row of the table in ``docs/lab/routers.md``, each bar one sample
standard deviation of the differences, seed by seed, to either side.
"""

from __future__ import annotations

import statistics
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeAlias

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.study.routers import Cells, differences, read_cells
from experiments.train.scores import mean_std

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "docs" / "figures"

STYLE = {"token-choice": "o", "expert-choice": "s", "random": "x", "dense": "D"}
"""The rows that are drawn, by name of their file, and their markers."""
NAMES = {
    "token-choice": "token choice",
    "expert-choice": "expert choice",
    "random": "frozen random router",
    "dense": "dense, fewer FLOPs",
}
WIDE = "mosaic"
"""The column whose differences are ten times the others': it gets a panel of its own."""
THEMES = {
    # the text's color, and one color a row
    "light": ("#24292f", ("#0969da", "#bc4c00", "#6e7781", "#24292f")),
    "dark": ("#e6edf3", ("#58a6ff", "#f0883e", "#8b949e", "#e6edf3")),
}

Gains: TypeAlias = dict[str, dict[str, list[float]]]
"""By column and row of the table the differences to equal FLOPs, seed by seed, in points."""


def gains(cells: Cells) -> Gains:
    """What is drawn."""
    found: Gains = {}
    for column, rows in cells.items():
        base = rows["dense-flops"]
        found[column] = {row: differences(rows[row], base) for row in STYLE}
    return found


def description(found: Gains) -> str:
    """The drawn numbers as text. The files hold it, so that a test can tell an old one."""
    lines = []
    for column, rows in found.items():
        shown = (f"{row} {mean_std(values, '+.2f')}" for row, values in rows.items())
        lines.append(f"{column}: {', '.join(shown)}")
    return "\n".join(lines)


def draw_panel(axis: Axes, found: Gains, colors: tuple[str, ...]) -> None:
    """A column of the table is a group of four dots; 0 is the dense model of equal FLOPs."""
    axis.axhline(0, color="gray", linewidth=1)
    for place, rows in enumerate(found.values()):
        for number, (row, values) in enumerate(rows.items()):
            axis.errorbar(
                place + 0.19 * (number - 1.5),
                statistics.fmean(values),
                yerr=statistics.stdev(values),
                fmt=STYLE[row],
                color=colors[number],
                markersize=6,
                elinewidth=1.6,
                label=NAMES[row],
            )
    names = [f"{column}\nn = {len(rows['dense'])}" for column, rows in found.items()]
    axis.set_xticks(range(len(found)), names, fontsize=10)
    axis.set_xlim(-0.6, len(found) - 0.4)
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    axis.tick_params(axis="x", length=0)
    for line in range(1, len(found)):
        axis.axvline(line - 0.5, color="gray", linewidth=0.4, alpha=0.5)


def drawn_in(ink: str) -> AbstractContextManager[None]:
    """Inside, texts and axes have this color."""
    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    colored: dict[Any, Any] = dict.fromkeys(inks, ink)
    return rc_context(colored)


def draw(found: Gains, theme: str, path: Path) -> None:
    """One file, for a light or a dark page."""
    ink, colors = THEMES[theme]
    with drawn_in(ink):
        figure = Figure(figsize=(10, 3.6))
        left, right = figure.subplots(1, 2, width_ratios=[len(found) - 1, 1.25])
        draw_panel(left, {name: rows for name, rows in found.items() if name != WIDE}, colors)
        draw_panel(right, {WIDE: found[WIDE]}, colors)
        left.set_ylabel("points above a dense model\nof equal active FLOPs")
        right.set_title("another scale", fontsize=9)
        handles, names = right.get_legend_handles_labels()
        figure.legend(handles, names, loc="upper center", ncols=4, fontsize=10, frameon=False)
        figure.tight_layout(rect=(0, 0, 1, 0.93))
        note = {"Description": description(found)}
        figure.savefig(path, dpi=110, transparent=True, metadata=note)


def main(folder: Path = FIGURES) -> None:
    """Draw both files."""
    found = gains(read_cells(ROOT / "results" / "routers"))
    for theme in THEMES:
        draw(found, theme, folder / f"routers-{theme}.png")


if __name__ == "__main__":
    main()
