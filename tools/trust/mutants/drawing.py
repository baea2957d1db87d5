"""Drawing mutants: the places of the library's sources, and what may replace them.

A *place* is a token of the code that a family of cosmic-ray's operators changes, such as one
``+`` or one number. The sample is a random order of all places, with one of each place's mutants
drawn at random; so any prefix of it is a random sample too. Places in annotations, f-strings (the
texts of errors), assertions, ``__all__`` and blocks for the type checker are left out, since no
test should look at them.
"""

from __future__ import annotations

import ast
import difflib
import random
import warnings
from collections import Counter, defaultdict
from typing import NamedTuple

from tests.helpers.symbols import symbols
from tools.trust.page import ROOT

MODULES = tuple(
    sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "gmoe").rglob("*.py")
        if path.name != "__init__.py" or path.parent.name == "routers"
    )
)
"""What is mutated: all of gmoe but the ``__init__`` files that only name what others define."""


def sources() -> dict[str, str]:
    return {file: (ROOT / file).read_text() for file in MODULES}


class Mutant(NamedTuple):
    """Some lines of a file, and what replaces them."""

    file: str
    operator: str
    line: int
    before: list[str]
    after: list[str]

    def source(self, original: str) -> str | None:
        """The mutated source; None if the lines are gone. They may have moved meanwhile."""
        lines = original.splitlines(keepends=True)
        size = len(self.before)
        found = [i for i in range(len(lines)) if lines[i : i + size] == self.before]
        if not found:
            return None
        start = min(found, key=lambda i: abs(i + 1 - self.line))
        return "".join([*lines[:start], *self.after, *lines[start + size :]])


def unseen(node: ast.AST) -> ast.expr | ast.stmt | None:
    """What of a node no test should look at."""
    if isinstance(node, ast.arg | ast.AnnAssign):
        return node.annotation
    if isinstance(node, ast.FunctionDef):
        return node.returns
    if isinstance(node, ast.JoinedStr | ast.Assert):
        return node
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return node
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
        return node
    return None


def unseen_spans(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Their spans."""
    lines = source.splitlines()

    def column(line: int, offset: int) -> int:
        """In characters; that of ``ast`` is in bytes."""
        return len(lines[line - 1].encode()[:offset].decode())

    spans = []
    found = map(unseen, ast.walk(ast.parse(source)))
    for node in (node for node in found if node is not None):
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = (node.lineno, column(node.lineno, node.col_offset))
        spans.append((start, (node.end_lineno, column(node.end_lineno, node.end_col_offset))))
    return spans


def places(source: str) -> dict[tuple[tuple[int, int], str], list[tuple[str, int]]]:
    """The mutants of each place: an operator, and which of its occurrences in the file."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    # The rest asks for arguments: names of variables to replace.
    operators = {
        name: get_operator(name)()
        for name in operator_names()
        if not get_operator(name).arguments()
    }
    spans = unseen_spans(source)
    seen = Counter[str]()
    found = defaultdict(list)
    for node in ast_nodes(get_ast(source)):
        if node.type in ("name", "string", "newline"):
            continue
        for name, operator in operators.items():
            for start, _ in operator.mutation_positions(node):
                if not any(first <= start < last for first, last in spans):
                    found[start, name.split("_")[0]].append((name, seen[name]))
                seen[name] += 1
    return found


def drawn(file: str, source: str, operator: str, occurrence: int) -> Mutant | None:
    """One mutant as a change of lines; None if it reads the same.

    Or if Python refuses it, or warns, as of ``is`` beside a literal.
    """
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    mutated = mutate_code(source, get_operator(operator)(), occurrence)
    try:
        if mutated is None or ast.dump(ast.parse(mutated)) == ast.dump(ast.parse(source)):
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            compile(mutated, file, "exec", dont_inherit=True)
    except (SyntaxError, SyntaxWarning):
        return None
    old, new = source.splitlines(keepends=True), mutated.splitlines(keepends=True)
    changes = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    changes = [change for change in changes if change[0] != "equal"]
    (_, first, _, start, _), (_, _, last, _, stop) = changes[0], changes[-1]
    return Mutant(file, operator.removeprefix("core/"), first + 1, old[first:last], new[start:stop])


def sample(seed: int, size: int) -> tuple[int, list[Mutant]]:
    """The number of places, and the first mutants of a random order of them."""
    order, rng = [], random.Random(seed)
    for file, source in sources().items():
        order += [(file, *item) for item in sorted(places(source).items())]
    rng.shuffle(order)
    mutants: list[Mutant] = []
    for file, _, choices in order:
        rng.shuffle(choices)
        found = (drawn(file, (ROOT / file).read_text(), *choice) for choice in choices)
        mutants += [mutant for mutant in [next(filter(None, found), None)] if mutant]
        if len(mutants) == size:
            break
    return len(order), mutants


def symbol_of(mutant: Mutant, source: str) -> str:
    """The innermost symbol that a mutant changes, by which the page refers to it.

    Line numbers would be wrong after the next change of the file.
    """
    # A mutant that takes a decorator may begin in the blank lines above it.
    line = mutant.line + len(mutant.before) - 1
    return [name for name, lines in symbols(source) if line in lines][-1]
