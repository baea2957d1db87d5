"""Scores over seeds: as text, and paired."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from math import sqrt
from typing import Any

from experiments.train.config import ERRORS


def mean_std(values: Sequence[float], form: str = ".2f") -> str:
    """Mean ± sample standard deviation of values."""
    if not values:
        return "–"
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


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean, by Student's t."""
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half


def differences(metric: str, ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Seed by seed, our score minus theirs: in points, or as an error is."""
    factor = 1 if metric in ERRORS else 100
    return [factor * (one - other) for one, other in zip(ours, theirs, strict=True)]


def gains(metric: str, ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Seed by seed, how much better our score is: in points, or as an error's decrease."""
    sign = -1 if metric in ERRORS else 1
    return [sign * value for value in differences(metric, ours, theirs)]


def form_of(metric: str) -> str:
    """How a difference is written."""
    return "+.4f" if metric in ERRORS else "+.2f"


def paired(metric: str, ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The mean difference of scores seed by seed, and its interval from two seeds on."""
    values, form = differences(metric, ours, theirs), form_of(metric)
    text = f"{statistics.fmean(values):{form}} {metric if metric in ERRORS else 'points'}"
    if len(values) > 1:
        low, high = interval(values)
        text += f" (95 % interval {low:{form}} to {high:{form}})"
    better = sum(value > 0 for value in gains(metric, ours, theirs))
    return f"{text}, n = {len(values)}, better on {better} of {len(values)} seeds"


def scored(metric: str, figures: Mapping[str, Any]) -> str:
    """A score in percent; an error as it is."""
    return shown(figures, ".4f") if metric in ERRORS else percent(figures)


def unit(metric: str) -> str:
    """What follows the name of a metric whose values are :func:`scored`."""
    return "" if metric in ERRORS else " (%)"
