"""Argument checks: every message names the argument, the value got, and the legal values."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from numbers import Integral


def check_at_least(name: str, value: float, least: float) -> None:
    """Refuse ``value < least``."""
    if not value >= least:
        raise ValueError(f"{name}: got {value}, expected at least {least}")


def check_count(name: str, value: int) -> None:
    """Refuse what is not a whole number of at least 1."""
    if not isinstance(value, Integral) or isinstance(value, bool):  # NumPy's too
        raise ValueError(f"{name}: got {value!r}, expected a whole number")
    check_at_least(name, value, 1)


def check_counts(**values: int) -> None:
    """:func:`check_count` of several arguments, by name."""
    for name, value in values.items():
        check_count(name, value)


def check_positive(name: str, value: float) -> None:
    """Refuse ``value <= 0`` and infinity."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: got {value}, expected a positive number")


def check_probability(name: str, value: float) -> None:
    """Refuse what is outside [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: got {value}, expected a probability in [0, 1]")


def check_choice(name: str, value: object, legal: Iterable[object]) -> None:
    """Refuse a value that is not one of ``legal``."""
    legal = tuple(legal)
    if value not in legal:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, legal))}{nearest(value, legal)}")


def nearest(value: object, legal: Iterable[object]) -> str:
    """The end of a message: the legal name that an unknown one is like, if there is one."""
    found = difflib.get_close_matches(str(value), [name for name in legal if isinstance(name, str)], n=1)
    return f"; did you mean {found[0]!r}?" if found else ""
