"""Scores as text: mean ± sample standard deviation."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
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
