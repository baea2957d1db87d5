"""How large the project is, and how much of it a call passes; ``python -m tests.test_size`` prints the figures.

The limits only fall: a change that lowers a figure lowers its limit too; only an issue that names a number raises one.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from torch_geometric.nn import GCNConv

import gmoe

ROOT = Path(__file__).parent.parent
LIBRARY = Path(gmoe.__file__).parent

LIMITS: dict[str, tuple[int, int]] = {
    # figure: (limit, what DESIGN asks for)
    "gmoe, lines of code": (4_653, 4_900),
    "gmoe, tokens": (55_665, 56_000),
    "gmoe, longest function": (58, 60),
    "vision, raw lines": (472, 500),
    "experiments, raw lines": (6_790, 6_800),
    "experiments, files": (37, 40),
    "tests, raw lines": (12_781, 12_800),
    "tests/gmoe and tests/*.py, raw lines": (8_368, 8_800),
    "MoEConv, functions passed": (23, 20),
    "MoEConv, files passed": (9, 9),
    "MoEConv, lines of code passed": (312, 300),
    "plain mixture, functions passed": (22, 20),
    "plain mixture, files passed": (9, 9),
    "plain mixture, lines of code passed": (305, 300),
    "MoE, functions passed": (19, 17),
    "MoE, files passed": (7, 8),
    "MoE, lines of code passed": (167, 180),
}


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


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache
def code_lines(path: Path) -> frozenset[int]:
    """The numbers of the lines that hold code: no docstrings, comments and blanks."""
    source = path.read_text()
    found = set[int]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING):
            found |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return frozenset(found)


def tokens(path: Path) -> int:
    """Names, operators and numbers."""
    kinds = (tokenize.NAME, tokenize.OP, tokenize.NUMBER)
    return sum(token.type in kinds for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline))


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Name and lines of code of each function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            yield f"{path.relative_to(ROOT)}:{node.name}", len(code_lines(path).intersection(lines))


def raw(paths: list[Path]) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


def road(call: Callable[[], Any]) -> set[CodeType]:
    """The library's functions that a call passes; comprehensions are none."""
    passed = set[CodeType]()

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if (
            event == "call"
            and code.co_filename.startswith(str(LIBRARY))
            and not code.co_name.endswith(("comp>", "expr>"))
        ):
            passed.add(code)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return passed


def lines_of(code: CodeType) -> int:
    """Lines of code of a function."""
    path, last = Path(code.co_filename), max(line for *_, line in code.co_lines() if line is not None)
    return len(code_lines(path).intersection(range(code.co_firstlineno, last + 1)))


@cache
def figures() -> dict[str, int]:
    library = files("gmoe")
    found = {
        "gmoe, lines of code": sum(len(code_lines(path)) for path in library),
        "gmoe, tokens": sum(map(tokens, library)),
        "gmoe, longest function": max(lines for path in library for _, lines in functions(path)),
        "vision, raw lines": raw(files("vision")),
        "experiments, raw lines": raw(files("experiments")),
        "experiments, files": len(files("experiments")),
        "tests, raw lines": raw(files("tests")),
        "tests/gmoe and tests/*.py, raw lines": raw([*files("tests/gmoe"), *sorted((ROOT / "tests").glob("*.py"))]),
    }
    for name, build in (("MoEConv", moe_conv), ("plain mixture", mixture), ("MoE", moe)):
        passed = road(build())
        found[f"{name}, functions passed"] = len(passed)
        found[f"{name}, files passed"] = len({code.co_filename for code in passed})
        found[f"{name}, lines of code passed"] = sum(map(lines_of, passed))
    return found


@pytest.mark.parametrize("name", LIMITS)
def test_size(name: str) -> None:
    assert 0 < figures()[name] <= LIMITS[name][0]


def test_limits_are_no_looser_than_they_have_to_be() -> None:
    """Within two hundredths, or one; so what was won is not lost again."""
    loose = {
        name: limit for name, (limit, _) in LIMITS.items() if limit > max(figures()[name] * 1.02, figures()[name] + 1)
    }
    assert not loose


if __name__ == "__main__":
    print(f"{'':38} {'today':>8} {'limit':>8} {'asked':>8}")
    for name, today in figures().items():
        print(f"{name:38} {today:8,} {LIMITS[name][0]:8,} {LIMITS[name][1]:8,}")
    for file, name in sorted(
        (Path(c.co_filename).name, getattr(c, "co_qualname", c.co_name)) for c in road(moe_conv())
    ):
        print(f"    MoEConv {file:20} {name}")
