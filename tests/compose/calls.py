"""Calls that are drawn, made and printed: what is printed is what ran."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import gmoe


class Call:
    """A function and its arguments, some of which may be calls."""

    def __init__(self, function: Callable[..., Any], *args: Any, **options: Any) -> None:
        self.function = function
        self.args = args
        self.options = options

    def made(self) -> Any:
        """What the call gives, each time anew."""
        options = {name: made(value) for name, value in self.options.items()}
        return self.function(*map(made, self.args), **options)

    def __repr__(self) -> str:
        name = self.function.__name__
        home = "gmoe" if hasattr(gmoe, name) else self.function.__module__
        rows = [*map(repr, self.args), *(f"{key}={one!r}" for key, one in self.options.items())]
        return f"{home}.{name}({', '.join(rows)})"


def made(value: Any) -> Any:
    return value.made() if isinstance(value, Call) else value


def source(value: Any) -> str:
    """Python that gives the value: classes by the names that they are imported by."""
    return re.sub(r"<class '([\w.]+)'>", r"\1", repr(value))


def script_of(target: Any, case: Any, module: Call) -> str:
    """Python that makes the module as gmoe is called, and that runs the case again."""
    drawn = source(case)
    homes = sorted({type(case).__module__, type(target).__module__})
    return "\n".join(
        [
            "import functools, gmoe, tests.compose.drawing, torch, torch_geometric",
            "from torch import tensor",
            *(f"from {home} import *" for home in homes),
            f"case = {drawn}",
            "_ = torch.manual_seed(case.seed)",
            f"module = {source(module).replace(drawn, 'case')}",
            f"print({type(target).__name__}().run(case))",
        ]
    )
