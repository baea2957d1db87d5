"""Graphs that need no file. Frozen: figures in results/ depend on every draw."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neighbors import kneighbors_graph
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch_geometric.data import Data

from experiments.train.data.task import GraphData, Splits

# Of mosaic
NODES = 8_000
EDGES = 80_000
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
    # Its streams are frozen, unlike those of numpy's newer generators
    rng = np.random.RandomState(0)
    region = rng.permutation(np.arange(NODES) % REGIONS)
    label = rng.randint(CLASSES, size=NODES)
    class_center = rng.standard_normal((CLASSES, FEATURES))
    region_center = rng.standard_normal((REGIONS, FEATURES))
    x = class_center[label] + 3 * region_center[region] + 3 * rng.standard_normal((NODES, FEATURES))

    permutation = np.stack(
        [np.arange(CLASSES), *(rng.permutation(CLASSES) for _ in range(REGIONS - 1))]
    )
    destination = rng.randint(NODES, size=EDGES)
    source_label = permutation[region[destination], label[destination]]
    stray = rng.uniform(size=EDGES) < 0.15
    source_label[stray] = rng.randint(CLASSES, size=int(stray.sum()))
    source = np.empty(EDGES, dtype=np.int64)
    for r in range(REGIONS):
        for c in range(CLASSES):
            wanted = (region[destination] == r) & (source_label == c)
            source[wanted] = rng.choice(
                np.flatnonzero((region == r) & (label == c)), size=int(wanted.sum())
            )

    train, val, test = torch.from_numpy(rng.permutation(NODES)).split(
        [NODES // 2, NODES // 4, NODES // 4]
    )
    return GraphData(
        name="mosaic",
        data=_data(x, np.stack([source, destination]), label),
        splits=lambda _: {"train": train, "val": val, "test": test},
        num_outputs=CLASSES,
        planted=torch.from_numpy(region).long(),
    )


def _data(x: np.ndarray, edges: np.ndarray, y: np.ndarray) -> Data:
    return Data(
        x=torch.from_numpy(x).float(),
        edge_index=torch.from_numpy(edges).long(),
        y=torch.from_numpy(y).long(),
    )


GRAPHS = {"digits-graph": digits_graph, "mosaic": mosaic}
"""The graphs by name."""
