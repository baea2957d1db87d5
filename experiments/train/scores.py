"""Scores over seeds: as text, and paired."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from math import sqrt
from typing import Any


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


def paired(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The mean difference of scores seed by seed, in points, and its interval from two seeds on."""
    values = [100 * (a - b) for a, b in zip(ours, theirs, strict=True)]
    text = f"{statistics.fmean(values):+.2f} points"
    if len(values) > 1:
        low, high = interval(values)
        text += f" (95 % interval {low:+.2f} to {high:+.2f})"
    better = sum(value > 0 for value in values)
    return f"{text}, n = {len(values)}, better on {better} of {len(values)} seeds"
