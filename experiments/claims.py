"""The claims this project started from: ``python -m experiments.claims`` judges them in docs/claims.md, with figures.

All of it is read from ``results/founding.json``, which ``python -m experiments.sweep founding`` makes.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib.pyplot as plt
import tyro
from matplotlib.axes import Axes
from scipy.stats import t as student

from experiments.tables import ROOT

Arms: TypeAlias = dict[str, dict[str, Any]]
Values: TypeAlias = Callable[[dict[str, Any]], list[float]]
"""Of an arm, a value a seed; larger is better."""

MARKED = re.compile(r"(<!-- verdicts -->\n).*?(<!-- end -->)", re.DOTALL)


TARGET = 0.5
"""The accuracy that claim (b) asks the epochs of, fixed before the study was run."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What is said of two arms.

    Args:
        letter: of the claim.
        text: what is claimed.
        arm: the arm that is claimed to be better, or the same.
        than: the other arm.
        unit: of the difference.
        values: what is compared.
        margin: the arm may be worse by so much, where "at least equal" or "little loss" is claimed.
        same: the claim is that there is no difference, to the margin either way.
    """

    letter: str
    text: str
    arm: str
    than: str
    unit: str
    values: Values
    margin: float = 0.0
    same: bool = False


@dataclass(frozen=True)
class Verdict:
    """A difference of means, half of its 95 % confidence interval, and what follows."""

    difference: float
    half: float
    counts: tuple[int, int]
    word: str


def accuracy(arm: dict[str, Any]) -> list[float]:
    """Test accuracy in points."""
    return [100 * value for value in arm["test"]["values"]]


def earliness(arm: dict[str, Any]) -> list[float]:
    """Minus the epochs until validation reaches :data:`TARGET`, between two epochs on a straight line; of a seed that
    never does, one more than it ran."""
    epochs = [0.0, *arm["curve"]["epoch"]]
    found = []
    for curve in arm["curve"]["val"]:
        points = [0.0, *curve]
        reached = epochs[-1] + 1.0
        for i in range(1, len(points)):
            if points[i] >= TARGET:
                share = (TARGET - points[i - 1]) / (points[i] - points[i - 1])
                reached = epochs[i - 1] + share * (epochs[i] - epochs[i - 1])
                break
        found.append(-reached)
    return found


def claims(arms: Arms) -> list[Claim]:
    """The five claims, as comparisons of arms; those whose arms are not finished are left out."""
    points, epochs = "points of test accuracy", f"epochs earlier at {100 * TARGET:.0f} % on validation"
    all_of_them = [
        Claim(letter="a", text="Expert choice beats token choice", arm="expert-choice-k1", than="token-choice-k1",
              unit=points, values=accuracy),
        Claim(letter="b", text="With experts, 6 blocks reach a given accuracy in fewer epochs than the dense model of "
              "equal active FLOPs", arm="expert-choice-k1", than="dense", unit=epochs, values=earliness),
        Claim(letter="b", text="… and end higher", arm="expert-choice-k1", than="dense", unit=points, values=accuracy),
        Claim(letter="c", text="With 12 blocks the difference vanishes (to 1 point)", arm="expert-choice-k1-12",
              than="dense-12", unit=points, values=accuracy, margin=1.0, same=True),
        Claim(letter="d", text="Attention votes are at least equal to expert choice (to 1 point)",
              arm="attention-vote-k1", than="expert-choice-k1", unit=points, values=accuracy, margin=1.0),
        Claim(letter="d", text="Shared queries cost far fewer parameters at little loss (to 1 point)",
              arm="attention-vote-k1-shared", than="attention-vote-k1", unit=points, values=accuracy, margin=1.0),
        Claim(letter="e", text="Several centroids, with the separation loss, beat one", arm="multi-centroid-k1-four",
              than="multi-centroid-k1-one", unit=points, values=accuracy),
    ]  # fmt: skip
    return [claim for claim in all_of_them if {claim.arm, claim.than} <= set(arms)]


def judge(claim: Claim, arms: Arms) -> Verdict:
    """The verdict by Student's t, with one variance for all arms, pooled from those with several seeds.

    "Better" holds where the whole 95 % interval of the difference lies above minus the margin, and does not where it
    lies below. "The same" holds where the whole interval lies within the margin, and does not where it lies outside.
    Else it cannot be told. Each interval stands for itself: where seven claims are all false, one "better" is found in
    one study of six.
    """
    groups = [claim.values(arm) for arm in arms.values()]
    freedom = sum(len(group) - 1 for group in groups)
    squares = sum((value - sum(group) / len(group)) ** 2 for group in groups for value in group)
    mine, other = claim.values(arms[claim.arm]), claim.values(arms[claim.than])
    difference = sum(mine) / len(mine) - sum(other) / len(other)
    half = math.inf
    if squares > 0:  # of values that are all the same, no spread is known
        error = math.sqrt(squares / freedom * (1 / len(mine) + 1 / len(other)))
        half = float(student.ppf(0.975, freedom)) * error
    low, high = difference - half, difference + half
    holds = -claim.margin < low and (not claim.same or high < claim.margin)
    fails = high < -claim.margin or (claim.same and low > claim.margin)
    word = "holds" if holds else "does not hold" if fails else "cannot be told at this budget"
    return Verdict(difference, half, (len(mine), len(other)), word)


def verdict_table(arms: Arms) -> str:
    """One line a claim."""
    lines = [
        "| | claim | difference (95 % interval) | n | FLOPs | parameters | verdict |",
        "|---|---|---|---|---:|---:|---|",
    ]
    for claim in claims(arms):
        found = judge(claim, arms)
        spread = "no spread known" if math.isinf(found.half) else f"± {found.half:.2f}"
        n = " and ".join(map(str, found.counts))
        difference = f"{found.difference:+.2f} ({spread}) {claim.unit}"
        costs = " | ".join(f"{arms[claim.arm][c] / arms[claim.than][c]:.2f}×" for c in ("flops", "parameters"))
        lines.append(f"| {claim.letter} | {claim.text} | {difference} | {n} | {costs} | {found.word} |")
    return "\n".join(lines)


def training_flops(arm: dict[str, Any]) -> list[float]:
    """FLOPs spent by each epoch of the curve: forward and, twice as dear, backward; a last, smaller batch counts in
    full."""
    return [3.0 * arm["flops"] * arm["steps"] * epoch for epoch in arm["curve"]["epoch"]]


def draw(arms: Arms, names: Sequence[str], title: str, path: Path) -> None:
    """Validation accuracy against epochs and against training FLOPs: mean, and the band from worst to best seed."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    assert isinstance(axes[0], Axes)
    for arm in (arms[name] for name in names if name in arms):
        curves = [[100 * value for value in curve] for curve in arm["curve"]["val"]]
        mean = [sum(column) / len(column) for column in zip(*curves, strict=True)]
        for axis, x in zip(axes, (arm["curve"]["epoch"], training_flops(arm)), strict=True):
            (line,) = axis.plot(x, mean, label=f"{arm['label'].replace('`', '')} (n = {len(curves)})")
            low, high = ([f(column) for column in zip(*curves, strict=True)] for f in (min, max))
            axis.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes[0].set(xlabel="epochs", ylabel="validation accuracy (%)", title=title)
    axes[1].set(xlabel="training FLOPs, forward and backward")
    axes[0].legend(fontsize="small")
    for axis in axes:
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


