"""Where width pays: dense models and experts at several widths, by what they cost.

``results/width`` holds a file a graph and model, and prices; ``docs/lab/width.md`` has the tables
and the rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

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
CONTROLS = {
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


def draw(front: Front, theme: Theme) -> Figure:
    """A line of panels a graph, a panel a cost that is known."""
    known = {cost for cells in front.values() for cost in compared_costs(cells)}
    panels = [(column, cost) for column in front for cost in COSTS if cost in known]
    across = len(known) if len(front) > 1 else min(len(known), 3)
    lines = -(-len(panels) // across)
    figure = Figure(figsize=(2.9 * across, 0.9 + 2.7 * lines))
    axes = list(figure.subplots(lines, across, sharey="row", squeeze=False).flat)
    for axis, (column, cost) in zip(axes, panels, strict=False):
        _draw_panel(axis, front[column], cost, theme)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, (column, _) in list(zip(axes, panels, strict=False))[::across]:
        axis.set_ylabel(f"{column}: points above dense, 64")
    legend_above(figure, *axes, columns=3)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.8 / figure.get_figheight()))
    return figure


def _draw_panel(axis: Axes, cells: Cells, cost: str, theme: Theme) -> None:
    """Two curves; experts are filled where they win, by the rule; other models are marks."""
    for kind, color in (("dense", theme.gray), ("experts", theme.blue)):
        best = [at_best_step(cells, row) for row in curve(cells, kind)]
        models = [model for model in best if cost in model["costs"]]
        gains = [difference(model, cells[BASE]) for model in models]
        places = [model["costs"][cost] for model in models]
        axis.plot(places, [gain.mean for gain in gains if gain], color=color, linewidth=1.2)
        for model in models:
            won = kind == "experts" and _wins(model, cells, cost)
            label = {"dense": "dense", "experts": f"experts, {'win' if won else 'do not'}"}[kind]
            face = color if won or kind == "dense" else "none"
            _mark(axis, cells, model, cost, color, "o", face, label)
    for row, marker in CONTROLS.items():
        if cost in cells.get(row, {}).get("costs", {}):
            model = cells[row]
            _mark(axis, cells, model, cost, theme.orange, marker, "none", model["label"])
    axis.axhline(0, color=theme.gray, linewidth=0.6, zorder=0)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel(COSTS[cost][0])


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
    """The front of the first graph, and of all, and the scatter of graphs: what is finished."""
    front = shown(read_front(results / "width"))
    drawn = []
    first = dict(list(front.items())[:1])
    for name, part in {"width": first, "width-all": front}.items():
        if part:
            drawn.append(_drawing(name, part))
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


def _drawing(name: str, front: Front) -> Drawing:
    said = [f"On {column}, {'; '.join(verdicts(cells))}" for column, cells in front.items()]
    about = "Points above a dense model 64 wide, with paired 95 % intervals, at each cost"
    alt = f"{'. '.join([about, *said])}."
    return Drawing(
        name, numbers(front), alt, lambda theme: draw(front, theme), is_wide=name == "width-all"
    )
