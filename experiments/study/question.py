"""Do the nodes of a graph follow different rules, and by what? Asked in seconds, without a GNN.

Nodes are put into groups, few or as many as there are experts, by something that a router could
see: their own features, the mean of their neighbors, their degree, or their place in the graph. No
label takes part in that. Then a linear model on ``[x, Ax, A^2 x]`` with weights of its own for each
group is compared with models that do without: see :data:`RIVALS`. Rules differ where it is surely
better than all of them but the one with a hidden layer. That may find the groups by itself, and
then the trial says who is better.

Only nodes of the first split's training and validation parts are read, in five folds: three to fit,
one to stop by and to choose the groups by, one to score. Of other splits these may be test nodes;
all that they decide is how nodes are grouped, and whether a trial is worth it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.extmath import randomized_svd
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.train.checks import check
from experiments.train.data.task import Task
from experiments.train.scores import Difference, gains

Array: TypeAlias = np.ndarray

VIEWS = {
    "node": "their own features",
    "neighbors": "the mean of their neighbors",
    "degree": "their degree",
    "positions": "their place in the graph",
}
"""What groups are made by."""
RIVALS = {
    "one": "one rule for all nodes",
    "told": "one rule that is told the group",
    "bent": "one rule that is not linear (a hidden layer)",
    "shuffled": "a rule for each of as many random groups",
}
"""What a rule for each group is compared with."""
WORTH = 0.5
"""Points that are worth having."""
FOLDS = 5
FEWEST = 100
"""Nodes with a label, at least."""
MOST_NODES = 300_000
MOST_ROWS = 8_000
"""Nodes with a label that are asked, at most."""
WIDEST = 64
"""Columns of the features, at most."""
HIDDEN = 64
"""Width of the bent rule."""
FEW = 2
"""Groups that are tried beside as many as there are experts: of few rules, each sees more nodes."""
COORDINATES = 32
SMALLEST = 0.01
"""Share of the nodes that a component has at least, for its nodes to have a place."""
STEPS = 150
EVERY = 3
"""Steps between looks at the nodes that a fit is stopped by."""
PATIENCE = 30
OWN = {"weight_decay": 1e-2}
"""Of what a group has to itself."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """By what rules differ, if they do; and what a rule for each group gains over each rival."""

    view: str
    """The groups that are best in validation, whether or not they gain."""
    differ: bool
    gains: Mapping[str, Difference]
    expert: Array
    """(N,) the group of each node."""

    @property
    def groups(self) -> int:
        return int(self.expert.max()) + 1

    def lines(self) -> list[str]:
        """In words."""
        by = VIEWS[self.view]
        head = f"yes: rules differ, by {by}" if self.differ else "no: rules do not surely differ"
        about = f"a linear rule for each of {self.groups} groups, by {by}, gains in points"
        return [
            head,
            f"{about} (95 % interval)",
            *(f"  over {RIVALS[name]}: {gain}" for name, gain in self.gains.items()),
        ]


def nodes_to_ask(task: Task) -> Tensor:
    """The nodes of the first split that are trained on or validate.

    Raises:
        ValueError: a graph that the question does not fit.
    """
    data: Any = task.graph
    assert task.split is not None
    check(data.y.dim() == 1, task.name, f"{data.y.size(-1)} labels a node", "one class a node")
    check(data.num_nodes <= MOST_NODES, task.name, f"{data.num_nodes:,} nodes", f"{MOST_NODES:,}")
    pool = torch.cat([task.split["train"], task.split["val"]])
    legal = f"at least {FEWEST}, to ask them"
    check(len(pool) >= FEWEST, task.name, f"{len(pool)} nodes to train and validate", legal)
    return pool


def ask(task: Task, experts: int) -> Answer:
    """Ask the nodes of a graph, in two groups and in as many as there are ``experts``.

    Of a graph that it does not fit, :func:`nodes_to_ask` says why.
    """
    data: Any = task.graph
    pool = nodes_to_ask(task)
    pool = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))]
    folds = pool[:MOST_ROWS].tensor_split(FOLDS)

    mean = neighbor_mean(data.edge_index.numpy(), data.num_nodes)
    x = features(data.x.numpy())
    seen = views(x, mean)
    counts = sorted({min(FEW, experts), experts})
    groups = {(name, n): grouped(view, n) for name, view in seen.items() for n in counts}
    columns = beside(x, *([mean @ x, mean @ (mean @ x)] if mean.nnz else []))
    asked = Probes(columns, data.y, task, folds)
    found = {key: asked.scores(groups=group) for key, group in groups.items()}
    best = max(found, key=lambda key: sum(found[key]["stop"]))
    view, _ = best
    group = groups[best]
    shuffled = group[np.random.default_rng(0).permutation(len(group))]
    one_hot = F.one_hot(torch.from_numpy(group).long(), int(group.max()) + 1)
    rivals = {
        "one": asked.scores(),
        "told": asked.scores(columns=beside(columns, seen[view], one_hot)),
        "bent": asked.scores(hidden=HIDDEN),
        "shuffled": asked.scores(groups=shuffled),
    }
    over = {
        name: Difference.of(gains(task.metric_name, found[best]["score"], rival["score"]))
        for name, rival in rivals.items()
    }
    screens = [gain for name, gain in over.items() if name != "bent"]
    differ = all(gain.low > 0 and gain.mean >= WORTH for gain in screens)
    return Answer(view=view, differ=differ, gains=over, expert=group)


# What a node is told ------------------------------------------------------------------------------


def neighbor_mean(edge_index: Array, nodes: int) -> sparse.csr_matrix:
    """The matrix that takes the mean over the sources of a node's edges."""
    source, target = edge_index
    ones = np.ones(len(source), np.float32)
    edges = sparse.csr_matrix((ones, (target, source)), (nodes, nodes))
    degree = np.asarray(edges.sum(axis=1)).ravel()
    return sparse.diags(1 / np.maximum(degree, 1)).astype(np.float32) @ edges


