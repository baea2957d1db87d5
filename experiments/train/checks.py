"""Refuse what does not fit, in one line that says what was expected."""

from __future__ import annotations

import difflib
import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SHARES = ("label_smoothing", "dropout", "input_dropout", "drop_path", "model_ema_decay")
"""Options from 0 to less than 1."""
FROM_0 = (
    *SHARES,
    "clip_norm",
    "weight_decay",
    "lr",
    "workers",
    "reprob",
    "mixup",
    "cutmix",
)
FROM_1 = (
    "experts",
    "k",
    "hidden",
    "layers",
    "every",
    "epochs",
    "batch_size",
    "eval_every",
    "patch",
    "dim",
    "vit_heads",
    "image_size",
    "devices",
    "grad_accum_steps",
)
LEAST = dict.fromkeys(FROM_0, 0) | dict.fromkeys(FROM_1, 1)
"""The smallest legal values."""


def check(is_legal: object, name: str, got: object, expected: object) -> None:
    """Refuse what is not legal; as gmoe's, without torch."""
    if not is_legal:
        raise ValueError(f"{name}: got {got}, expected {expected}")


def check_choice(name: str, got: str, legal: Iterable[str]) -> None:
    """Refuse a name that is not one of ``legal``, and suggest the nearest of them."""
    known = list(legal)
    check(got in known, name, repr(got), f"one of {', '.join(known)}{nearest(got, known)}")


def check_first(name: str, args: Sequence[str], legal: Iterable[str]) -> None:
    """Refuse a command line that does not begin with one of the names whose options follow."""
    check(not args[0].startswith("-"), name, repr(args[0]), f"the {name} first, then its options")
    check_choice(name, args[0], legal)


def nearest(got: str, legal: Iterable[str]) -> str:
    """The end of a message: the legal name that an unknown one is like, if there is one."""
    # No more of it: a broken file may hold a word of megabytes
    close = difflib.get_close_matches(got[:100], legal, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_object(option: str, value: str | None, known: Sequence[str] = ()) -> None:
    """Refuse what names neither one of ``known`` nor code of the user."""
    if value is None or value in known or all(value.rpartition(":")):
        return
    names = f"{', '.join(known)}, or " if known else ""
    legal = f"{names}package.module:name or FILE.py:name{nearest(value, known)}"
    check(False, option, repr(value), legal)


def check_numbers(values: Mapping[str, Any]) -> None:
    """Refuse options that are no finite numbers, or beyond their bounds."""
    for name, value in values.items():
        is_finite = not isinstance(value, float) or math.isfinite(value)
        check(is_finite, name, value, "a finite number")
        if name in LEAST and value is not None:
            check(value >= LEAST[name], name, value, f"at least {LEAST[name]}")
        check(name not in SHARES or value < 1, name, value, "less than 1")


def check_installed(option: str, packages: Iterable[str]) -> None:
    """Refuse packages that are not there."""
    for name in packages:
        legal = f"its package installed: pip install {name}"
        check(importlib.util.find_spec(name), option, repr(name), legal)


def check_seeds(seeds: Sequence[int]) -> None:
    """Refuse none, seeds that come twice, and what is no seed of torch's generators."""
    are_distinct = 0 < len(set(seeds)) == len(seeds)
    are_legal = are_distinct and 0 <= min(seeds) <= max(seeds) < 2**32
    check(are_legal, "seeds", seeds, "one number or more from 0 to 2**32 - 1, each once")
