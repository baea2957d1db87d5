"""What the public signatures of gmoe have in common."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

import pytest

import gmoe
import gmoe.plot
from gmoe.routers.balance import BalancedRouter


def public() -> Iterator[tuple[str, Callable[..., Any]]]:
    """The classes and functions that a user imports, by name, and the methods of the classes."""
    modules = (gmoe, gmoe.plot, importlib.import_module("gmoe.routers"))
    for module in modules:
        for name in module.__all__:
            value = getattr(module, name)
            if callable(value):
                yield f"{module.__name__}.{name}", value
    yield "gmoe.routers.balance.BalancedRouter", BalancedRouter


def calls() -> Iterator[tuple[str, Callable[..., Any]]]:
    for name, value in public():
        yield name, value
        if isinstance(value, type):
            for method in vars(value):
                if not method.startswith("_") and callable(getattr(value, method)):
                    yield f"{name}.{method}", getattr(value, method)


def signature(call: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(call)
    except ValueError:  # written in C
        return None


TAKE_EXPERTS = {
    name: found.parameters["num_experts"]
    for name, call in calls()
    if (found := signature(call)) is not None and "num_experts" in found.parameters
}


def test_the_public_calls_are_found() -> None:
    names = {
        "gmoe.MoEConv",
        "gmoe.TokenChoice",
        "gmoe.Routing.from_choices",
        "gmoe.moefy",
        "gmoe.plot.palette",
    }
    assert names <= set(TAKE_EXPERTS)


@pytest.mark.parametrize("name", TAKE_EXPERTS)
def test_the_number_of_experts_is_given_by_name(name: str) -> None:
    assert TAKE_EXPERTS[name].kind is inspect.Parameter.KEYWORD_ONLY


def said_defaults(call: Callable[..., Any]) -> dict[str, Any]:
    """The defaults that the docstring names, by argument, as Python reads them."""
    found = {}
    said = f"{inspect.getdoc(call)}\n"
    arguments = re.findall(r"^Args:\n((?:(?: {4}.*)?\n)+)", said, re.MULTILINE)
    for name, text in re.findall(
        r"^ {4}(\w+): (.*(?:\n(?: {5,}.*)?)*)", "".join(arguments), re.MULTILINE
    ):
        one_line = " ".join(text.split())
        values = re.findall(r"``([^`]+)`` \(default\)", one_line)
        values += re.findall(r"default (?:``)?([^`]+?)(?:``|[,;)])", one_line)
        for value in values[:1]:
            with contextlib.suppress(ValueError, SyntaxError):  # such as another argument's name
                found[name] = ast.literal_eval(value)
    return found


def default_of(call: Any, parameter: inspect.Parameter) -> Any:
    """The default of an argument; of a dataclass, what a factory makes."""
    if is_dataclass(call):
        for field in fields(call):
            if field.name == parameter.name and field.default_factory is not MISSING:
                return field.default_factory()
    return parameter.default


SAID = {
    f"{name}: {argument}": (default, value)
    for name, call in calls()
    if (found := signature(call)) is not None
    for argument, value in said_defaults(call).items()
    if argument in found.parameters
    and ((default := default_of(call, found.parameters[argument])) is not None or value is None)
}
"""Where a call's default is ``None`` and another is said, it depends on other arguments."""


def test_the_defaults_of_docstrings_are_found() -> None:
    assert SAID["gmoe.TokenChoice: balance"][1] == "bias"
    assert SAID["gmoe.ExpertChoice: z_coef"][1] == 0
    assert SAID["gmoe.MultiCentroid.init_from_data: seed"][1] == 0
    assert SAID["gmoe.MLPExperts: glu"][1] is False
    assert len(SAID) > 80


def test_every_default_is_what_the_docstring_says() -> None:
    assert {name: value for name, (value, said) in SAID.items() if value != said} == {}