def features(x: Array) -> Array:
    """Columns of one unit each; of many, the principal components."""
    x = x - x.mean(axis=0)
    deviation = x.std(axis=0)
    varies = deviation > 1e-6 * np.abs(x).max(initial=1e-9)
    if not varies.any():
        return np.zeros((len(x), 1), np.float32)
    x = x[:, varies]
    if x.shape[1] <= WIDEST:
        return np.asarray(x / deviation[varies], np.float32)
    vector, value, _ = randomized_svd(x, WIDEST, n_iter=4, random_state=0)
    return beside(vector * value).numpy()


def beside(*blocks: Any) -> Tensor:
    """Blocks of columns side by side, centered, each at one scale: mean square 1."""
    columns = [torch.as_tensor(np.asarray(block), dtype=torch.float32) for block in blocks]
    columns = [block - block.mean(dim=0) for block in columns]
    return torch.cat([block / block.square().mean().sqrt().clamp_min(1e-6) for block in columns], 1)


def views(x: Array, mean: sparse.csr_matrix) -> dict[str, Array]:
    """What groups are made by; without edges, the nodes' own features alone."""
    if not mean.nnz:
        return {"node": x}
    degree = np.diff(mean.indptr)[:, None]
    place = positions(mean)
    return {"node": x, "neighbors": mean @ x, "degree": np.log1p(degree), "positions": place}


def positions(mean: sparse.csr_matrix) -> Array:
    """Where a node is: the smoothest directions of a walk on the graph, as rows of length 1.

    Nodes of small components have 0.
    """
    loops = sparse.identity(mean.shape[0], np.float32, "csr")
    either = ((mean + mean.T + loops) > 0).astype(np.float32).tocsr()
    _, component = connected_components(either, directed=False)
    size = np.bincount(component)[component]
    inside = np.flatnonzero(size >= max(2, SMALLEST * len(size)))
    rows = np.zeros((len(size), COORDINATES), np.float32)
    if len(inside) <= COORDINATES:
        return rows
    degree = np.asarray(either.sum(axis=1)).ravel()[inside]
    scale = sparse.diags(degree**-0.5).astype(np.float32)
    walk = scale @ either[inside][:, inside] @ scale
    options: dict[str, Any] = {"n_iter": 16, "power_iteration_normalizer": "QR", "random_state": 0}
    vector, value, _ = randomized_svd(walk, COORDINATES, **options)
    place = vector * (value / value[0]) ** 16 / degree[:, None] ** 0.5
    rows[inside] = place / np.maximum(np.linalg.norm(place, axis=1, keepdims=True), 1e-9)
    return rows


