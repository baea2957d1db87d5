"""Write what Python packages define as a graph: nodes are functions and classes, classes packages.

    pip download --no-deps --only-binary :all: -d wheels sympy scipy pandas ...
    python -m experiments.convert definitions wheels --out data/definitions.npz

Nodes stand at the top of a file and have a docstring. An edge leads from what uses a name to what
defines it, in whatever package, if no other definition has the name. Features are the words of
docstring and names, without that of the package; no split takes one file apart. A text file holds
the names of the wheels, which have versions, and their checksum. The texts are under the licenses
of their packages.
"""

from __future__ import annotations

import ast
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple, TypeAlias

import tyro

from experiments.convert.texts import Node, TextGraph, checksum, of_large_classes, words, write
from experiments.train.checks import check
from experiments.train.command_line import program
from experiments.train.files import naming

Defined: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Definition(NamedTuple):
    """A function or a class."""

    path: str
    """Where it is: file, line, and name."""
    name: str
    node: Node
    uses: set[str]


def definitions(
    folder: Annotated[Path, tyro.conf.Positional], out: Path = Path("data/definitions.npz")
) -> None:
    """Write the graph of a folder of wheels.

    Args:
        folder: the wheels; each is a class, if it defines enough.
        out: the file that is written.
    """
    wheels = sorted(folder.glob("*.whl"))
    check(wheels, "folder", f"no wheels in {folder}", "some: pip download --no-deps -d FOLDER NAME")
    found = [one for wheel in wheels for one in defined_by(wheel)]
    nodes = of_large_classes({one.path: one.node for one in found})
    found = [one for one in found if one.path in nodes]
    known = {one.name: one.path for one in found}
    counts = Counter(one.name for one in found)
    edges = {
        (one.path, known[name])
        for one in found
        for name in one.uses
        if counts[name] == 1 and known[name] != one.path
    }
    names = ", ".join(wheel.name.split("-cp")[0].split("-py")[0] for wheel in wheels)
    source = f"{names}; SHA-256 {checksum(wheel.read_bytes() for wheel in wheels)}"
    write(TextGraph(nodes, edges, source), out)


def defined_by(wheel: Path) -> Iterator[Definition]:
    """What the files of a wheel define, but its tests; files that this Python cannot parse are
    left out.
    """
    label = wheel.name.split("-")[0].lower()
    with naming(wheel), zipfile.ZipFile(wheel) as archive:
        files = [name for name in sorted(archive.namelist()) if name.endswith(".py")]
        for file in files:
            if not re.search(r"(^|/)tests?(/|_)|_test\.py$|conftest", file):
                yield from _of_file(archive.read(file), file, label)


def _of_file(content: bytes, file: str, label: str) -> Iterator[Definition]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other people's escapes in strings
            tree = ast.parse(content)
    except (SyntaxError, ValueError):
        return
    for part in tree.body:
        if isinstance(part, Defined) and (text := ast.get_docstring(part)):
            text = f"{text.split('>>>')[0]} {_apart(part.name)}"
            node = Node(words(text, without=_apart(label)), label, f"{label}/{file}")
            yield Definition(
                f"{label}/{file}:{part.lineno}:{part.name}", part.name, node, _uses(part)
            )


def _apart(name: str) -> str:
    """The words of a name: ``read_csv`` and ``ReadCsv`` are two each."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_", " ", name)


def _uses(definition: Defined) -> set[str]:
    """The names that the code of a definition mentions."""
    names = {part.id for part in ast.walk(definition) if isinstance(part, ast.Name)}
    return names | {part.attr for part in ast.walk(definition) if isinstance(part, ast.Attribute)}


main = program("convert definitions", definitions, __doc__)
