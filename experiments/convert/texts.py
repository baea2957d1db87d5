"""Graphs of texts as tasks: each node has words, a class, and a group that no split takes apart."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.train.checks import check
from experiments.train.files import replacing, writing

LEAST = 100
"""Nodes of a class; those of smaller classes leave the graph."""
SPLITS = 10
WIDTH = 128
"""Features: components of the words' TF-IDF."""
MOST_WORDS = 8_000


@dataclass(frozen=True)
class Node:
    """A node of a graph of texts."""

    text: str
    label: str
    group: str
    """Nodes of one group are in one part of each split."""


@dataclass(frozen=True)
class TextGraph:
    """Nodes by name, and edges between names."""

    nodes: dict[str, Node]
    edges: set[tuple[str, str]]
    source: str
    """What it was made from: versions, and a checksum."""


def of_large_classes(nodes: dict[str, Node]) -> dict[str, Node]:
    """The nodes whose class has enough of them."""
    counts = Counter(node.label for node in nodes.values())
    return {name: node for name, node in nodes.items() if counts[node.label] >= LEAST}


def words(text: str, without: str = "") -> str:
    """The words of a text in lower case, but those of ``without``."""
    own = set(re.findall("[a-z0-9]+", without.lower()))
    return " ".join(word for word in re.findall("[a-z0-9+#]+", text.lower()) if word not in own)


def checksum(parts: Iterable[bytes]) -> str:
    """The SHA-256 of what a graph was made from."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def write(graph: TextGraph, out: Path) -> None:
    """Write the ``.npz`` that ``experiments.train`` reads, and say how large the graph is.

    Beside it, ``.source.txt`` holds what it was made from.

    Raises:
        ValueError: fewer nodes or words than there are features, one class, no edge, or so few
            groups that a split has an empty part.
    """
    check(out.suffix == ".npz", "out", out, "FILE.npz")
    names = sorted(graph.nodes)
    place = {name: number for number, name in enumerate(names)}
    kinds = sorted({node.label for node in graph.nodes.values()})
    number = {kind: index for index, kind in enumerate(kinds)}
    check(graph.edges, "edges", "none", "some between nodes of large classes")
    check(len(kinds) > 1, "classes", f"{kinds} of {LEAST} nodes", "two or more")
    edges = np.array(sorted((place[one], place[other]) for one, other in graph.edges)).T
    y = np.array([number[graph.nodes[name].label] for name in names])
    masks = _masks([graph.nodes[name].group for name in names])
    arrays: dict[str, Any] = {
        "x": _features([graph.nodes[name].text for name in names]),
        "y": y,
        "edge_index": edges,
        **masks,
    }
    has_nodes = all(mask.any(axis=0).all() for mask in masks.values())
    check(has_nodes, "groups", "so few that a part of a split is empty", "more")
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as fresh, fresh.open("wb") as file:
        np.savez_compressed(file, **arrays)
    with writing(out):
        out.with_suffix(".source.txt").write_text(f"{graph.source}\n")
    same = (y[edges[0]] == y[edges[1]]).mean()
    print(
        f"{out}: {len(names):,} nodes, {edges.shape[1]:,} edges, {len(kinds)} classes; the largest "
        f"has {np.bincount(y).max() / len(y):.0%} of the nodes, {same:.0%} of edges join one class"
    )
    print(graph.source)


def _features(texts: list[str]) -> NDArray[Any]:
    """(N, 128) the leading components of the texts' TF-IDF, each of deviation 1."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    counted = TfidfVectorizer(min_df=5, max_features=MOST_WORDS, sublinear_tf=True)
    check(len(texts) > WIDTH, "nodes", len(texts), f"more than {WIDTH}")
    weights = counted.fit_transform(texts)
    got = f"{weights.shape[1]} that five texts have"
    check(weights.shape[1] > WIDTH, "words", got, f"more than {WIDTH}")
    x = TruncatedSVD(WIDTH, random_state=0).fit_transform(weights)
    return (x / x.std(0)).astype(np.float32)


def _masks(groups: list[str]) -> dict[str, NDArray[Any]]:
    """Ten splits, 54/18/28, of whole groups."""
    kinds, group = np.unique(groups, return_inverse=True)
    draws = np.stack(
        [np.random.default_rng(seed).random(len(kinds))[group] for seed in range(SPLITS)], axis=1
    )
    return {
        "train_mask": draws < 0.54,
        "val_mask": (draws >= 0.54) & (draws < 0.72),
        "test_mask": draws >= 0.72,
    }
