"""Small models that answer a question about data in a second, and what their differences say.

All begin as a fitted linear model, and validation picks the step at which they stop, the first
one included: what does not help changes nothing.

Shapes: N nodes, F columns, C classes, E experts.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Sequence

import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.study.worth import Gain
from experiments.train.data.task import Split, Splits

OWN_DECAY = 1e-2
"""Weight decay of what an expert has to itself."""
MOST = 120
"""Steps at most."""
EVERY = 3
"""Steps between validations."""
PATIENCE = 10
"""Validations without gain that end a fit."""


class Linear(nn.Module):
    """Log-probabilities of a linear model; its first columns may begin as those of another."""

    def __init__(self, width: int, classes: int, base: Linear | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(width, classes)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)
        if base is not None:
            with torch.no_grad():
                self.layer.weight[:, : base.layer.in_features] = base.layer.weight
                self.layer.bias.copy_(base.layer.bias)

    def forward(self, columns_NF: Tensor) -> Tensor:
        return self.layer(columns_NF).log_softmax(1)


class Dense(nn.Module):
    """A linear model and a hidden layer beside it, which begins at zero.

    It has ``width`` columns, the first of them those of ``base``, as which it begins. The hidden
    layer sees the first ``seen`` columns, or all of them.
    """

    def __init__(self, base: Linear, width: int, hidden: int, seen: int | None = None) -> None:
        super().__init__()
        classes = base.layer.out_features
        self.linear = Linear(width, classes, base).layer
        self.seen = width if seen is None else seen
        last = nn.Linear(hidden, classes)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(nn.Linear(self.seen, hidden), nn.ReLU(), last)

    def forward(self, columns_NF: Tensor) -> Tensor:
        logits: Tensor = self.linear(columns_NF) + self.layers(columns_NF[:, : self.seen])
        return logits.log_softmax(1)


class Mixture(nn.Module):
    """``p(y) = sum_e gate_e(view) softmax(shared(columns) + own_e(narrow))`` (Jacobs et al. 1991).

    Experts begin as one linear model. The gate is linear in a view of the node, and begins as
    k-means clusters of it, as sharp as the clusters are.
    """

    def __init__(self, base: Linear, narrow: int, gate: nn.Linear) -> None:
        super().__init__()
        classes = base.layer.out_features
        self.shared = Linear(base.layer.in_features, classes, base).layer
        self.own = nn.Parameter(torch.zeros(gate.out_features, classes, narrow + 1))
        self.gate = gate

    def by_expert(self, columns_NF: Tensor, narrow_NF: Tensor) -> Tensor:
        """(N, E, C) log-probabilities of each expert."""
        weight = self.own[..., :-1].flatten(0, 1)
        bias = self.own[..., -1].flatten()
        own = F.linear(narrow_NF, weight, bias).view(-1, *self.own.shape[:2])
        return (self.shared(columns_NF)[:, None] + own).log_softmax(2)

    def forward(self, columns_NF: Tensor, narrow_NF: Tensor, view_NF: Tensor) -> Tensor:
        # Lower ones change nothing, but denormal numbers take a CPU three times as long
        gate_NE = self.gate(view_NF).log_softmax(1).clamp_min(-30)
        return (gate_NE[:, :, None] + self.by_expert(columns_NF, narrow_NF)).logsumexp(1)


def clustered(view_NF: Tensor, experts: int) -> nn.Linear:
    """A gate that gives each of the view's k-means clusters to an expert.

    Of clusters of one variance, ``log p(e | v) = (v c_e - |c_e|^2 / 2) / variance`` up to a
    constant.
    """
    with threadpool_limits(1), warnings.catch_warnings():  # draws would follow the threads
        # Of fewer distinct rows than clusters some stay empty
        warnings.simplefilter("ignore", ConvergenceWarning)
        clusters = KMeans(experts, n_init=3, random_state=0).fit(view_NF.numpy())
    centers = torch.from_numpy(clusters.cluster_centers_).float()
    sharpness = view_NF.numel() / max(clusters.inertia_, 1e-6 * view_NF.numel())
    gate = nn.Linear(view_NF.size(1), experts)
    with torch.no_grad():
        gate.weight.copy_(sharpness * centers)
        gate.bias.copy_(-sharpness * centers.square().sum(1) / 2)
    return gate


def fit(
    model: nn.Module,
    inputs: Sequence[Tensor],
    y: Tensor,
    rows: Splits,
    steps: int = MOST,
    *,
    rate: float,
    decay: float,
    is_stopped: bool = True,
) -> float:
    """Descend the likelihood of the training nodes; returns that of the validation nodes.

    Both are mean negative log-likelihoods. The model is left as it validated best, or, where it
    is not to be stopped, as it was last.
    """
    train = [each[rows["train"]] for each in inputs]
    val = [each[rows["val"]] for each in inputs]
    own = [value for name, value in model.named_parameters() if name == "own"]
    others = [value for name, value in model.named_parameters() if name != "own"]
    groups = [{"params": others, "weight_decay": decay}, {"params": own, "weight_decay": OWN_DECAY}]
    optimizer = torch.optim.Adam(groups, lr=rate)
    best = float("inf")
    best_step = 0
    state = model.state_dict()
    for step in range(steps + 1):
        if step == steps or (is_stopped and step % EVERY == 0):
            with torch.no_grad():
                validated = float(F.nll_loss(model(*val), y[rows["val"]]))
            if validated < best:
                best = validated
                best_step = step
                state = {name: value.clone() for name, value in model.state_dict().items()}
        if is_stopped and step - best_step >= PATIENCE * EVERY:
            break
        if step < steps:
            optimizer.zero_grad()
            F.nll_loss(model(*train), y[rows["train"]]).backward()
            optimizer.step()
    model.load_state_dict(state)
    return best


@torch.no_grad()
def told(model: nn.Module, *inputs: Tensor) -> Tensor:
    """(N, C) log-probabilities of all nodes."""
    log_p_NC: Tensor = model(*inputs)
    return log_p_NC


def score(metric: str, log_p_NC: Tensor, y: Tensor) -> tuple[float, Tensor]:
    """A model's score, in points, and what each node adds to it beyond the mean.

    Of accuracy that is a node's own share; of the area under the ROC curve, the share of the
    other class that a node is ranked right with (DeLong et al. 1988).
    """
    if metric == "accuracy":
        right = (log_p_NC.argmax(1) == y).double()
        return 100 * float(right.mean()), 100 * (right - right.mean()) / len(right)
    margin = (log_p_NC[:, 1] - log_p_NC[:, 0]).double()
    positive = margin[y == 1]
    negative = margin[y == 0]
    influence = torch.zeros_like(margin)
    above = _share_below(positive, negative)
    below = 1 - _share_below(negative, positive)
    area = float(above.mean())
    influence[y == 1] = (above - area) / len(positive)
    influence[y == 0] = (below - area) / len(negative)
    return 100 * area, 100 * influence


def _share_below(values: Tensor, others: Tensor) -> Tensor:
    """Share of the others that is below each value; ties count half."""
    order = others.sort().values
    sides = [torch.searchsorted(order, values, right=right) for right in (False, True)]
    return (sides[0] + sides[1]).double() / 2 / len(others)


def gain(
    metric: str,
    ours: Sequence[Tensor],
    theirs: Sequence[Tensor],
    y: Tensor,
    splits: Sequence[Splits],
    part: Split,
) -> Gain:
    """What one model has above another, split by split.

    The variance is that of the mean over splits, which share the draw of training nodes only in
    part, and that over nodes, of which the same may be tested in several splits. Where splits
    test different nodes this counts the nodes twice: the interval is wide rather than narrow.
    """
    differences = list[float]()
    by_node = torch.zeros(len(y), dtype=torch.float64)
    for a, b, rows in zip(ours, theirs, splits, strict=True):
        (a_score, a_node), (b_score, b_node) = (
            score(metric, log_p[rows[part]], y[rows[part]]) for log_p in (a, b)
        )
        differences.append(a_score - b_score)
        by_node[rows[part]] += (a_node - b_node) / len(splits)
    n = len(splits)
    variance = statistics.variance(differences) / n + float(by_node.square().sum())
    return Gain.around(statistics.fmean(differences), variance, n)
