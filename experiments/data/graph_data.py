"""A graph data set as it comes from its loader, before it is made into batches: splits, metrics, checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from torch_geometric.data import Data, HeteroData
from torchmetrics import Metric
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.utilities import dim_zero_cat

Split: TypeAlias = Literal["train", "val", "test"]
Splits: TypeAlias = dict[Split, Tensor]
MetricName: TypeAlias = Literal["accuracy", "roc_auc"]

MASKS: dict[Split, str] = {part: f"{part}_mask" for part in get_args(Split)}


@dataclass(frozen=True, kw_only=True)
class GraphData:
    """Nodes, edges, labels, and who is trained on.

    Args:
        name: of the data set.
        data: the graph; ``y`` is (N,) classes, or (N, tasks) binary labels.
        splits: the split of a seed; sets with several fixed splits give seed s split ``s % number of splits``.
        metric: makes the metric, updated with (logits, target); higher is better, in 0..1.
        metric_name: how it is called.
        num_outputs: width of the logits.
        note: license, source, split.
        target: of a heterogeneous graph, the node type that has labels.
        planted: (N,) the expert that each node should go to, where that is known.
    """

    name: str
    data: Data | HeteroData
    splits: Callable[[int], Splits]
    metric: Callable[[], Metric]
    metric_name: str
    num_outputs: int
    note: str = ""
    target: str | None = None
    planted: Tensor | None = None


class TwoClassAUROC(BinaryAUROC):
    """Area under the ROC curve of two logits a node; NaN where a logit is.

    Exact: by ranks, where probabilities of large logits would all round to 1.
    """

    def update(self, preds: Tensor, target: Tensor) -> None:
        logits = preds.detach().cpu().double()  # not every accelerator has float64
        self.preds.append(logits[:, 1] - logits[:, 0])
        self.target.append(target.cpu())

    def compute(self) -> Tensor:  # type: ignore[override]
        margin, target = dim_zero_cat(self.preds), dim_zero_cat(self.target)
        if margin.isnan().any():
            return margin.new_tensor(torch.nan)
        values, rank = margin.unique(return_inverse=True)
        return binary_auroc(rank.double() / len(values), target)


def make_metric(name: MetricName, num_classes: int) -> Callable[[], Metric]:
    """A factory of the metric.

    Raises:
        ValueError: the area under the ROC curve of more than two classes.
    """
    if name == "roc_auc":
        if num_classes != 2:
            raise ValueError(
                f"metric: got 'roc_auc' for {num_classes} classes, expected 'accuracy' (roc_auc takes two)"
            )
        return TwoClassAUROC
    return partial(MulticlassAccuracy, num_classes=num_classes, average="micro")


def task_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of classes; of (., tasks) binary labels, their mean binary cross-entropy."""
    if target.dim() == 2:
        return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype))
    return F.cross_entropy(logits, target)


def fixed_splits(store: Any) -> Callable[[int], Splits]:
    """The splits that the masks of a graph, or of a node type, give: (N,), or (N, S) for S splits."""
    masks = {part: store[name].bool() for part, name in MASKS.items()}

    def split(seed: int) -> Splits:
        chosen = {part: mask[:, seed % mask.size(1)] if mask.dim() == 2 else mask for part, mask in masks.items()}
        return {part: mask.nonzero().view(-1) for part, mask in chosen.items()}

    return split


def per_class_splits(y: Tensor, train: int = 20, val: int = 30) -> Callable[[int], Splits]:
    """Random splits with so many nodes a class in train and val, the rest in test (Shchur et al., 2018)."""

    def split(seed: int) -> Splits:
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
        parts: dict[Split, list[Tensor]] = {"train": [], "val": [], "test": []}
        for label in y.unique():
            members = order[y[order] == label]
            if len(members) <= train + val:
                raise ValueError(
                    f"split: class {int(label)} has {len(members)} nodes, expected more than {train} + {val}"
                )
            for part, nodes in zip(parts.values(), members.tensor_split([train, train + val]), strict=True):
                part.append(nodes)
        return {name: torch.cat(part).sort().values for name, part in parts.items()}

    return split


