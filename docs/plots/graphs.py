"""The graph studies of the plain mixture: paired differences on ten splits.

``results/minesweeper-10splits.json`` and ``results/facebook-10splits.json`` hold the variants;
``docs/lab/graphs.md`` has the tables.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

from matplotlib.figure import Figure

from docs.plots.results import Difference, differences, read_file
from docs.plots.style import Drawing, Theme, by_verdict, difference_axis, dot, rows

K_MEANS = "multi-centroid-k1-kmeans-shared-expert"
ONCE = "k1-shared-router-shared-expert"
PAIRS = {
    "minesweeper-10splits": {
        "k-means centroids − equal FLOPs": (K_MEANS, f"dense-flops-{K_MEANS}"),
        "k-means centroids − equal parameters": (K_MEANS, f"dense-parameters-{K_MEANS}"),
        "k-means centroids − frozen random": (K_MEANS, f"random-{ONCE}"),
        "expert choice − equal FLOPs": (f"expert-choice-{ONCE}", f"dense-flops-{K_MEANS}"),
        "token choice − equal FLOPs": (f"token-choice-{ONCE}", f"dense-flops-{K_MEANS}"),
    },
    "facebook-10splits": {
        "token choice − equal FLOPs": (
            "token-choice-k1-balanced",
            "dense-flops-token-choice-k1-balanced",
        ),
        "filters as experts − equal FLOPs": (
            "token-choice-k1-filters",
            "dense-flops-token-choice-k1-filters",
        ),
    },
}
"""By study, what is compared: a variant, and what is taken from it."""

Found: TypeAlias = dict[str, dict[str, Difference]]
"""By graph and comparison the difference."""


def gains(results: Path) -> Found:
    """What is drawn."""
    found: Found = {}
    for study, pairs in PAIRS.items():
        variants: dict[str, Any] = {
            variant["variant"]: variant
            for variant in read_file(results / f"{study}.json")["variants"]
        }
        found[study.partition("-")[0]] = {
            label: Difference.of(differences(variants[one], variants[other]))
            for label, (one, other) in pairs.items()
        }
    return found


def numbers(found: Found) -> str:
    """Whatever is drawn, as text."""
    return "\n".join(
        f"{graph}: {label} {gain}"
        for graph, known in found.items()
        for label, gain in known.items()
    )


def draw(found: Found, theme: Theme) -> Figure:
    """A line a comparison, the graphs below each other."""
    figure = Figure(figsize=(5.4, 4))
    counts = [len(known) for known in found.values()]
    panels = figure.subplots(len(found), 1, sharex=True, height_ratios=counts)
    for axis, (graph, known) in zip(panels, found.items(), strict=True):
        for place, gain in enumerate(known.values()):
            dot(axis, place, gain, theme.blue, "o")
        rows(axis, list(known))
        axis.set_title(f"{graph}, n = {next(iter(known.values())).n}", fontsize=10)
        difference_axis(axis, theme, "")
    panels[-1].set_xlabel("points")
    figure.tight_layout()
    return figure


def drawings(results: Path) -> list[Drawing]:
    """One figure."""
    found = gains(results)
    said = "; ".join(f"{graph}: {by_verdict(known)}" for graph, known in found.items())
    alt = f"Paired differences on ten splits, with 95 % intervals, above or below 0. {said}."
    return [Drawing("graphs", numbers(found), alt, lambda theme: draw(found, theme))]
