"""Write WordNet as a graph: nodes are its synsets, classes its lexicographer files.

    apt-get download wordnet-base && dpkg -x wordnet-base*.deb wordnet
    python -m experiments.convert synsets wordnet/usr/share/wordnet --out data/synsets.npz

Edges are all relations but those that lead up and down the hierarchy, which would give the classes
away: derivation, parts, topics, antonyms, similar and related meanings. Features are the words of
the gloss, without those of the synset itself; no split takes apart synsets of one first word.
WordNet 3.0 (Princeton University, 2006) is free to use with its notice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from experiments.convert.texts import Node, TextGraph, checksum, of_large_classes, words, write
from experiments.train.checks import check
from experiments.train.command_line import program
from experiments.train.files import naming

FILES = {"data.noun": "n", "data.verb": "v", "data.adj": "a", "data.adv": "r"}
"""WordNet's tables of synsets, and the part of speech that other tables call each."""
HIERARCHY = ("@", "@i", "~", "~i")
"""Hypernyms and hyponyms, also of instances."""


class Synset(NamedTuple):
    """A line of a table."""

    name: str
    node: Node
    related: list[str]


def synsets(
    folder: Annotated[Path, tyro.conf.Positional], out: Path = Path("data/synsets.npz")
) -> None:
    """Write the graph of WordNet's files.

    Args:
        folder: where ``data.noun``, ``data.verb``, ``data.adj`` and ``data.adv`` are.
        out: the file that is written.
    """
    missing = [name for name in FILES if not (folder / name).is_file()]
    check(not missing, "folder", f"no {', '.join(missing)} in {folder}", "WordNet's data files")
    contents = {part: (folder / name).read_bytes() for name, part in FILES.items()}
    with naming(folder):
        found = [
            synset_of(line, part)
            for part, content in contents.items()
            for line in content.decode().splitlines()
            if not line.startswith("  ")  # the license, at the head of each
        ]
    nodes = of_large_classes({one.name: one.node for one in found})
    edges = {
        (one.name, other)
        for one in found
        for other in one.related
        if one.name in nodes and other in nodes and other != one.name
    }
    source = f"WordNet's {len(found):,} synsets, SHA-256 {checksum(contents.values())}"
    write(TextGraph(nodes, edges, source), out)


def synset_of(line: str, part: str) -> Synset:
    """A synset: offset, lexicographer file, words, pointers, and its gloss."""
    data, _, gloss = line.partition("|")
    offset, file, _, count, *rest = data.split()
    lemmas = rest[: 2 * int(count, 16) : 2]
    pointers = rest[2 * int(count, 16) + 1 :]
    related = [
        # Satellites of adjectives lie in the table of adjectives.
        f"{pointers[at + 2].replace('s', 'a')}{pointers[at + 1]}"
        for at in range(0, 4 * int(rest[2 * int(count, 16)]), 4)
        if pointers[at] not in HIERARCHY
    ]
    text = words(gloss, without=" ".join(lemmas).replace("_", " "))
    return Synset(f"{part}{offset}", Node(text, file, lemmas[0].lower()), related)


main = program("convert synsets", synsets, __doc__)
