"""Write Debian's package graph: nodes are packages, edges what they need, classes their sections.

    apt-cache dumpavail > available
    python -m experiments.convert packages available --out data/packages.npz

Features are the words of the short description, without the package's own name; no split takes the
packages of one source apart. Lists of another day or release give another graph: a text file holds
the checksum of the list, and how many packages it had. Descriptions are under the licenses of
their packages.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import tyro

from experiments.convert.texts import Node, TextGraph, checksum, of_large_classes, words, write
from experiments.train.checks import check
from experiments.train.command_line import program

NEEDS = ("Depends", "Pre-Depends", "Recommends", "Suggests")
"""Fields that name other packages."""


def packages(
    path: Annotated[Path, tyro.conf.Positional], out: Path = Path("data/packages.npz")
) -> None:
    """Write the graph of a list of packages.

    Args:
        path: what ``apt-cache dumpavail`` printed, or a ``Packages`` file.
        out: the file that is written.
    """
    content = path.read_bytes()
    found = read(content.decode(errors="replace"))
    check(found, "path", path, "a list of packages with sections")
    nodes = of_large_classes({name: node_of(name, fields) for name, fields in found.items()})
    edges = {
        (name, other)
        for name in nodes
        for other in needed(found[name])
        if other in nodes and other != name
    }
    source = f"Debian's list of {len(found):,} packages, SHA-256 {checksum([content])}"
    write(TextGraph(nodes, edges, source), out)


def read(text: str) -> dict[str, dict[str, str]]:
    """By name, the fields of each package of the main archive, the first of each name."""
    found: dict[str, dict[str, str]] = {}
    for block in text.split("\n\n"):
        # Lines that go on begin with a space: the long descriptions.
        lines = [line.split(": ", 1) for line in block.split("\n") if line[:1] not in (" ", "")]
        fields = {pair[0]: pair[1] for pair in lines if len(pair) == 2}
        section = fields.get("Section", "/")
        if "Package" in fields and "/" not in section:
            found.setdefault(fields["Package"], fields)
    return found


def node_of(name: str, fields: dict[str, str]) -> Node:
    """A package: its short description, section, and source."""
    source = fields.get("Source", name).split(" ")[0]
    return Node(words(fields.get("Description", ""), without=name), fields["Section"], source)


def needed(fields: dict[str, str]) -> set[str]:
    """The names of packages that one depends on, recommends, or suggests."""
    listed = [part for key in NEEDS for part in re.split("[,|]", fields.get(key, ""))]
    return {part.split("(")[0].split(":")[0].strip() for part in listed}


main = program("convert packages", packages, __doc__)
