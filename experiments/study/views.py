"""What a node can be told beside its own features, computed once from the graph, without a GNN.

Arrays are (N, width), a row a node. Labels reach a node only from *other* training nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from sklearn.utils.extmath import randomized_svd

Array: TypeAlias = np.ndarray

POSITIONS = 32
"""Columns of a diffusion map."""
SIGNATURE = 64
"""Columns that outer products are projected to."""
FOLDS = 10
"""Parts of the training nodes: each gets the labels of the others."""
SMALLEST = 0.01
"""Share of the nodes that a component has at least, for its nodes to have positions."""


class Walks:
    """The steps that a walk on a graph can take, as sparse matrices whose rows sum to 1 or 0.

    ``incoming`` takes the mean over the sources of a node's edges, as message passing does,
    ``outgoing`` over their targets, and ``both`` over neighbors in either direction and the
    node itself.
    """

    def __init__(self, edge_index: Array, num_nodes: int) -> None:
        source, target = edge_index
        ones = np.ones(len(source), np.float32)
        shape = (num_nodes, num_nodes)
        adjacency = sparse.csr_matrix((ones, (target, source)), shape)
        self.in_degree = np.asarray(adjacency.sum(axis=1)).ravel()
        self.incoming = _rows_to_1(adjacency)
        self.outgoing = _rows_to_1(adjacency.T.tocsr())
        either = adjacency + adjacency.T
        either.data[:] = 1
        either.setdiag(1)
        self.neighbors = either.tocsr().astype(np.float32)
        self.both = _rows_to_1(self.neighbors)
        is_edge = adjacency > 0  # an edge may be there twice in one of its directions
        self.is_directed = bool((is_edge != is_edge.T).nnz)

    @property
    def num_neighbors(self) -> Array:
        """(N,) nodes with an edge to or from a node, and the node itself."""
        return np.diff(self.neighbors.indptr)

    @property
    def has_edges(self) -> bool:
        """Whether any node has an edge to another one."""
        return bool(self.neighbors.nnz > self.neighbors.shape[0])


def _rows_to_1(matrix: sparse.csr_matrix) -> sparse.csr_matrix:
    total = np.asarray(matrix.sum(axis=1)).ravel()
    return sparse.diags(1 / np.maximum(total, 1e-9)).astype(np.float32) @ matrix


def walked(step: sparse.csr_matrix, x: Array, steps: Sequence[int]) -> Array:
    """Features after some numbers of steps, side by side."""
    after_steps = []
    here = x
    for number in range(1, max(steps) + 1):
        here = step @ here
        if number in steps:
            after_steps.append(here)
    return np.hstack(after_steps)


def reverse(walks: Walks, x: Array) -> Array:
    """What edges carry against their direction.

    The mean over targets, and over the nodes with which a node shares a target, or a source.
    """
    back = walks.outgoing @ x
    here = walks.incoming @ x
    return np.hstack([back, walks.outgoing @ back, walks.outgoing @ here, walks.incoming @ back])


def positions(walks: Walks, power: int = 16) -> Array:
    """A diffusion map: where a node is, by the smoothest directions of the graph.

    Eigenvectors of the walk times their eigenvalue to a ``power``, rows of length 1. Nodes of
    components that are smaller than :data:`SMALLEST` have 0.
    """
    _, component = connected_components(walks.neighbors, directed=False)
    size = np.bincount(component)[component]
    inside = np.flatnonzero(size >= max(2, SMALLEST * len(size)))
    rows = np.zeros((len(size), POSITIONS), np.float32)
    if len(inside) <= POSITIONS:
        return rows
    degree = np.asarray(walks.neighbors.sum(axis=1)).ravel()[inside]
    scale = sparse.diags(degree**-0.5).astype(np.float32)
    symmetric = scale @ walks.neighbors[inside][:, inside] @ scale
    vector, value, _ = randomized_svd(
        symmetric, POSITIONS, n_iter=16, power_iteration_normalizer="QR", random_state=0
    )
    map_ = vector * (value / value[0]) ** power / degree[:, None] ** 0.5
    rows[inside] = map_ / np.maximum(np.linalg.norm(map_, axis=1, keepdims=True), 1e-9)
    return rows


def diffused(
    step: sparse.csr_matrix,
    values: Array,
    train: Array,
    steps: Sequence[int],
    *,
    folds: int = FOLDS,
    seed: int = 0,
) -> Array:
    """Means over the graph of what training nodes have, after some numbers of steps.

    ``values`` has a row for each of ``train``. No training node gets its own: it gets the means
    of all other parts of the training nodes, as other nodes get those of all.
    """
    num_nodes = step.shape[0]
    width = values.shape[1]
    fold = np.random.default_rng(seed).permutation(len(train)) % folds
    # A block of columns for each fold that is left out, and one for none
    carried = np.zeros((num_nodes, folds + 1, width + 1), np.float32)
    carried[train, :, :width] = values[:, None]
    carried[train, :, width] = 1
    carried[train, fold] = 0
    prior = carried.sum(axis=0)
    prior = prior[:, :width] / np.maximum(prior[:, width:], 1)
    block = np.full(num_nodes, folds)
    block[train] = fold
    after_steps = []
    nodes = np.arange(num_nodes)
    flat = carried.reshape(num_nodes, -1)
    for number in range(1, max(steps) + 1):
        flat = step @ flat
        if number in steps:
            mine = flat.reshape(num_nodes, folds + 1, width + 1)[nodes, block]
            weak = 1e-3  # where no label comes, the mean of all labels stands
            after_steps.append((mine[:, :width] + weak * prior[block]) / (mine[:, width:] + weak))
    return np.hstack(after_steps)


def diffused_labels(walks: Walks, y: Array, train: Array, num_classes: int) -> Array:
    """Shares of classes among other training nodes 1, 2, 4 and 8 steps away.

    Where edges have a direction, also among the sources of a node's edges.
    """
    classes = np.eye(num_classes, dtype=np.float32)[y[train]]
    shares = [diffused(walks.both, classes, train, (1, 2, 4, 8))]
    if walks.is_directed:
        shares.append(diffused(walks.incoming, classes, train, (1,)))
    return np.hstack(shares)


def rule_by_gradients(walks: Walks, residual: Array, x: Array, train: Array) -> Array:
    """What a linear model would learn around a node: its gradients at other training nodes."""
    gradients = _outer(residual[train], x[train])
    nearby = narrowed(diffused(walks.both, gradients, train, (8,), folds=2), POSITIONS)
    return nearby / max(float(nearby.std()), 1e-9)


def _outer(a: Array, b: Array) -> Array:
    """(N, .) products of all columns; of more than ``SIGNATURE``, a random projection."""
    width = a.shape[1] * b.shape[1]
    draw = np.random.default_rng(0).standard_normal((width, SIGNATURE), np.float32)
    products = list[Array]()
    for start in range(0, len(a), 10_000):  # all products at once may be a thousand columns
        some = slice(start, start + 10_000)
        pairs = (a[some, :, None] * b[some, None, :]).reshape(-1, width)
        products.append(pairs if width <= SIGNATURE else pairs @ (draw / SIGNATURE**0.5))
    return np.concatenate(products).astype(np.float32)


def narrowed(x: Array, most: int) -> Array:
    """Centered columns; of more than ``most``, the principal components."""
    x = x - x.mean(axis=0)
    if x.shape[1] <= most:
        return x
    vector, value, _ = randomized_svd(x, most, n_iter=4, random_state=0)
    return vector * value