def grouped(view: Array, experts: int) -> Array:
    """(N,) the k-means cluster of each node."""
    with threadpool_limits(1), warnings.catch_warnings():  # draws would follow the threads
        warnings.simplefilter("ignore", ConvergenceWarning)  # of fewer distinct rows than clusters
        group: Array = KMeans(experts, n_init=3, random_state=0).fit_predict(view)
    return group.astype(np.int64)


# Rules --------------------------------------------------------------------------------------------


class Rules(nn.Module):
    """A linear model, and beside it a hidden layer, or weights of each group's own.

    What stands beside begins at zero.
    """

    def __init__(self, width: int, classes: int, groups: int, hidden: int) -> None:
        super().__init__()
        self.shared = nn.Linear(width, classes)
        self.own = nn.Parameter(torch.zeros(groups, width + 1, classes))
        self.hidden = nn.Linear(width, hidden) if hidden else None
        self.out = nn.Parameter(torch.zeros(hidden, classes))

    def forward(self, columns_NF: Tensor, group_N: Tensor) -> Tensor:
        """(N, C) logits."""
        logits: Tensor = self.shared(columns_NF)
        if self.hidden is not None:
            logits = logits + self.hidden(columns_NF).relu() @ self.out
        rows = [torch.nonzero(group_N == group).flatten() for group in range(len(self.own))]
        for own, chosen in zip(self.own, rows, strict=True):
            logits = logits.index_add(0, chosen, columns_NF[chosen] @ own[:-1] + own[-1])
        return logits


class Probes:
    """Fits models to the folds of a graph's nodes."""

    def __init__(self, columns: Tensor, y: Tensor, task: Task, folds: Any) -> None:
        self.columns = columns
        self.y = y
        self.task = task
        self.folds = folds

    def scores(
        self, *, columns: Tensor | None = None, groups: Array | None = None, hidden: int = 0
    ) -> dict[str, list[float]]:
        """The metric of a kind of model on each fold that it is stopped by, and scored on."""
        columns = self.columns if columns is None else columns
        group = torch.zeros(len(self.y)).long() if groups is None else torch.from_numpy(groups)
        found: dict[str, list[float]] = {"stop": [], "score": []}
        for number in range(FOLDS):
            score, stop, *rest = (self.folds[(number + turn) % FOLDS] for turn in range(FOLDS))
            torch.manual_seed(number)
            count = 0 if groups is None else int(groups.max()) + 1
            model = Rules(columns.size(1), self.task.num_classes, count, hidden)
            self.fit(model, columns, group, torch.cat(rest), stop)
            for part, rows in (("stop", stop), ("score", score)):
                metric = self.task.metric()
                with torch.no_grad():
                    metric.update(model(columns[rows], group[rows]), self.y[rows])
                found[part].append(float(metric.compute()))
        return found

    def fit(
        self, model: Rules, columns: Tensor, group: Tensor, train: Tensor, stop: Tensor
    ) -> None:
        """Descend the likelihood of some nodes; the model is left as it is best on others."""
        given = (columns[train], group[train])
        target = self.y[train]
        shared = [value for name, value in model.named_parameters() if name != "own"]
        decays = [{"params": shared, "weight_decay": 1e-3}, {"params": [model.own], **OWN}]
        optimizer = torch.optim.Adam(decays, lr=0.03)
        best = float("inf")
        best_step = 0
        state = {name: value.clone() for name, value in model.state_dict().items()}
        for step in range(STEPS):
            optimizer.zero_grad()
            F.cross_entropy(model(*given), target).backward()
            optimizer.step()
            if step % EVERY:
                continue
            with torch.no_grad():
                reached = float(F.cross_entropy(model(columns[stop], group[stop]), self.y[stop]))
            if reached < best:
                best = reached
                best_step = step
                state = {name: value.clone() for name, value in model.state_dict().items()}
            if step - best_step > PATIENCE:
                break
        model.load_state_dict(state)
