"""Scores over seeds: as text, and paired."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf, sqrt
from typing import Any, Literal, TypeVar

from experiments.train.config import ERRORS

D = TypeVar("D", bound="Difference")


def mean_std(values: Sequence[float], form: str = ".2f") -> str:
    """Mean ± sample standard deviation of values."""
    return shown(
        {"mean": statistics.fmean(values), "std": statistics.stdev(values) if values[1:] else None},
        form,
    )


def shown(figures: Mapping[str, Any], form: str = ".2f", factor: int = 1) -> str:
    """Mean ± sample standard deviation that are known."""
    mean = f"{factor * figures['mean']:{form}}"
    return (
        mean
        if figures["std"] is None
        else f"{mean} ± {factor * figures['std']:{form.removeprefix('+')}}"
    )


percent = partial(shown, factor=100)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The mean of paired differences, with its 95 % interval by Student's t.

    One difference has no spread: its interval reaches from minus infinity to infinity.
    """

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls: type[D], values: Sequence[float]) -> D:
        """What differences say, seed by seed or split by split."""
        n = len(values)
        variance = statistics.variance(values) / n if n > 1 else inf
        return cls.around(statistics.fmean(values), variance, n)

    @classmethod
    def around(cls: type[D], mean: float, variance: float, n: int) -> D:
        """A mean whose own variance is known from ``n`` differences."""
        from scipy.stats import t

        half = inf
        if n > 1:
            half = float(t.ppf(0.975, n - 1)) * sqrt(variance)
        return cls(mean=mean, low=mean - half, high=mean + half, n=n)

    @property
    def side(self) -> Literal["above", "below", "level"]:
        """``"above"`` or ``"below"`` 0 if the whole interval is, else ``"level"``."""
        if self.low > 0:
            return "above"
        return "below" if self.high < 0 else "level"

    def text(self, form: str = "+.2f") -> str:
        """The mean, and its interval in parentheses, if it is one of several differences."""
        if self.n == 1:
            return f"{self.mean:{form}}"
        return f"{self.mean:{form}} ({self.low:{form}} to {self.high:{form}})"

    def __str__(self) -> str:
        return self.text()


def differences(metric: str, ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Seed by seed, our score minus theirs: in points, or as an error is."""
    factor = 1 if metric in ERRORS else 100
    return [factor * (one - other) for one, other in zip(ours, theirs, strict=True)]


def of_shared_seeds(
    ours: Mapping[str, Any], theirs: Mapping[str, Any]
) -> tuple[list[float], list[float]]:
    """The scores of two summaries on the test set, on the seeds that both ran, pair by pair."""
    by_seed = dict(zip(theirs["config"]["seeds"], theirs["test"]["values"], strict=True))
    pairs = [
        (value, by_seed[seed])
        for seed, value in zip(ours["config"]["seeds"], ours["test"]["values"], strict=True)
        if seed in by_seed
    ]
    return [one for one, _ in pairs], [other for _, other in pairs]


def gains(metric: str, ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Seed by seed, how much better our score is: in points, or as an error's decrease."""
    sign = -1 if metric in ERRORS else 1
    return [sign * value for value in differences(metric, ours, theirs)]


def form_of(metric: str) -> str:
    """How a difference is written."""
    return "+.4f" if metric in ERRORS else "+.2f"


def better_in(metric: str, ours: Sequence[float], theirs: Sequence[float]) -> str:
    """On how many seeds our score is the better one."""
    found = gains(metric, ours, theirs)
    return f"{sum(value > 0 for value in found)} of {len(found)}"


def paired(metric: str, ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The mean difference of scores seed by seed, and its interval from two seeds on."""
    found = Difference.of(differences(metric, ours, theirs))
    form = form_of(metric)
    text = f"{found.mean:{form}} {metric if metric in ERRORS else 'points'}"
    if found.n > 1:
        text += f" (95 % interval {found.low:{form}} to {found.high:{form}})"
    return f"{text}, n = {found.n}, better on {better_in(metric, ours, theirs)} seeds"


def scored(metric: str, figures: Mapping[str, Any]) -> str:
    """A score in percent; an error as it is."""
    return shown(figures, ".4f") if metric in ERRORS else percent(figures)


def unit(metric: str) -> str:
    """What follows the name of a metric whose values are :func:`scored`."""
    return "" if metric in ERRORS else " (%)"
