"""OGB's molecules beside published means, and the controls of two graphs.

``results/published-molecules`` and ``results/published-controls`` hold a file a data set and model;
``docs/lab/published.md`` has the tables.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from docs.plots import controls
from docs.plots.results import Difference, Gains, differences, numbers_of, read_published
from docs.plots.style import Drawing, Theme, by_verdict, dot, rows

ERROR_SETS = ("molfreesolv", "molesol")
"""Sets whose score is an error; a gain is a smaller one."""
ARMS = {
    "experts": "experts",
    "random": "frozen random router",
    "flops": "dense, equal FLOPs",
}
"""What is drawn beside each dense model, by the end of its name."""
PUBLISHED = "published"


def gains(folder: Path) -> Gains:
    """By set and conv, how much smaller each error is, in percent of the dense model's."""
    found: Gains = {}
    cells, published = read_published(folder)
    for column in ERROR_SETS:
        for conv in ("gcn", "gin"):
            dense = cells.get(column, {}).get(conv)
            if dense is not None:
                known = _beside(dense, conv, cells[column])
                figure = published.get(f"{column}/{conv}")
                if figure is not None:
                    known[PUBLISHED] = _published(dense["test"]["mean"], figure)
                found[f"{column}, {conv.upper()}"] = known
    return found


def _beside(dense: dict[str, Any], conv: str, cells: dict[str, Any]) -> dict[str, Difference]:
    known = {}
    for arm in ARMS:
        cell = cells.get(f"{conv}-{arm}")
        if cell is not None:
            values = differences(cell, dense)
            mean = statistics.fmean(dense["test"]["values"][: len(values)])
            known[arm] = Difference.of([-100 * value / mean for value in values])
    return known


def _published(ours: float, figure: str) -> Difference:
    """A published mean, with its standard deviation for the interval."""
    mean, spread = (float(part) for part in figure.split(" ± "))
    below, half = 100 * (ours - mean) / ours, 100 * spread / ours
    return Difference(mean=below, low=below - half, high=below + half, n=10)


def _draw_molecules(axis: Axes, found: Gains, theme: Theme) -> None:
    """A line a dense model; 0 is its error here."""
    looks = {
        "experts": (theme.blue, "o"),
        "random": (theme.orange, "s"),
        "flops": (theme.green, "v"),
        PUBLISHED: (theme.gray, "D"),
    }
    labels = {**ARMS, PUBLISHED: "published dense mean ± std"}
    for place, known in enumerate(found.values()):
        for number, (arm, (color, marker)) in enumerate(looks.items()):
            if arm in known:
                offset = 0.19 * (number - 1.5)
                dot(axis, place + offset, known[arm], color, marker, label=labels[arm])
    rows(axis, list(found))
    _zero_axis(axis, theme, "% below the dense model's RMSE")
    axis.legend(*_named_once(axis), loc="lower right", bbox_to_anchor=(1.02, 1), ncols=2)


def _draw_controls(axis: Axes, found: Gains, theme: Theme) -> None:
    """A line a change of the dense model, a dot a graph."""
    for number, (column, known) in enumerate(found.items()):
        color, marker = ((theme.blue, "o"), (theme.orange, "s"))[number]
        for place, gain in enumerate(known.values()):
            label = f"{column}, n = {gain.n}"
            dot(axis, place + 0.2 * (number - 0.5), gain, color, marker, label=label)
    rows(axis, list(controls.MODELS.values()))
    _zero_axis(axis, theme, "points above the dense model")
    axis.legend(*_named_once(axis), loc="lower right", bbox_to_anchor=(1.02, 1), ncols=2)


def _zero_axis(axis: Axes, theme: Theme, label: str) -> None:
    axis.axvline(0, color=theme.gray, linewidth=1.2, zorder=0)
    axis.grid(axis="x", color=theme.gray, alpha=0.25, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.set_xlabel(label)


def _named_once(axis: Axes) -> tuple[list[Any], list[str]]:
    handles, names = axis.get_legend_handles_labels()
    known = dict(zip(names, handles, strict=True))
    return list(known.values()), list(known)


def draw(molecules: Gains, graphs: Gains, theme: Theme) -> Figure:
    """Molecules above, graphs below."""
    figure = Figure(figsize=(5.4, 7))
    upper, lower = figure.subplots(2, height_ratios=(len(molecules) + 1, 5))
    _draw_molecules(upper, molecules, theme)
    _draw_controls(lower, graphs, theme)
    figure.tight_layout(h_pad=1.5)
    return figure


def drawings(results: Path) -> list[Drawing]:
    """One figure."""
    molecules = gains(results / "published-molecules")
    graphs = controls.gains(results / "published-controls")
    said = []
    for arm, label in ARMS.items():
        known = {column: arms[arm] for column, arms in molecules.items() if arm in arms}
        if known:
            said.append(f"{label[0].upper()}{label[1:]}: {by_verdict(known)}")
    alt = (
        "Molecules: how far errors are below those of the dense model, in percent, with 95 % "
        f"intervals and published means. {'. '.join(said)}. Graphs: points above the dense model."
    )
    numbers = numbers_of({**molecules, **graphs})
    return [Drawing("published", numbers, alt, lambda theme: draw(molecules, graphs, theme))]
