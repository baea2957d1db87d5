"""Graphs that need no file. Frozen: figures in results/ depend on every draw."""

from __future__ import annotations

import re

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neighbors import kneighbors_graph
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch_geometric.data import Data

from experiments.train.data.task import GraphData, Splits
from gmoe._checks import check

# Of mosaic
NODES = 8_000
REGIONS = 8
CLASSES = 16
FEATURES = 32


def digits_split(labels: np.ndarray) -> Splits:
    """A fixed stratified split, 50 / 25 / 25."""
    train, rest = train_test_split(
        np.arange(len(labels)), train_size=0.5, stratify=labels, random_state=0
    )
    val, test = train_test_split(rest, train_size=0.5, stratify=labels[rest], random_state=0)
    return {
        "train": torch.from_numpy(train),
        "val": torch.from_numpy(val),
        "test": torch.from_numpy(test),
    }


def digits_graph() -> GraphData:
    """scikit-learn's 1,797 handwritten digits (8x8, 10 classes; UCI, CC BY 4.0) as nodes.

    An edge, in both directions, where either is among the other's 10 nearest neighbors.
    """
    digits = load_digits()
    with threadpool_limits(1):  # neighbors of equal distance would follow the number of threads
        near = kneighbors_graph(digits.data, n_neighbors=10, include_self=False)
    edges = np.stack(near.maximum(near.T).nonzero())
    split = digits_split(digits.target)
    data = _data(digits.data / 16.0, edges, digits.target)
    return GraphData(name="digits-graph", data=data, splits=lambda _: split, num_outputs=10)


