"""How many functions of the library a call passes; ``python -m tests.gmoe.test_road`` prints them.

A forward in training counts, of :class:`gmoe.MoEConv` and :class:`gmoe.MoE` as people build them first. Comprehensions
are no functions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch_geometric.nn import GCNConv

import gmoe

ROOT = Path(gmoe.__file__).parent


def moe_conv() -> Callable[[], Any]:
    layer, x, edge_index = gmoe.MoEConv(GCNConv, 16, 16), torch.randn(30, 16), torch.randint(30, (2, 90))
    return lambda: layer(x, edge_index)


def mixture() -> Callable[[], Any]:
    layer, x = gmoe.MoEConv(GCNConv, 16, 16, shared_expert=False), torch.randn(30, 16)
    edge_index = torch.randint(30, (2, 90))
    return lambda: layer(x, edge_index)


def moe() -> Callable[[], Any]:
    layer, x = gmoe.MoE(gmoe.TokenChoice(16, 8), gmoe.MLPExperts(16, 32, 16, 8)), torch.randn(30, 16)
    return lambda: layer(x)


LIMITS = {"MoEConv": (moe_conv, 28, 9), "MoEConv, plain mixture": (mixture, 25, 9), "MoE": (moe, 20, 8)}
"""The call, and at most how many functions in how many files."""


def road(call: Callable[[], Any]) -> list[tuple[str, str]]:
    """(file, function) of the library's functions that a call passes."""
    passed = set[tuple[str, str]]()

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(ROOT)) and not code.co_name.endswith(("comp>", "expr>")):
            name = getattr(code, "co_qualname", f"{code.co_name}, line {code.co_firstlineno}")  # from Python 3.11 on
            passed.add((str(Path(code.co_filename).relative_to(ROOT)), name))

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return sorted(passed)


@pytest.mark.parametrize("name", LIMITS)
def test_a_call_passes_few_functions(name: str) -> None:
    build, most_functions, most_files = LIMITS[name]
    passed = road(build())
    assert passed
    assert len(passed) <= most_functions, passed
    assert len({file for file, _ in passed}) <= most_files, passed


if __name__ == "__main__":
    for name, (build, most_functions, most_files) in LIMITS.items():
        passed = road(build())
        files = {file for file, _ in passed}
        print(f"{name}: {len(passed)} functions (at most {most_functions}), {len(files)} files (at most {most_files})")
        print(*(f"    {file:24} {function}" for file, function in passed), sep="\n")
