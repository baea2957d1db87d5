"""The claims this project started from: ``python -m experiments.claims`` judges them in docs/claims.md, with figures.

All of it is read from ``results/founding.json``, which ``python -m experiments.sweep founding`` makes.
"""

from __future__ import annotations

import json
import math
import re
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


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One arm is better than another.

    Args:
        letter: of the claim.
        text: what is claimed.
        arm: the arm that should be better.
        than: the other arm.
        unit: of the difference.
        values: what is compared.
        margin: the arm may be worse by so much, where "at least equal" or "little loss" is claimed.
    """

    letter: str
    text: str
    arm: str
    than: str
    unit: str
    values: Values
    margin: float = 0.0


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


def earliness(target: float) -> Values:
    """Minus the epochs until validation reaches the target; of a seed that never does, one more than it ran."""

    def values(arm: dict[str, Any]) -> list[float]:
        epochs = arm["curve"]["epoch"]
        return [
            -float(next((e for e, val in zip(epochs, curve, strict=True) if val >= target), epochs[-1] + 1))
            for curve in arm["curve"]["val"]
        ]

    return values


def claims(arms: Arms) -> list[Claim]:
    """The five claims, as comparisons of arms; those whose arms are not finished are left out."""
    reached = min((max(curve) for curve in arms["dense"]["curve"]["val"]), default=0.0) if "dense" in arms else 0.0
    points, epochs = "points of test accuracy", f"epochs earlier at {100 * reached:.1f} % on validation"
    all_of_them = [
        Claim(letter="a", text="Expert choice beats token choice", arm="expert-choice-k1", than="token-choice-k1",
              unit=points, values=accuracy),
        Claim(letter="b", text="With experts, 6 blocks reach what the dense model reaches in fewer epochs, at equal "
              "active FLOPs", arm="expert-choice-k1", than="dense", unit=epochs, values=earliness(reached)),
        Claim(letter="b", text="… and end higher", arm="expert-choice-k1", than="dense", unit=points, values=accuracy),
        Claim(letter="c", text="With 12 blocks there is still a difference (the claim is that there is none)",
              arm="expert-choice-k1-12", than="dense-12", unit=points, values=accuracy),
        Claim(letter="d", text="Attention votes are at least equal to expert choice (within 1 point)",
              arm="attention-vote-k1", than="expert-choice-k1", unit=points, values=accuracy, margin=1.0),
        Claim(letter="d", text="Shared queries cost little (within 1 point)", arm="attention-vote-k1-shared",
              than="attention-vote-k1", unit=points, values=accuracy, margin=1.0),
        Claim(letter="e", text="Several centroids, with the separation loss, beat one", arm="multi-centroid-k1-four",
              than="multi-centroid-k1-one", unit=points, values=accuracy),
    ]  # fmt: skip
    return [claim for claim in all_of_them if {claim.arm, claim.than} <= set(arms)]


def judge(claim: Claim, arms: Arms) -> Verdict:
    """The verdict by Student's t, with one variance for all arms, pooled from those with several seeds.

    Holds where the whole 95 % interval of the difference lies above minus the margin; does not where it lies below;
    else it cannot be told.
    """
    groups = [claim.values(arm) for arm in arms.values()]
    freedom = sum(len(group) - 1 for group in groups)
    squares = sum((value - sum(group) / len(group)) ** 2 for group in groups for value in group)
    mine, other = claim.values(arms[claim.arm]), claim.values(arms[claim.than])
    difference = sum(mine) / len(mine) - sum(other) / len(other)
    half = math.inf
    if freedom:
        error = math.sqrt(squares / freedom * (1 / len(mine) + 1 / len(other)))
        half = float(student.ppf(0.975, freedom)) * error
    if difference - half > -claim.margin:
        word = "holds"
    elif difference + half < -claim.margin:
        word = "does not hold"
    else:
        word = "cannot be told at this budget"
    return Verdict(difference, half, (len(mine), len(other)), word)


def verdict_table(arms: Arms) -> str:
    """One line a claim."""
    lines = ["| | claim | difference (95 % interval) | n | verdict |", "|---|---|---|---|---|"]
    for claim in claims(arms):
        found = judge(claim, arms)
        spread = "no spread known" if math.isinf(found.half) else f"± {found.half:.2f}"
        n = " and ".join(map(str, found.counts))
        difference = f"{found.difference:+.2f} ({spread}) {claim.unit}"
        lines.append(f"| {claim.letter} | {claim.text} | {difference} | {n} | {found.word} |")
    return "\n".join(lines)


def training_flops(arm: dict[str, Any]) -> list[float]:
    """FLOPs spent by each epoch of the curve: forward and, twice as dear, backward."""
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
    arms: Arms = {arm["arm"]: arm for arm in json.loads(config.results.read_text())["arms"]}
    page = config.page.read_text()
    config.page.write_text(MARKED.sub(lambda match: f"{match[1]}{verdict_table(arms)}\n{match[2]}", page))
    for name, (title, names) in FIGURES.items():
        if set(names) & set(arms):
            draw(arms, names, title, config.figures / f"{name}.png")
    print(verdict_table(arms))


if __name__ == "__main__":
    main()
