"""Times of a training step of one layer, as multiples of the dense layer's in the same run.

``results/benchmark-*.json`` are what ``python -m experiments.benchmark conv`` wrote;
``docs/lab/benchmarks.md`` has the tables. The dense layer of a panel is a ``GCNConv`` on a sorted
matrix, which every run has.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter

from docs.plots.results import read_file
from docs.plots.style import Drawing, Theme, rows

RUNS = {
    "ogbn-arxiv's size": ("benchmark-conv-edge-index", "benchmark-conv"),
    "20,000 nodes": ("benchmark-conv-compiled-20k",),
    "2,708 nodes": ("benchmark-conv-compiled-cora",),
}
"""By panel the files, of which the first that has a variant counts."""
REFERENCE = "dense, csr"
VARIANTS = {
    "dense, edge_index": "GCNConv, edge_index",
    "dense, csr": "GCNConv, sorted matrix",
    "compiled dense, edge_index": "GCNConv, compiled",
    "MoEConv E=8 K=1, csr": "MoEConv, no shared expert",
    "MoEConv with shared expert E=8 K=1, csr": "MoEConv, shared expert",
    "masked E=8 K=1, csr": "eight masked GCNConvs",
}
"""What is drawn, by name of the variant."""

Times: TypeAlias = dict[str, dict[str, tuple[float, float, float]]]
"""By panel and variant: median, least and most of the steps over the reference's median."""


def times(results: Path) -> Times:
    """What was measured."""
    found: Times = {}
    for panel, names in RUNS.items():
        found[panel] = {}
        for name in reversed(names):
            variants = read_file(results / f"{name}.json")["variants"]
            dense = variants[REFERENCE]["wall"]["median"]
            for variant in VARIANTS:
                if variant in variants:
                    wall = variants[variant]["wall"]
                    median, least, most = (wall[key] / dense for key in ("median", "min", "max"))
                    found[panel][variant] = (median, least, most)
    return found


def numbers(found: Times) -> str:
    """Whatever is drawn, as text."""
    lines = []
    for panel, known in found.items():
        shown = (f"{name} {of[0]:.2f} ({of[1]:.2f} to {of[2]:.2f})" for name, of in known.items())
        lines.append(f"{panel}: {', '.join(shown)}")
    return "\n".join(lines)


def draw_panel(axis: Axes, panel: str, known: dict[str, tuple[float, float, float]],
               theme: Theme) -> None:  # fmt: skip
    """One size of graph: a line a variant, its median beside the dot."""
    for place, variant in enumerate(VARIANTS):
        if variant not in known:
            continue
        median, least, most = known[variant]
        color = theme.blue if variant.startswith("MoEConv") else theme.gray
        marker = "o" if variant.startswith("MoEConv") else "D"
        reach = [[median - least], [most - median]]
        axis.errorbar(median, place, xerr=reach, fmt=marker, color=color, elinewidth=1.6)
        if variant != REFERENCE:
            text = f"{median:.2g}"
            axis.annotate(text, (most, place), (4, -3.5), textcoords="offset points", fontsize=9)
    axis.set_title(panel, fontsize=11)
    axis.axvline(1, color=theme.gray, linewidth=1.2, zorder=0)
    axis.set_xscale("log")
    axis.set_xlim(0.4, 24)
    axis.xaxis.set_major_locator(FixedLocator([0.5, 1, 2, 4, 8]))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_locator(FixedLocator([]))
    axis.grid(axis="x", color=theme.gray, alpha=0.25, linewidth=0.6)
    axis.set_axisbelow(True)


def draw(found: Times, theme: Theme) -> Figure:
    """A panel a size."""
    figure = Figure(figsize=(8.2, 3.6))
    panels = figure.subplots(1, len(found), sharey=True)
    for axis, (panel, known) in zip(panels, found.items(), strict=True):
        draw_panel(axis, panel, known, theme)
    rows(panels[0], list(VARIANTS.values()))
    for axis in panels[1:]:
        axis.spines["left"].set_visible(False)
        axis.tick_params(axis="y", length=0)
    figure.supxlabel("times the step of one GCNConv on a sorted matrix", fontsize=10)
    figure.tight_layout()
    return figure


def drawings(results: Path) -> list[Drawing]:
    """One figure."""
    found = times(results)
    largest = next(iter(found.values()))
    said = ", ".join(
        f"{label} {largest[name][0]:.2g}" for name, label in VARIANTS.items() if name in largest
    )
    compiled = [known["compiled dense, edge_index"][0] for known in found.values() if
                "compiled dense, edge_index" in known]  # fmt: skip
    alt = (
        "Step times as multiples of one GCNConv on a sorted matrix, at three sizes. At "
        f"ogbn-arxiv's size: {said}. On smaller graphs a compiled GCNConv takes "
        f"{min(compiled):.2f} to {max(compiled):.2f}."
    )
    return [Drawing("times", numbers(found), alt, lambda theme: draw(found, theme), is_wide=True)]
