"""When experts pay, on planted graphs: points above equal FLOPs over the number of regimes.

``results/regime-map.json`` holds the runs; ``docs/lab/regime-map.md`` has the table.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from docs.plots.results import LABELS, REGIMES, WAYS, WIDTHS, read_file, regime_gains
from docs.plots.style import Drawing, Theme, legend_above

STYLES = {"experts": "o-", "oracle": "x:"}
SHOWN_IN = {
    "features": "regime shows in features",
    "neighbors": "regime shows in neighbors",
    "nothing": "regime shows nowhere",
}

Means: TypeAlias = dict[tuple[Any, ...], float]
"""By number of regimes, labels, width, way to show and model: points above equal FLOPs."""


def means(path: Path) -> Means:
    """What is finished."""
    return {key: fmean(values) for key, values in regime_gains(read_file(path)).items()}


def numbers(found: Means) -> str:
    """Whatever is drawn, as text."""
    keys = product(WAYS, WIDTHS, LABELS, STYLES, REGIMES)
    lines = []
    for way, width, labels, model, regimes in keys:
        if (key := (regimes, labels, width, way, model)) in found:
            lines.append(f"{way} {width} {labels} {model} {regimes}: {found[key]:+.1f}")
    return "\n".join(lines)


def draw_panel(axis: Axes, found: Means, width: int, way: str, theme: Theme) -> None:
    """One width, and one place where a regime shows."""
    colors = (theme.blue, theme.orange, theme.green)
    for (number, labels), (model, style) in product(enumerate(LABELS), STYLES.items()):
        keys = [(count, labels, width, way, model) for count in REGIMES]
        line = [(key[0], found[key]) for key in keys if key in found]
        if line:
            label = f"{model}, {labels} labels a regime"
            axis.plot(*zip(*line, strict=True), style, color=colors[number], label=label)
    axis.axhline(0, color=theme.gray, linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set_xticks(REGIMES, [str(count) for count in REGIMES])
    axis.set_title(f"{SHOWN_IN[way]}, {width} wide", fontsize=10)


def draw(found: Means, theme: Theme) -> Figure:
    """A panel a width and way that regimes show."""
    figure = Figure(figsize=(9.6, 5.8))
    panels = figure.subplots(len(WIDTHS), len(WAYS), sharex=True, sharey=True, squeeze=False)
    for (row, width), (column, way) in product(enumerate(WIDTHS), enumerate(WAYS)):
        draw_panel(panels[row][column], found, width, way, theme)
    figure.supxlabel("regimes", fontsize=10)
    figure.supylabel("points above a dense model of equal FLOPs", fontsize=10)
    legend_above(figure, panels[0][0], columns=3)
    figure.tight_layout(rect=(0, 0, 1, 0.9))
    return figure


def drawings(results: Path) -> list[Drawing]:
    """One figure."""
    found = means(results / "regime-map.json")
    experts, told = (
        max(value for key, value in found.items() if key[-1] == model) for model in STYLES
    )
    alt = (
        "Points above a dense model of equal FLOPs over the number of regimes. Experts gain "
        f"{experts:.1f} points at most, experts that are told the regime up to {told:.1f}."
    )
    return [
        Drawing("regime-map", numbers(found), alt, lambda theme: draw(found, theme), is_wide=True)
    ]
