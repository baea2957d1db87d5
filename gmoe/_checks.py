"""Argument checks: every message names the argument, the value got, and the legal values."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral
from typing import Any, get_args

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

EXTRAS = {
    "torch_geometric": "graph",
    "torchmetrics": "graph",
    "tqdm": "graph",
    "torchvision": "vision",
}
EXTRAS |= {"matplotlib": "plot", "safetensors": "hub", "huggingface_hub": "hub"}
"""The extra that brings a package."""

SIMILAR = 0.65
"""Least likeness of names, from 0 to 1, at which one is suggested for the other."""


@contextmanager
def naming_extras() -> Iterator[None]:
    """Name the extra that brings a package which cannot be imported."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in EXTRAS:
            raise
        raise ImportError(
            f'this part of gmoe needs {package}: pip install "gmoe[{EXTRAS[package]}]"'
        ) from error


def check(valid: object, name: str, got: object, expected: object) -> None:
    """Refuse what is not valid; not by sizes of tensors in a forward, which compilers would take as
    fixed.
    """
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


def check_choice(name: str, value: object, legal: Any, also_called: Mapping[Any, str] = {}) -> None:
    """Refuse a value that is not one of ``legal``: some values, or a ``Literal`` of them.

    ``also_called`` has legal names by what else they are called.
    """
    legal = get_args(legal) or tuple(legal)
    if value not in legal:
        hint = (
            f"; did you mean {also_called[value]!r}?"
            if value in also_called
            else nearest(value, legal)
        )
        raise ValueError(
            f"{name}: got {value!r}, expected one of {', '.join(map(repr, legal))}{hint}"
        )


def nearest(value: object, legal: Iterable[object]) -> str:
    """The end of a message: the legal name that is most like an unknown one, if any is like it."""
    unknown = str(value).lower()

    def likeness(name: str) -> tuple[float, bool, int]:
        """How alike two names are; of equally alike ones, swapped letters and a common start count
        more.
        """
        ratio = difflib.SequenceMatcher(None, unknown, name).ratio()
        return ratio, sorted(unknown) == sorted(name), _common_start(unknown, name)

    names = [name for name in legal if isinstance(name, str)]
    best = max(names, key=likeness, default="")
    words = [name for name in names if name in unknown.split("_")]  # the k of top_k
    if words:
        best = words[0]
    elif not best or likeness(best)[0] < SIMILAR:
        return ""
    return f"; did you mean {best!r}?"


def _common_start(one: str, other: str) -> int:
    """The number of letters that two words start with alike."""
    different = [place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b]
    return different[0] if different else min(len(one), len(other))


def must_be_called(module: nn.Module) -> bool:
    """True if the module has forward or backward hooks, or a patched forward, which only a call
    runs.
    """
    of_forward = module._forward_pre_hooks or module._forward_hooks
    return bool(
        of_forward or module._backward_pre_hooks or module._backward_hooks
    ) or "forward" in vars(module)


def change_of(module: nn.Module) -> str | None:
    """What somebody put on a module or changed in it, which nothing that reads only its weights
    would notice.

    Returns:
        Words for a message, or ``None`` for a module as its class makes it.
    """
    tables = [
        hooks
        for name, hooks in vars(module).items()
        if name.endswith("_hooks") and isinstance(hooks, dict)
    ]
    for hook in (hook for hooks in tables for hook in hooks.values()):
        function = getattr(hook, "hook", hook)  # torch wraps hooks on states
        # PyG's own layers have hooks on their states.
        if not str(getattr(function, "__module__", "")).startswith("torch_geometric."):
            return "hooks"
    patched = [
        name for name in vars(module) if inspect.isfunction(getattr(type(module), name, None))
    ]
    if patched:
        return f"a {patched[0]} of its own"
    if is_parametrized(module):
        return "a parametrized weight"
    if any(type(parameter) is not nn.Parameter for parameter in module.parameters(recurse=False)):
        return "parameters of their own class"
    plain_linear = type(module).forward is nn.Linear.forward and set(module._parameters) == {
        "weight",
        "bias",
    }
    if isinstance(module, nn.Linear) and not plain_linear:
        return f"a linear layer of its own class, {type(module).__name__}"
    return None
