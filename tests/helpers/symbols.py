"""The names that a Python source defines."""

from __future__ import annotations

import ast
from collections.abc import Iterator


def symbols(source: str) -> Iterator[tuple[str, range]]:
    """Functions, classes, and names that a module or a class assigns, from the outside in.

    Each with its dotted name and its lines, decorators included.
    """

    def inside(parent: ast.AST, prefix: str) -> Iterator[tuple[str, range]]:
        assigns = isinstance(parent, ast.Module | ast.ClassDef)
        for node in ast.iter_child_nodes(parent):
            names, within = list[str](), prefix
            first = getattr(node, "lineno", 0)
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names, within = [node.name], f"{prefix}{node.name}."
                first = min([first, *(decorator.lineno for decorator in node.decorator_list)])
            elif assigns and isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [target.id for target in targets if isinstance(target, ast.Name)]
            for name in names:
                yield prefix + name, range(first, (getattr(node, "end_lineno", 0) or first) + 1)
            yield from inside(node, within)

    yield from inside(ast.parse(source), "")
