"""Scores as text: mean ± sample standard deviation."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
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


def scored(metric: str, figures: Mapping[str, Any]) -> str:
    """A score in percent; an error as it is."""
    return shown(figures, ".4f") if metric in ERRORS else percent(figures)


def unit(metric: str) -> str:
    """What follows the name of a metric whose values are :func:`scored`."""
    return "" if metric in ERRORS else " (%)"
