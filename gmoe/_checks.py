"""Argument checks: every message names the argument, the value got, and the legal values."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any, get_args

EXTRAS = {"torch_geometric": "graph", "torchmetrics": "graph", "tqdm": "graph", "torchvision": "vision"}
EXTRAS |= {"matplotlib": "plot", "safetensors": "hub", "huggingface_hub": "hub"}
"""The extra that brings a package."""


@contextmanager
def naming_extras() -> Iterator[None]:
    """Name the extra that brings a package which cannot be imported."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in EXTRAS:
            raise
        raise ImportError(f'this part of gmoe needs {package}: pip install "gmoe[{EXTRAS[package]}]"') from error


def check(valid: object, name: str, got: object, expected: object) -> None:
    """Refuse what is not valid; not by sizes of tensors in a forward, which compilers would take as fixed."""
    if not valid:
        raise ValueError(f"{name}: got {got}, expected {expected}")


def check_at_least(least: float, **values: float) -> None:
    """Refuse arguments, by name, below ``least``."""
    for name, value in values.items():
        check(value >= least, name, value, f"at least {least}")


def check_counts(**values: int) -> None:
    """Refuse arguments, by name, that are no whole numbers of at least 1."""
    for name, value in values.items():
        whole = isinstance(value, Integral) and not isinstance(value, bool)  # NumPy's too
        check(whole, name, repr(value), "a whole number")
        check(value >= 1, name, value, "at least 1")


def check_positive(name: str, value: float) -> None:
    """Refuse ``value <= 0`` and infinity."""
    check(0 < value < math.inf, name, value, "a positive number")


def check_choice(name: str, value: object, legal: Any) -> None:
    """Refuse a value that is not one of ``legal``: some values, or a ``Literal`` of them."""
    legal = get_args(legal) or tuple(legal)
    if value not in legal:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, legal))}{nearest(value, legal)}")


def nearest(value: object, legal: Iterable[object]) -> str:
    """The end of a message: the legal name that an unknown one is like, if there is one."""
    found = difflib.get_close_matches(str(value), [name for name in legal if isinstance(name, str)], n=1)
    return f"; did you mean {found[0]!r}?" if found else ""
