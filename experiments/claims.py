"""The claims this project started from: ``python -m experiments.claims`` judges them in docs/claims.md, with figures.

All of it is read from ``results/cifar10-claims.json``, which ``python -m experiments.sweep cifar10-claims`` makes.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from scipy.stats import t as student

from experiments.tables import ROOT

Variants: TypeAlias = dict[str, dict[str, Any]]
Values: TypeAlias = Callable[[dict[str, Any]], "list[float] | None"]
"""Of a variant, a value a seed, or ``None`` where some seed has none; larger is better."""

MARKED = re.compile(r"(<!-- verdicts -->\n).*?(<!-- end -->)", re.DOTALL)
TARGET = 0.5
"""The accuracy that claim (b) asks the epochs of, fixed before the study was run."""
UNKNOWN = "cannot be told at this budget"


def accuracy(variant: dict[str, Any]) -> list[float]:
    """Test accuracy in points."""
    return [100 * value for value in variant["test"]["values"]]


def earliness(variant: dict[str, Any]) -> list[float] | None:
    """Minus the epochs until validation reaches :data:`TARGET`, between two epochs on a straight line from zero;
    ``None`` where a seed never does."""
    epochs = [0.0, *variant["curve"]["epoch"]]
    found = []
    for curve in variant["curve"]["val"]:
        points = [0.0, *curve]
        i = next((i for i, point in enumerate(points) if point >= TARGET), None)
        if i is None:
            return None
        share = (TARGET - points[i - 1]) / (points[i] - points[i - 1])
        found.append(-(epochs[i - 1] + share * (epochs[i] - epochs[i - 1])))
    return found


@dataclass(frozen=True)
class Claim:
    """What is said of the means of some variants: a sum of them, each times its factor, is above minus the margin.

    Args:
        letter: of the claim.
        text: what is claimed.
        factors: by variant; one at 1 and one at -1 compare two, two more the other way compare two differences.
        margin: the sum may be below zero by so much, where "at least equal" or "little loss" is claimed.
        same: the claim is that there is no difference, to the margin either way.
        unit: of the sum (default: points of test accuracy).
        values: what the means are of (default: that).
    """

    letter: str
    text: str
    factors: Mapping[str, int]
    margin: float = 0.0
    same: bool = False
    unit: str = "points of test accuracy"
    values: Values = accuracy


def _over(variant: str, other: str) -> dict[str, int]:
    return {variant: 1, other: -1}


EXPERTS, VOTES = "expert-choice-k1", "attention-vote-k1"
CLAIMS = (
    Claim("a", "Expert choice beats token choice", _over(EXPERTS, "token-choice-k1")),
    Claim("a", "… and token choice with Switch's balance loss", _over(EXPERTS, "token-choice-k1-balanced")),
    Claim(
        "b",
        "With experts, 6 blocks reach a given accuracy in fewer epochs than the dense model of equal active FLOPs",
        _over(EXPERTS, "dense"),
        unit=f"epochs earlier at {100 * TARGET:.0f} % on validation",
        values=earliness,
    ),
    Claim("b", "… and end higher", _over(EXPERTS, "dense")),
    Claim("b", "… also at the scale of a dense MLP (straight-through)", _over(f"{EXPERTS}-straight", "dense")),
    Claim("b", "Scaling every second MLP × 1/8 helps a dense model", _over("dense-scaled", "dense")),
    Claim("b", "Experts end higher than that model", _over(EXPERTS, "dense-scaled")),
    Claim("b", "… and higher than the dense model of equal parameters", _over(EXPERTS, "dense-parameters")),
    Claim("b", "… and token choice is above a frozen random router", _over("token-choice-k1", "random-k1")),
    Claim("b", "… and higher than the uniform average of all experts", _over(EXPERTS, "uniform")),
    Claim("c", "With 12 blocks no difference is left (to 1 point)", _over(f"{EXPERTS}-12", "dense-12"), 1, same=True),
    Claim(
        "c",
        "… and it is smaller than with 6",
        _over(EXPERTS, "dense") | _over("dense-12", f"{EXPERTS}-12"),
        unit="points between the differences",
    ),
    Claim("d", "Attention votes are at least equal to expert choice (to 1 point)", _over(VOTES, EXPERTS), 1),
    Claim(
        "d",
        "… and to expert choice of their scale (straight-through; to 1 point)",
        _over(VOTES, f"{EXPERTS}-straight"),
        1,
    ),
    Claim(
        "d",
        "Queries shared by the experts lose little (to 1 point) and save parameters",
        _over(f"{VOTES}-shared", VOTES),
        1,
    ),
    Claim(
        "e",
        "Several centroids beat one, both with the separation loss",
        _over("multi-centroid-k1-four", "multi-centroid-k1-one"),
    ),
)


def claims(variants: Variants) -> list[Claim]:
    """The claims whose variants are finished."""
    return [claim for claim in CLAIMS if set(claim.factors) <= set(variants)]


@dataclass(frozen=True)
class Verdict:
    """A difference of means, half of its 95 % confidence interval, and what follows."""

    difference: float
    half: float
    word: str


def judge(claim: Claim, variants: Variants) -> Verdict:
    """The verdict by Student's t, with one variance for all variants, pooled from those with several seeds.

    "Better" holds where the whole 95 % interval of the difference lies above minus the margin, and does not where it
    lies below. "The same" holds where the whole interval lies within the margin, and does not where it lies outside.
    Else it cannot be told, nor can it where a variant has a seed without a value; such variants lend no variance
    either. Each interval stands for itself: of n lines without any difference, one "better" is found in 1 - 0.975^n of
    studies.
    """
    values = {name: found for name, variant in variants.items() if (found := claim.values(variant)) is not None}
    if not set(claim.factors) <= set(values):
        return Verdict(math.nan, math.inf, UNKNOWN)
    means = {name: statistics.fmean(found) for name, found in values.items()}
    freedom = sum(len(found) - 1 for found in values.values())
    squares = sum((value - means[name]) ** 2 for name, found in values.items() for value in found)
    difference = sum(factor * means[name] for name, factor in claim.factors.items())
    half = math.inf
    if squares > 0:  # of values that are all the same, no spread is known
        error = math.sqrt(squares / freedom * sum(f**2 / len(values[name]) for name, f in claim.factors.items()))
        half = float(student.ppf(0.975, freedom)) * error
    low, high = difference - half, difference + half
    holds = -claim.margin < low and (not claim.same or high < claim.margin)
    fails = high < -claim.margin or (claim.same and low > claim.margin)
    return Verdict(difference, half, "holds" if holds else "does not hold" if fails else UNKNOWN)


def verdict_table(variants: Variants) -> str:
    """One line a claim."""
    lines = [
        "| | claim | difference (95 % interval) | n | FLOPs | parameters | verdict |",
        "|---|---|---|---|---:|---:|---|",
    ]
    for claim in claims(variants):
        found = judge(claim, variants)
        n = ", ".join(str(len(variants[name]["test"]["values"])) for name in claim.factors)
        spread = "no spread known" if math.isinf(found.half) else f"± {found.half:.2f}"
        difference = f"{found.difference:+.2f} ({spread}) {claim.unit}"
        if math.isnan(found.difference):
            difference = f"not every seed got to {100 * TARGET:.0f} %"
        one, other, *more = (variants[name] for name in claim.factors)
        costs = ["" if more else f"{one[cost] / other[cost]:.2f}×" for cost in ("flops", "parameters")]
        lines.append(f"| {claim.letter} | {claim.text} | {difference} | {n} | {' | '.join(costs)} | {found.word} |")
    return "\n".join(lines)


def training_flops(variant: dict[str, Any]) -> list[float]:
    """FLOPs spent by each epoch of the curve: forward and, twice as dear, backward; a last, smaller batch counts in
    full."""
    return [3.0 * variant["flops"] * variant["steps"] * epoch for epoch in variant["curve"]["epoch"]]


def draw(variants: Variants, names: Sequence[str], title: str, path: Path) -> None:
    """Validation accuracy against epochs and against training FLOPs, the mean and the band from worst to best seed; and
    the test accuracy of every seed, with the mean. A variant looks the same in all figures."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.8), layout="constrained", width_ratios=(2, 2, 1))
    assert isinstance(axes[0], Axes)
    axes[1].sharey(axes[0])
    styles = dict(zip(variants, product(("-", "--", ":"), [f"C{i}" for i in range(10)]), strict=False))
    for place, name in enumerate(name for name in names if name in variants):
        variant, (style, color) = variants[name], styles[name]
        curves = 100 * np.array(variant["curve"]["val"])
        for axis, x in zip(axes, (variant["curve"]["epoch"], training_flops(variant)), strict=False):
            axis.plot(
                x, curves.mean(0), style, color=color, label=f"{variant['label'].replace('`', '')} (n = {len(curves)})"
            )
            axis.fill_between(x, curves.min(0), curves.max(0), color=color, alpha=0.2, linewidth=0)
        values = accuracy(variant)
        axes[2].plot([place] * len(values), values, "o", color=color, markersize=4)
        axes[2].hlines(statistics.fmean(values), place - 0.3, place + 0.3, color=color, linestyle=style)
    axes[0].set(xlabel="epochs", ylabel="validation accuracy (%)", title=title)
    axes[1].set(xlabel="training FLOPs, forward and backward", title="mean, and worst to best seed")
    axes[2].set(xticks=[], ylabel="test accuracy (%)", title="every seed, and mean")
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    for axis in axes:
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


