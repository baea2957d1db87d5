"""When experts pay, on planted graphs: points above equal FLOPs, by how regimes show.

``results/regime-map-concept.json`` holds the runs; ``docs/lab/regime-map.md`` has the table.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from docs.plots.results import read_file
from docs.plots.style import Drawing, Theme, legend_above

PLACES = ((4, 512), (8, 512), (4, 128))
"""Numbers of regimes, and training labels in each."""
WAYS = ("features", "communities", "patches", "nothing")
"""How a regime shows."""
MODELS = {
    "reverse": "dense, reverse edges",
    "told": "dense, told the regime",
    "experts": "experts (default)",
    "oracle": "experts, told the regime",
}
"""The models that are drawn, and what each is called."""
MARKERS = {"reverse": "v", "told": "s", "experts": "o", "oracle": "x"}
AXES = ("regimes", "labels", "shown", "model")

Found: TypeAlias = dict[tuple[Any, ...], list[float]]
"""By number of regimes, labels, way to show and model: points above equal FLOPs, by seed."""


def finished(path: Path) -> Found:
    """What is drawn of what is finished."""
    places = read_file(path)["places"]
    tests = {tuple(entry[axis] for axis in AXES): entry["test"] for entry in places}
    dense = {key[:-1]: test for key, test in tests.items() if key[-1] == "dense-flops"}
    return {
        key: [100 * (ours - theirs) for ours, theirs in zip(test, dense[key[:-1]], strict=True)]
        for key, test in tests.items()
        if key[-1] in MODELS and key[:-1] in dense
    }


def numbers(found: Found) -> str:
    """Whatever is drawn, as text."""
    lines = []
    for (regimes, labels), way, model in product(PLACES, WAYS, MARKERS):
        values = found.get((regimes, labels, way, model), [])
        if values:
            drawn = " ".join(f"{value:+.1f}" for value in values)
            lines.append(f"{regimes} {labels} {way} {model}: {drawn}")
    return "\n".join(lines)


def draw_panel(axis: Axes, found: Found, place: tuple[int, int], theme: Theme) -> None:
    """One number of regimes and labels: a column a way to show, a mark a seed."""
    colors = (theme.gray, theme.green, theme.blue, theme.orange)
    for (number, (model, marker)), color in zip(enumerate(MARKERS.items()), colors, strict=True):
        points = [
            (column + 0.16 * (number - 1.5), value)
            for column, way in enumerate(WAYS)
            for value in found.get((*place, way, model), [])
        ]
        if points:
            label = MODELS[model]
            axis.plot(*zip(*points, strict=True), marker, color=color, markersize=5, label=label)
    axis.axhline(0, color=theme.gray, linewidth=1)
    axis.set_xticks(range(len(WAYS)), WAYS)
    axis.set_xlim(-0.5, len(WAYS) - 0.5)
    axis.set_title(f"{place[0]} regimes, {place[1]} labels in each", fontsize=10)


def draw(found: Found, theme: Theme) -> Figure:
    """A panel a place that is finished."""
    places = [place for place in PLACES if any(key[:2] == place for key in found)]
    figure = Figure(figsize=(9.6, 0.6 + 3.0 * len(places)))
    panels = figure.subplots(len(places), 1, sharex=True, squeeze=False)[:, 0]
    for axis, place in zip(panels, places, strict=True):
        draw_panel(axis, found, place, theme)
    figure.supxlabel("where the regime shows", fontsize=10)
    figure.supylabel("points above a dense model of equal FLOPs", fontsize=10)
    legend_above(figure, panels[0], columns=len(MARKERS))
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    return figure


def drawings(results: Path) -> list[Drawing]:
    """One figure."""
    found = finished(results / "regime-map-concept.json")
    most = {
        model: max(fmean(values) for key, values in found.items() if key[-1] == model)
        for model in MARKERS
    }
    alt = (
        "Points above a dense model of equal FLOPs, by where regimes show. At most: experts "
        f"{most['experts']:+.1f}, experts that are told the regime {most['oracle']:+.1f}, a dense "
        f"model that is told it {most['told']:+.1f}, one with reverse edges {most['reverse']:+.1f}."
    )
    return [
        Drawing("regime-map", numbers(found), alt, lambda theme: draw(found, theme), is_wide=True)
    ]
