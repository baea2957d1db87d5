"""What the public signatures of gmoe have in common."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
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
        "gmoe.HeteroMoEConv",
        "gmoe.TokenChoice",
        "gmoe.Routing.from_choices",
        "gmoe.moefy",
        "gmoe.plot.palette",
    }
    assert names <= set(TAKE_EXPERTS)


@pytest.mark.parametrize("name", TAKE_EXPERTS)
def test_the_number_of_experts_is_given_by_name(name: str) -> None:
    assert TAKE_EXPERTS[name].kind is inspect.Parameter.KEYWORD_ONLY