def mosaic() -> GraphData:
    """8,000 nodes in 8 regions; a neighbor's class tells a node's own, by a permutation that each
    region has.

    Features are class center N(0, 1) + 3 x region center N(0, 1) + 3 x N(0, 1) noise. The
    80,000 directed edges lie inside a region; the source's class is the region's permutation
    (the identity in region 0) of the destination's, or in 15 % of the edges a random one. Split
    50 / 25 / 25. ``planted`` is the region: the one data set on which the right routing is
    known.
    """
    return _regions("mosaic", NODES, REGIONS, labels=NODES // 2)


SHOWN = {"features": 3.0, "neighbors": 0.5, "nothing": 0.0}
"""How a node's regime shows: the factor of its center in features whose noise has 3. At 0.5 a node
says little, but the mean of ten neighbors does."""


def regimes(name: str) -> GraphData:
    """``regimes-R-L-SHOWN``: :func:`mosaic` with R regimes, L training labels in each, and SHOWN
    of :data:`SHOWN`.

    1,000 nodes a regime, at least 4,000, and ten edges a node; what is not trained on is half
    validation, half test.
    """
    match = re.fullmatch(r"regimes-([1-9]\d?)-([1-9]\d{0,2})-(\w+)", name)
    legal = (
        f"regimes-R-L-SHOWN with R from 1 to 99, L from 1 to 800, SHOWN one of {', '.join(SHOWN)}"
    )
    count, labels, shown = match.groups() if match else ("0", "0", "")
    check(shown in SHOWN and int(labels) <= 800, "dataset", repr(name), legal)
    regions = int(count)
    nodes = max(4_000, 1_000 * regions)
    return _regions(name, nodes, regions, labels=regions * int(labels), shown=SHOWN[shown])


def _regions(name: str, nodes: int, regions: int, labels: int, shown: float = 3.0) -> GraphData:
    edges = 10 * nodes
    # Its streams are frozen, unlike those of numpy's newer generators
    rng = np.random.RandomState(0)
    region = rng.permutation(np.arange(nodes) % regions)
    label = rng.randint(CLASSES, size=nodes)
    class_center = rng.standard_normal((CLASSES, FEATURES))
    region_center = rng.standard_normal((regions, FEATURES))
    x = (
        class_center[label]
        + shown * region_center[region]
        + 3 * rng.standard_normal((nodes, FEATURES))
    )

    permutation = np.stack(
        [np.arange(CLASSES), *(rng.permutation(CLASSES) for _ in range(regions - 1))]
    )
    destination = rng.randint(nodes, size=edges)
    source_label = permutation[region[destination], label[destination]]
    stray = rng.uniform(size=edges) < 0.15
    source_label[stray] = rng.randint(CLASSES, size=int(stray.sum()))
    source = np.empty(edges, dtype=np.int64)
    for r in range(regions):
        for c in range(CLASSES):
            wanted = (region[destination] == r) & (source_label == c)
            source[wanted] = rng.choice(
                np.flatnonzero((region == r) & (label == c)), size=int(wanted.sum())
            )

    held = (nodes - labels) // 2
    train, val, test = torch.from_numpy(rng.permutation(nodes)).split(
        [labels, held, nodes - labels - held]
    )
    return GraphData(
        name=name,
        data=_data(x, np.stack([source, destination]), label),
        splits=lambda _: {"train": train, "val": val, "test": test},
        num_outputs=CLASSES,
        planted=torch.from_numpy(region).long(),
    )


CONCEPT_CLASSES = 8
CONCEPT_FEATURES = 16
"""Of concept graphs: features that the label follows from."""
SIGN_FEATURES = 8
"""Of concept graphs: features that show the regime."""
CONCEPT_SHOWN = ("features", "communities", "patches", "nothing")
"""How a concept graph's regimes show."""
INSIDE = 0.7
"""Share of edges from a node's own regime, where regimes are communities."""
CELLS = 6
"""Cells along a side of the plane, where regimes are patches."""


def concept(name: str) -> GraphData:
    """``concept-R-L-SHOWN``: R regimes, each with a rule of its own that turns neighbors' features
    into a label.

    ``y = argmax(x U + h W_regime)`` with ``h`` the sum of in-neighbors' features over the
    square root of the in-degree. All features, U and W are N(0, 1); 5 % of the labels are
    random. Neighbors are drawn without regard to class, so that edges say nothing of it, in no
    direction. 1,000 nodes a regime, at least 4,000, ten edges into a node (on average, but for
    patches), L training labels a regime; what is not trained on is half validation, half test.
    ``planted`` is the regime.

    SHOWN says where a regime shows. ``features``: in eight more features, 3 x regime center
    N(0, 1) + 3 x N(0, 1). ``communities``: 70 % of the edges come from the node's own regime.
    ``patches``: nodes lie on a square of 6 x 6 cells, each of one regime, and hear their ten
    nearest. ``nothing``: nowhere, as neighbors are drawn without regard to regime too.

    ``concept-R-L-SHOWN-told`` is the same graph, and 3 x the regime, one-hot, in R more features.
    """
    pattern = rf"concept-([1-9]\d?)-([1-9]\d{{0,2}})-({'|'.join(CONCEPT_SHOWN)})(-told)?"
    match = re.fullmatch(pattern, name)
    legal = "concept-R-L-SHOWN, perhaps with -told behind, R from 1 to 99, L from 1 to 800, SHOWN "
    if match is None or int(match[2]) > 800:
        raise ValueError(
            f"dataset: got {name!r}, expected {legal}one of {', '.join(CONCEPT_SHOWN)}"
        )
    regimes = int(match[1])
    labels = regimes * int(match[2])
    shown = match[3]
    nodes = max(4_000, 1_000 * regimes)

    # Its streams are frozen, unlike those of numpy's newer generators
    rng = np.random.RandomState(0)
    regime, x, edges = _concept_nodes(rng, nodes, regimes, shown)
    degree = np.bincount(edges[1], minlength=nodes)
    received = np.zeros_like(x)
    np.add.at(received, edges[1], x[edges[0]])
    received /= np.sqrt(np.maximum(degree, 1))[:, None]

    own_rule = rng.standard_normal((CONCEPT_FEATURES, CONCEPT_CLASSES))
    regime_rules = rng.standard_normal((regimes, CONCEPT_FEATURES, CONCEPT_CLASSES))
    scores = x @ own_rule
    for one in range(regimes):
        scores[regime == one] += received[regime == one] @ regime_rules[one]
    label = scores.argmax(axis=1)
    is_random = rng.uniform(size=nodes) < 0.05
    label[is_random] = rng.randint(CONCEPT_CLASSES, size=int(is_random.sum()))
    if shown == "features":
        centers = rng.standard_normal((regimes, SIGN_FEATURES))
        x = np.hstack([x, 3 * centers[regime] + 3 * rng.standard_normal((nodes, SIGN_FEATURES))])

    held = (nodes - labels) // 2
    train, val, test = torch.from_numpy(rng.permutation(nodes)).split(
        [labels, held, nodes - labels - held]
    )
    if match[4]:
        x = np.hstack([x, 3 * np.eye(regimes)[regime]])
    return GraphData(
        name=name,
        data=_data(x, edges, label),
        splits=lambda _: {"train": train, "val": val, "test": test},
        num_outputs=CONCEPT_CLASSES,
        planted=torch.from_numpy(regime).long(),
    )


def _concept_nodes(
    rng: np.random.RandomState, nodes: int, regimes: int, shown: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Regimes (N,), features (N, .) and edges (2, M), drawn without regard to any class."""
    if shown == "patches":
        cell_regime = rng.permutation(np.arange(CELLS**2) % regimes)
        place = rng.uniform(size=(nodes, 2))
        cell = (place * CELLS).astype(int)
        with threadpool_limits(1):
            near = kneighbors_graph(place, n_neighbors=10).tocoo()
        x = rng.standard_normal((nodes, CONCEPT_FEATURES))
        return cell_regime[cell[:, 0] * CELLS + cell[:, 1]], x, np.stack([near.col, near.row])
    regime = rng.permutation(np.arange(nodes) % regimes)
    x = rng.standard_normal((nodes, CONCEPT_FEATURES))
    source, destination = rng.randint(nodes, size=(2, 10 * nodes))
    if shown == "communities":
        is_inside = rng.uniform(size=len(source)) < INSIDE
        for one in range(regimes):
            wanted = is_inside & (regime[destination] == one)
            source[wanted] = rng.choice(np.flatnonzero(regime == one), size=int(wanted.sum()))
    return regime, x, np.stack([source, destination])


def _data(x: np.ndarray, edges: np.ndarray, y: np.ndarray) -> Data:
    return Data(
        x=torch.from_numpy(x).float(),
        edge_index=torch.from_numpy(edges).long(),
        y=torch.from_numpy(y).long(),
    )


GRAPHS = {"digits-graph": digits_graph, "mosaic": mosaic}
"""The graphs by name."""
FAMILIES = {"regimes": regimes, "concept": concept}
"""Graphs that a name describes, by how it begins."""
