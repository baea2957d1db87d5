"""Where width pays: dense models and experts at several widths, by what they cost.

``results/width`` holds a file a graph and model, and prices; ``docs/lab/width.md`` has the tables
and the rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, floor, log10
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from docs.plots.results import (
    BASE,
    COSTS,
    HELD_OUT,
    Front,
    Pays,
    at_best_step,
    compared_costs,
    curve,
    difference,
    over_dense,
    part_of_width,
    read_front,
    verdicts,
    what_pays,
)
from docs.plots.style import Drawing, Theme, legend_above

Cell: TypeAlias = Mapping[str, Any]
Cells: TypeAlias = Mapping[str, Cell]
"""The models of a graph, by row."""

NAMES = ("width", "width-all", "width-pays")
"""Of the figures; each is drawn when some of its results are there."""
SHORT = ("flops", "parameters")
"""The costs of README's figure: what experts save, and what they take."""
CONTROLS = {
    "flops-64": "<",
    "input-again-64": "^",
    "random-64": "s",
    "dense-64-lr2": "v",
    "one-expert-64": "P",
    "top-2-64": "X",
    "e32-64": "D",
}
"""The mark of each other model at 64."""


def shown(front: Front) -> Front:
    """The columns whose base is finished, with another width beside it: a curve."""
    return {
        column: cells
        for column, cells in front.items()
        if BASE in cells and len(curve(cells, "dense")) > 1
    }


def numbers(front: Front) -> str:
    """All that is drawn, as text: a line a model."""
    lines = []
    for column, cells in front.items():
        for row, cell in cells.items():
            costs = ", ".join(f"{name} {value:.3g}" for name, value in cell["costs"].items())
            lines.append(f"{column}: {row} {difference(cell, cells[BASE])}; {costs}")
    return "\n".join(lines)


def draw(front: Front, costs: Sequence[str], controls: Mapping[str, str], theme: Theme) -> Figure:
    """A panel a graph, side by side, and a line of them a cost.

    Args:
        front: graphs.
        costs: what is paid.
        controls: the mark of each other model that is drawn.
        theme: colors.
    """
    figure = Figure(figsize=(max(2.5 * len(front), 4.2), 0.7 + 2.2 * len(costs)))
    axes = figure.subplots(len(costs), len(front), sharey="col", squeeze=False)
    for line, cost in zip(axes, costs, strict=True):
        for axis, cells in zip(line, front.values(), strict=True):
            _draw_panel(axis, cells, cost, controls, theme)
    for axis, column in zip(axes[0], front, strict=True):
        axis.set_title(column, fontsize=10)
    for axis in axes[:, 0]:
        axis.set_ylabel("points above dense, 64")
    legend_above(figure, *axes.flat, columns=3)
    top = 0.3 if not controls else 0.95
    figure.tight_layout(rect=(0, 0, 1, 1 - top / figure.get_figheight()))
    return figure