def stratified_splits(y: Tensor) -> Callable[[int], Splits]:
    """Random splits of the nodes that have a label, 60 / 20 / 20 % of each class, to a node: each seed draws its own.

    Raises:
        ValueError: fewer than five nodes have a label.
    """
    labeled = (y >= 0).nonzero().view(-1)
    if len(labeled) < 5:
        raise ValueError(f"split: got {len(labeled)} nodes with a label, expected at least 5, or masks")

    def split(seed: int) -> Splits:
        shuffled = labeled[torch.randperm(len(labeled), generator=torch.Generator().manual_seed(seed))]
        by_class = shuffled[y[shuffled].sort(stable=True).indices]
        place = (torch.arange(len(labeled)) + seed) % 5  # of any five in a row, three train: small classes need no rule
        chosen = {"train": place < 3, "val": place == 3, "test": place == 4}
        return {part: by_class[chosen[part]].sort().values for part in MASKS}

    return split


def check_graph(name: str, data: Data | HeteroData, target: str | None = None) -> None:
    """Refuse a graph that cannot be what it should.

    Args:
        name: begins the message.
        data: with ``x``, ``edge_index`` and ``y``, and perhaps ``train_mask``, ``val_mask`` and ``test_mask``, (N,) or
            (N, S) for S splits.
        target: of a heterogeneous graph, the node type that has labels.

    Raises:
        ValueError: shapes that do not fit, edges that point outside, features that are not numbers, splits that are
            empty or overlap, or labels below 0 in them; with the first offender.
    """
    store: Any = data if isinstance(data, Data) else data[target]
    features = {"": data.x} if isinstance(data, Data) else data.collect("x", allow_empty=True)
    for kind, x in features.items():
        of = f" of {kind}" if kind else ""
        if x.dim() != 2 or x.size(1) == 0:
            raise ValueError(f"{name}: got features{of} of shape {tuple(x.shape)}, expected (nodes, at least one)")
        if not x.isfinite().all():
            row = int((~x.isfinite()).any(dim=1).nonzero()[0])
            raise ValueError(f"{name}: the features{of} of node {row} are not all finite")
    try:
        data.validate()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    masks = {mask: store[mask] for mask in MASKS.values() if mask in store}
    for part, value in {"y": store.y, **masks}.items():
        if value.dim() == 0 or value.size(0) != store.num_nodes:
            got = tuple(value.shape)
            raise ValueError(f"{name}: {part} has shape {got}, expected one row for each of {store.num_nodes} nodes")
    if masks:
        _check_splits(name, masks, store.y)


def _check_splits(name: str, masks: dict[str, Tensor], y: Tensor) -> None:
    counts = {mask.size(1) for mask in masks.values() if mask.dim() == 2} or {1}
    if len(counts) > 1 or any(mask.dim() > 2 for mask in masks.values()):
        shapes = ", ".join(f"{part} {tuple(mask.shape)}" for part, mask in masks.items())
        raise ValueError(f"{name}: got masks of shapes {shapes}, expected as many splits in each")
    count = counts.pop()
    table = torch.stack([mask.view(len(y), -1).expand(-1, count) for mask in masks.values()])  # (parts, N, S)
    for part, mask in zip(masks, table, strict=True):
        if not mask.any(dim=0).all():
            split = int((~mask.any(dim=0)).nonzero()[0])
            raise ValueError(f"{name}: {part} of split {split} is empty, expected nodes in each part")
        labels = y[mask.any(dim=1)]
        if (labels < 0).any():
            raise ValueError(f"{name}: a node of {part} has label {int(labels.min())}, expected 0 or more")
    overlap = (table.sum(dim=0) > 1).nonzero()
    if len(overlap):
        node, split = overlap[0].tolist()
        both = " and ".join(part for part, mask in zip(masks, table, strict=True) if mask[node, split])
        raise ValueError(f"{name}: node {node} is in {both}, expected each node in one part of a split")
