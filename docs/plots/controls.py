"""What else does what experts do: other changes of a dense model, beside experts.

``results/published-controls`` holds a file a graph and model; ``docs/lab/does-it-help.md`` has the
tables.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from docs.plots.results import Difference, Gains, differences, numbers_of, read_finished
from docs.plots.style import Drawing, Theme, by_verdict, difference_axis, dot, legend_above, rows

BASE = "dense"
MODELS = {
    "experts": "experts by default",
    "random": "experts, frozen random router",
    "one-expert": "one expert",
    "dense-lr2": "dense, twice the learning rate",
    "dense-input-again": "dense, layers see the input again",
}
"""What is drawn, by name of the file."""


def gains(folder: Path) -> Gains:
    """The graphs of which all models are finished."""
    return {
        column: {model: Difference.of(differences(cells[model], cells[BASE])) for model in MODELS}
        for column, cells in read_finished(folder).items()
        if {BASE, *MODELS} <= set(cells)
    }


def draw(found: Gains, theme: Theme) -> Figure:
    """A line a model, a dot a graph; 0 is the dense model."""
    figure = Figure(figsize=(5.4, 3.4))
    axis = figure.subplots()
    colors, markers = (theme.blue, theme.orange), ("o", "s")
    for number, (column, known) in enumerate(found.items()):
        for place, gain in enumerate(known.values()):
            offset = 0.2 * (number - (len(found) - 1) / 2)
            label = f"{column}, n = {gain.n}"
            dot(axis, place + offset, gain, colors[number], markers[number], label=label)
    rows(axis, list(MODELS.values()))
    difference_axis(axis, theme, "points above the dense model", linear_to=3)
    legend_above(figure, axis, columns=2)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    return figure


def drawings(results: Path) -> list[Drawing]:
    """One figure."""
    found = gains(results / "published-controls")
    said = []
    for model, label in MODELS.items():
        verdicts = by_verdict({column: known[model] for column, known in found.items()})
        said.append(f"{label.capitalize()}: {verdicts}")
    alt = f"Points above the dense model, with 95 % intervals. {'. '.join(said)}."
    return [Drawing("controls", numbers_of(found), alt, lambda theme: draw(found, theme))]
