"""The main result: a ``GNNMoE`` by default beside dense models, on seeds that chose nothing.

``results/starts-confirmed`` holds a file a graph and model; ``docs/lab/starts.md`` has the table.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mode
from typing import TypeAlias

from matplotlib.figure import Figure

from docs.plots.results import Difference, differences, read_confirmed
from docs.plots.style import Drawing, Theme, by_verdict, difference_axis, dot, legend_above, rows

MODELS = {
    "difference-once-node-constant-unbalanced": "experts by default",
    "shared": "experts beside a shared one",
    "dense-flops": "wider dense",
}
"""What is drawn, by name of the file."""
DEFAULT = next(iter(MODELS))
PLANTED = ("mosaic", "concept")
"""Graphs that were made so that experts can help."""

Found: TypeAlias = dict[str, dict[str, tuple[Difference, float]]]
"""By graph and model the difference to the dense model, and active FLOPs as a multiple of its."""


def gains(folder: Path) -> Found:
    """The graphs on which the default was run, that of the largest gain first."""
    found: Found = {}
    for column, known in read_confirmed(folder).items():
        if set(MODELS) <= set(known):
            found[column] = {
                model: (
                    Difference.of(differences(known[model], known["dense"])),
                    known[model]["flops"] / known["dense"]["flops"],
                )
                for model in MODELS
            }
    return dict(sorted(found.items(), key=lambda entry: -entry[1][DEFAULT][0].mean))


def widths(folder: Path) -> str:
    """How wide the dense models are: the width of most graphs, then the graphs of another one."""
    known = read_confirmed(folder)
    wide = {column: known[column]["dense"]["config"]["hidden"] for column in gains(folder)}
    usual = mode(wide.values())
    others = [f"{column} {width}" for column, width in wide.items() if width != usual]
    return ", ".join([f"{usual} wide", *others])


def numbers(found: Found, wide: str) -> str:
    """Whatever is drawn, as text."""
    lines = [wide]
    for column, known in found.items():
        shown = (f"{model} {gain} at {flops:.2f} x" for model, (gain, flops) in known.items())
        lines.append(f"{column}: {', '.join(shown)}")
    return "\n".join(lines)


def draw(found: Found, wide: str, theme: Theme) -> Figure:
    """A line a graph, a dot a model; 0 is the dense model."""
    figure = Figure(figsize=(5.4, 5))
    axis = figure.subplots()
    colors, markers = (theme.blue, theme.orange, theme.gray), ("o", "s", "D")
    for number, (model, label) in enumerate(MODELS.items()):
        costs = [known[model][1] for known in found.values()]
        label += f", {min(costs):.1f} to {max(costs):.1f} × dense FLOPs"
        for place, known in enumerate(found.values()):
            offset = 0.22 * (number - 1)
            dot(axis, place + offset, known[model][0], colors[number], markers[number], label=label)
    rows(axis, [f"{column} (planted)" if column in PLANTED else column for column in found])
    difference_axis(axis, theme, f"points above the dense model ({wide})")
    legend_above(figure, axis, columns=1)
    figure.tight_layout(rect=(0, 0, 1, 0.86))
    return figure


def drawings(results: Path) -> list[Drawing]:
    """One figure."""
    folder = results / "starts-confirmed"
    found, wide = gains(folder), widths(folder)
    verdicts = by_verdict({column: known[DEFAULT][0] for column, known in found.items()})
    costs = [known[DEFAULT][1] for known in found.values()]
    alt = (
        f"Points above the dense model ({wide}), with 95 % intervals, by graph. Experts by "
        f"default, at {min(costs):.1f} to {max(costs):.1f} times the dense FLOPs: {verdicts}."
    )
    return [Drawing("starts", numbers(found, wide), alt, lambda theme: draw(found, wide, theme))]
