"""Swaps of one class in models that exist: what they gain, and how long a step takes.

``results/swap.json`` is what the benchmark ``swap`` wrote, at the tag ``lab-2026-12``;
``docs/lab/swap.md`` has the table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter

from docs.plots.results import Difference, read_file
from docs.plots.style import Drawing, Theme, by_verdict, difference_axis, dot, rows

Swaps: TypeAlias = dict[str, tuple[Difference, float]]
"""By row the difference to the dense model, and the step as a multiple of its."""


def swaps(path: Path) -> Swaps:
    """The rows, that of the largest gain first."""
    found: Swaps = {}
    for name, row in read_file(path)["variants"].items():
        dense, moe = (_by_seed(row["runs"][model]) for model in ("dense", "moe"))
        both = sorted(set(dense) & set(moe))
        gain = Difference.of([100 * (moe[seed] - dense[seed]) for seed in both])
        walls = [row["time"][model]["wall"]["median"] for model in ("moe", "dense")]
        found[name] = gain, walls[0] / walls[1]
    return dict(sorted(found.items(), key=lambda entry: -entry[1][0].mean))


def _by_seed(runs: list[dict[str, Any]]) -> dict[int, float]:
    return {run["seed"]: run["test"] for run in runs}


def numbers(found: Swaps) -> str:
    """Whatever is drawn, as text."""
    return "\n".join(f"{name} {gain}, step {step:.2f} x" for name, (gain, step) in found.items())


def draw(found: Swaps, theme: Theme) -> Figure:
    """Left what a swap gains, right what it takes."""
    figure = Figure(figsize=(5.6, 5))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1.7, 1])
    for place, (gain, step) in enumerate(found.values()):
        dot(left, place, gain, theme.blue, "o")
        right.plot(step, place, "D", color=theme.orange, markersize=6)
    rows(left, [f"{name}, n = {gain.n}" for name, (gain, _) in found.items()])
    difference_axis(left, theme, "points above the dense model")
    right.axvline(1, color=theme.gray, linewidth=1.2, zorder=0)
    right.set_xscale("log")
    right.xaxis.set_major_locator(FixedLocator([0.5, 1, 2]))
    right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    right.xaxis.set_minor_locator(FixedLocator([]))
    right.set_xlim(0.45, 3)
    right.grid(axis="x", color=theme.gray, alpha=0.25, linewidth=0.6)
    right.set_xlabel("times the dense step")
    right.spines["left"].set_visible(False)
    right.tick_params(axis="y", length=0)
    figure.tight_layout(w_pad=2)
    return figure


def drawings(results: Path) -> list[Drawing]:
    """One figure."""
    found = swaps(results / "swap.json")
    verdicts = by_verdict({name: gain for name, (gain, _) in found.items()})
    steps = [step for _, step in found.values()]
    alt = (
        f"Points of a swapped model above the dense one, with 95 % intervals: {verdicts}. "
        f"A step takes {min(steps):.1f} to {max(steps):.1f} times the dense one."
    )
    return [Drawing("swap", numbers(found), alt, lambda theme: draw(found, theme))]