FIGURES = {
    "claims-6-blocks": (
        "6 blocks: dense and the routers",
        f"dense {EXPERTS} {EXPERTS}-straight token-choice-k1 token-choice-k1-balanced {VOTES} random-k1 uniform"
        " dense-scaled dense-parameters",
    ),
    "claims-depth": ("6 and 12 blocks", f"dense {EXPERTS} dense-12 {EXPERTS}-12"),
    "claims-variants": (
        "Shared queries; one centroid or four",
        f"{VOTES} {VOTES}-shared multi-centroid-k1-one multi-centroid-k1-four",
    ),
}
"""By file name, title and variants."""


@dataclass(frozen=True, kw_only=True)
class ClaimsConfig:
    """Where from, and where to."""

    results: Path = ROOT / "results" / "cifar10-claims.json"
    """The result file."""
    page: Path = ROOT / "docs" / "claims.md"
    """The page, whose part between the marks is rewritten."""
    figures: Path = ROOT / "docs" / "figures"
    """Folder of the figures."""


def main(args: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = tyro.cli(ClaimsConfig, args=args, prog="python -m experiments.claims", description=__doc__)
    try:
        results, page = json.loads(config.results.read_text()), config.page.read_text()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}; python -m experiments.sweep cifar10-claims makes the results")
    if results.get("study") != "cifar10-claims":
        sys.exit(f"error: {config.results} does not hold the study `cifar10-claims`")
    if not MARKED.search(page):
        sys.exit(f"error: {config.page} has no place for the table, <!-- verdicts --> and <!-- end -->")
    variants: Variants = {variant["variant"]: variant for variant in results["variants"]}
    config.page.write_text(MARKED.sub(lambda match: f"{match[1]}{verdict_table(variants)}\n{match[2]}", page))
    for name, (title, names) in FIGURES.items():
        if set(names.split()) & set(variants):
            draw(variants, names.split(), title, config.figures / f"{name}.png")
    print(verdict_table(variants))


if __name__ == "__main__":
    main()
