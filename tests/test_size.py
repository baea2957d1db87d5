"""Two limits of size; ``python -m tests.test_size`` prints these and other figures.

No function is longer than :data:`FUNCTION_LINES` lines of code, and no file of ``gmoe`` longer than
:data:`FILE_LINES` raw lines. Totals and tokens are printed for review, not asserted.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("gmoe", "vision", "experiments", "examples", "tests", "tools", "docs")

FUNCTION_LINES = 80
"""Lines of code that a function may have, docstrings and comments not counted."""

FILE_LINES = 600
"""Raw lines that a file of ``gmoe`` may have."""


def files(*folders: str) -> list[Path]:
    """Python files, without those that the docs' gallery copies."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(path for path in found if "auto_examples" not in path.parts)


@cache
def code_lines(path: Path) -> frozenset[int]:
    """The numbers of the lines that hold code: no docstrings, comments or blanks."""
    source = path.read_text()
    numbers = set[int]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING):
            numbers |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            numbers -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return frozenset(numbers)


def count_tokens(path: Path) -> int:
    """Names, operators and numbers."""
    kinds = (tokenize.NAME, tokenize.OP, tokenize.NUMBER)
    return sum(
        token.type in kinds
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    )


def functions(path: Path, longer_than: int = 0) -> Iterator[tuple[str, int]]:
    """Name and lines of code of each function of more raw lines than this."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            if len(lines) <= longer_than:
                continue
            yield f"{path.relative_to(ROOT)}:{node.name}", len(code_lines(path).intersection(lines))


def raw_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_function_is_too_long(folder: str) -> None:
    long = {
        name: lines
        for path in files(folder)
        for name, lines in functions(path, longer_than=FUNCTION_LINES)
        if lines > FUNCTION_LINES
    }
    assert files(folder)
    assert not long


def test_no_file_of_the_library_is_too_long() -> None:
    long = {
        str(path.relative_to(ROOT)): raw_lines(path)
        for path in files("gmoe")
        if raw_lines(path) > FILE_LINES
    }
    assert not long


def main() -> None:
    """Print the figures."""
    print(
        f"{'':14} {'files':>6} {'raw lines':>10} {'code':>7} {'tokens':>8} "
        f"{'longest file':>13} {'function':>9}"
    )
    for folder in FOLDERS:
        paths = files(folder)
        code = sum(len(code_lines(path)) for path in paths)
        tokens = sum(map(count_tokens, paths))
        raw = [raw_lines(path) for path in paths]
        longest = max(lines for path in paths for _, lines in functions(path))
        print(
            f"{folder:14} {len(paths):6} {sum(raw):10,} {code:7,} {tokens:8,} "
            f"{max(raw):13,} {longest:9}"
        )


if __name__ == "__main__":
    main()