def _draw_panel(
    axis: Axes, cells: Cells, cost: str, controls: Mapping[str, str], theme: Theme
) -> None:
    """Two curves; experts are filled where they win, by the rule; other models are marks."""
    for kind, color in (("dense", theme.gray), ("experts", theme.blue)):
        best = [at_best_step(cells, row) for row in curve(cells, kind)]
        models = [model for model in best if cost in model["costs"]]
        gains = [difference(model, cells[BASE]) for model in models]
        places = [model["costs"][cost] for model in models]
        axis.plot(places, [gain.mean for gain in gains if gain], color=color, linewidth=1.2)
        for model in models:
            won = kind == "experts" and _wins(model, cells, cost)
            label = {"dense": "dense", "experts": f"experts{', which win' if won else ''}"}[kind]
            face = color if won or kind == "dense" else "none"
            _mark(axis, cells, model, cost, color, "o", face, label)
    for row, marker in controls.items():
        if cost in cells.get(row, {}).get("costs", {}):
            model = cells[row]
            _mark(axis, cells, model, cost, theme.orange, marker, "none", model["label"])
    axis.axhline(0, color=theme.gray, linewidth=0.6, zorder=0)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(_ticks(*axis.get_xlim())))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel(COSTS[cost][0])


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers within the limits of a logarithmic axis: at most four, so that none overlap."""
    decades = range(floor(log10(low)), ceil(log10(high)))
    for parts in ((1, 1.5, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        ticks = [part * 10.0**decade for decade in decades for part in parts]
        within = [tick for tick in ticks if low <= tick <= high]
        if len(within) <= 4:
            return within
    return within


def _wins(model: Cell, cells: Cells, cost: str) -> bool:
    gain = over_dense(model, cells)[cost]
    return gain is not None and gain.side == "above"


def _mark(
    axis: Axes,
    cells: Cells,
    model: Cell,
    cost: str,
    color: str,
    marker: str,
    face: str,
    label: str,
) -> None:
    """A mean and its interval, at a cost."""
    gain = difference(model, cells[BASE])
    assert gain is not None  # both have the first splits
    axis.errorbar(
        model["costs"][cost],
        gain.mean,
        yerr=[[gain.mean - gain.low], [gain.high - gain.mean]],
        fmt=marker,
        color=color,
        markerfacecolor=face,
        markersize=5,
        elinewidth=1,
        label=label,
    )


def draw_scatter(found: Mapping[str, Pays], theme: Theme) -> Figure:
    """A dot a graph: what experts gain over what width gains; the line is their part of it."""
    figure = Figure(figsize=(5.4, 4.6))
    axis = figure.subplots()
    for column, pays in found.items():
        color, label = theme.blue, "known before"
        if column in HELD_OUT:
            color, label = theme.orange, "held out"
        elif column.startswith("packages-"):
            color, label = theme.gray, "packages, changed"
        wider, experts = pays.wider, pays.experts
        axis.errorbar(
            wider.mean,
            experts.mean,
            xerr=[[wider.mean - wider.low], [wider.high - wider.mean]],
            yerr=[[experts.mean - experts.low], [experts.high - experts.mean]],
            fmt="o",
            color=color,
            elinewidth=0.8,
            label=label,
        )
        place = (wider.mean, experts.mean)
        axis.annotate(column, place, (4, 4), textcoords="offset points", fontsize=9)
    part = part_of_width(found)
    if part is not None:
        ends = np.array([min(0.0, *(pays.wider.mean for pays in found.values())), 0.0])
        ends[1] = max(pays.wider.mean for pays in found.values())
        axis.plot(ends, part.mean * ends, color=theme.gray, linewidth=1.2)
        axis.fill_between(ends, part.low * ends, part.high * ends, color=theme.gray, alpha=0.2)
    axis.axhline(0, color=theme.gray, linewidth=0.6, zorder=0)
    axis.axvline(0, color=theme.gray, linewidth=0.6, zorder=0)
    axis.set_xlabel("errors that four times the width removes, %")
    axis.set_ylabel("errors that experts remove, %")
    legend_above(figure, axis, columns=3)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    return figure


def drawings(results: Path) -> list[Drawing]:
    """The front in short and with all costs, and the scatter of graphs: what is finished."""
    front = shown(read_front(results / "width"))
    drawn = []
    if front:
        known = {cost for cells in front.values() for cost in compared_costs(cells)}
        alt = _alt(front)
        text = numbers(front)
        every = [cost for cost in COSTS if cost in known]
        drawn = [
            Drawing("width", text, alt, lambda theme: draw(front, SHORT, {}, theme)),
            Drawing(
                "width-all",
                text,
                alt,
                lambda theme: draw(front, every, CONTROLS, theme),
                is_wide=True,
            ),
        ]
    found = what_pays(results)
    if found:
        text = "\n".join(
            f"{column}: wider {pays.wider}, experts {pays.experts}"
            for column, pays in found.items()
        )
        part_said = part_of_width(found)
        said = "." if part_said is None else f": the part {part_said.text('.2f')} over graphs."
        alt = f"Errors removed by experts over those removed by four times the width{said}"
        drawn.append(Drawing("width-pays", text, alt, lambda theme: draw_scatter(found, theme)))
    return drawn


def _alt(front: Front) -> str:
    """What the fronts show, as a sentence a graph."""
    said = [f"On {column}, {'; '.join(verdicts(cells))}" for column, cells in front.items()]
    about = "Points above a dense model 64 wide, with paired 95 % intervals, at each cost"
    return f"{'. '.join([about, *said])}."