FIGURES = {
    "claims-6-blocks": (
        "6 blocks: dense and the routers",
        ("dense", "expert-choice-k1", "token-choice-k1", "attention-vote-k1", "random-k1", "uniform"),
    ),
    "claims-depth": ("6 and 12 blocks", ("dense", "expert-choice-k1", "dense-12", "expert-choice-k1-12")),
    "claims-variants": (
        "Shared queries; one centroid or four",
        ("attention-vote-k1", "attention-vote-k1-shared", "multi-centroid-k1-one", "multi-centroid-k1-four"),
    ),
}
"""By file name, title and arms."""


@dataclass(frozen=True, kw_only=True)
class ClaimsConfig:
    """Where from, and where to."""

    results: Path = ROOT / "results" / "founding.json"
    """The result file."""
    page: Path = ROOT / "docs" / "claims.md"
    """The page, whose part between the marks is rewritten."""
    figures: Path = ROOT / "docs" / "figures"
    """Folder of the figures."""


def main(args: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = tyro.cli(ClaimsConfig, args=args, prog="python -m experiments.claims", description=__doc__)
    for path in (config.results, config.page):
        if not path.exists():
            sys.exit(f"error: {path} is missing; python -m experiments.sweep founding makes the results")
    arms: Arms = {arm["arm"]: arm for arm in json.loads(config.results.read_text())["arms"]}
    page = config.page.read_text()
    if not MARKED.search(page):
        sys.exit(f"error: {config.page} has no place for the table, <!-- verdicts --> and <!-- end -->")
    config.page.write_text(MARKED.sub(lambda match: f"{match[1]}{verdict_table(arms)}\n{match[2]}", page))
    for name, (title, names) in FIGURES.items():
        if set(names) & set(arms):
            draw(arms, names, title, config.figures / f"{name}.png")
    print(verdict_table(arms))


if __name__ == "__main__":
    main()
