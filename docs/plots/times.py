"""Training steps of whole models with experts, as multiples of PyG's or timm's own model.

``results/benchmark-step.json`` is what ``python -m experiments.benchmark step`` wrote;
``docs/lab/steps.md`` has the table.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter

from docs.plots.results import read_file
from docs.plots.style import Drawing, Theme, legend_above, rows

FORMS = {
    "edges as they are; a ViT's default start": ("gmoe, edge_index", "gmoe, moefy"),
    "a gmoe.Graph; a ViT's plain start": ("gmoe, Graph", "gmoe, moefy, plain"),
}
"""The variants of a row, by what their mark is called."""

OWN = ("PyG", "timm")
"""What the ratios of a row are to."""

Ratios: TypeAlias = dict[str, dict[str, float]]
"""By row and variant: a step over the own model's."""


def ratios(results: Path) -> Ratios:
    """What was measured, with experts."""
    found: Ratios = {}
    for name, figures in read_file(results / "benchmark-step.json")["variants"].items():
        row, _, variant = name.partition(", ")
        if not variant.startswith(OWN):
            found.setdefault(row, {})[variant] = figures["ratio"]["step"]
    return found


def numbers(found: Ratios) -> str:
    """Whatever is drawn, as text."""
    return "\n".join(
        f"{row}: {', '.join(f'{variant} {ratio:.2f}' for variant, ratio in known.items())}"
        for row, known in found.items()
    )


def draw(found: Ratios, theme: Theme) -> Figure:
    """A line a row, a mark a variant."""
    figure = Figure(figsize=(7.4, 4.6))
    axis = figure.subplots()
    for place, known in enumerate(found.values()):
        axis.plot(list(known.values()), [place] * len(known), color=theme.gray, linewidth=1.2)
        least = min(known.values())
        axis.annotate(
            f"{least:.2g}", (least, place), (-7, -3.5), textcoords="offset points", ha="right"
        )
    for (label, variants), face in zip(FORMS.items(), ("none", theme.blue), strict=True):
        of_form = [known[name] for known in found.values() for name in variants if name in known]
        places = range(len(of_form))
        axis.plot(of_form, places, "o", color=theme.blue, markerfacecolor=face, label=label)
    rows(axis, list(found))
    axis.axvline(1, color=theme.gray, linewidth=1.2, zorder=0)
    axis.set_xscale("log")
    axis.set_xlim(0.45, 4.5)
    axis.xaxis.set_major_locator(FixedLocator([0.5, 1, 2, 4]))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_locator(FixedLocator([]))
    axis.grid(axis="x", color=theme.gray, alpha=0.25, linewidth=0.6)
    axis.set_axisbelow(True)
    figure.supxlabel("times the step of PyG's or timm's own model", fontsize=10)
    legend_above(figure, axis, columns=2)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    return figure


def drawings(results: Path) -> list[Drawing]:
    """One figure."""
    found = ratios(results)
    best = {row: min(known.values()) for row, known in found.items()}
    said = ", ".join(f"{row} {ratio:.2g}" for row, ratio in best.items())
    alt = (
        "Training steps of whole models with eight experts, optimizer included, as multiples of "
        f"PyG's or timm's own model; the better of two forms: {said}."
    )
    return [Drawing("times", numbers(found), alt, lambda theme: draw(found, theme), is_wide=True)]
