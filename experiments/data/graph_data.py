"""A graph data set before it is made into batches: splits, metrics, checks."""

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
    """Nodes, edges, labels, and who is trained on."""

    name: str
    data: Data | HeteroData  # y is (N,) classes, or (N, tasks) binary labels
    splits: Callable[[int], Splits]  # of a seed; of S fixed splits seed s takes s % S
    metric: Callable[[], Metric]  # is updated with (logits, target); higher is better, in 0..1
    metric_name: str
    num_outputs: int  # width of the logits
    target: str | None = None  # of a heterogeneous graph, the node type that has labels
    planted: Tensor | None = None  # (N,) the expert that each node should go to, where that is known


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
        if len(target.unique()) < 2:
            raise ValueError("metric: got nodes of one class only in val or test, expected both for 'roc_auc'")
        values, rank = margin.unique(return_inverse=True)
        return binary_auroc(rank.double() / len(values), target)


def make_metric(name: MetricName, num_classes: int) -> Callable[[], Metric]:
    """A factory of the metric.

    Raises:
        ValueError: the area under the ROC curve of more than two classes.
    """
    if name == "accuracy":
        return partial(MulticlassAccuracy, num_classes=num_classes, average="micro")
    if num_classes != 2:
        raise ValueError(f"metric: got 'roc_auc' for {num_classes} classes, expected 'accuracy' (roc_auc takes two)")
    return TwoClassAUROC


def task_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of classes; of (., tasks) binary labels, their mean binary cross-entropy."""
    if target.dim() == 2:
        return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype))
    return F.cross_entropy(logits, target)


def fixed_splits(store: Any, seed: int) -> Splits:
    """The split of a seed, by the masks of a graph, or of a node type: (N,), or (N, S) for S splits."""
    masks = {part: store[name].view(len(store.y), -1) for part, name in MASKS.items()}
    return {part: mask[:, seed % mask.size(1)].nonzero().view(-1) for part, mask in masks.items()}


def per_class_splits(store: Any, seed: int) -> Splits:
    """A random split with 20 nodes a class in train, 30 in val and the rest in test (Shchur et al., 2018)."""
    y = store.y
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    parts: dict[Split, list[Tensor]] = {part: [] for part in MASKS}
    for label in y.unique():
        members = order[y[order] == label]
        if len(members) <= 50:
            raise ValueError(f"split: class {int(label)} has {len(members)} nodes, expected more than 50")
        for nodes, part in zip(members.tensor_split([20, 50]), parts.values(), strict=True):
            part.append(nodes)
    return {name: torch.cat(part).sort().values for name, part in parts.items()}


def stratified_splits(store: Any, seed: int) -> Splits:
    """A random split of the nodes that have a label (0 or more), 60 / 20 / 20 % of each class, to a node."""
    y = store.y
    labeled = (y >= 0).nonzero().view(-1)
    shuffled = labeled[torch.randperm(len(labeled), generator=torch.Generator().manual_seed(seed))]
    by_class = shuffled[y[shuffled].sort(stable=True).indices]
    place = (torch.arange(len(labeled)) + seed) % 5  # of any five in a row, three train: small classes need no rule
    chosen = {"train": place < 3, "val": place == 3, "test": place == 4}
    return {part: by_class[chosen[part]].sort().values for part in MASKS}


def check_graph(where: str, data: Data | HeteroData, target: str | None = None) -> None:
    """Refuse a graph that cannot be what it should.

    Its shapes have to fit, its edges point inside, its features be finite; each split has nodes in train, val and test,
    none of them in two, and each of them has a label of 0 or more. ``where`` begins the message; ``target`` is the node
    type of a heterogeneous graph that has labels.
    """
    store: Any = data if isinstance(data, Data) else data[target]
    for x in [data.x] if isinstance(data, Data) else data.collect("x", allow_empty=True).values():
        if x.dim() != 2 or x.size(1) == 0 or not x.isfinite().all():
            raise ValueError(f"{where}: got features of shape {tuple(x.shape)}, expected finite numbers (nodes, width)")
    try:
        data.validate()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    masks = [store[mask] for mask in MASKS.values() if mask in store]
    for value in (store.y, *masks):
        if value.dim() not in (1, 2) or len(value) != store.num_nodes:
            raise ValueError(
                f"{where}: got y or a mask of shape {tuple(value.shape)}, expected a row for each of "
                f"{store.num_nodes} nodes"
            )
    if not masks:
        if (store.y >= 0).sum() < 5:
            raise ValueError(f"{where}: got fewer than 5 nodes with a label, expected 5 or more, or masks")
        return
    splits = max(mask[0].numel() for mask in masks)
    if any(mask.dim() == 2 and mask.size(1) != splits for mask in masks):
        raise ValueError(f"{where}: got masks of different numbers of splits, expected as many in each")
    table = torch.stack([mask.view(len(mask), -1).expand(-1, splits) for mask in masks])  # (parts, N, S)
    if not table.any(dim=1).all():
        raise ValueError(f"{where}: got a split without nodes in one part, expected some in train, val and test")
    if table.sum(dim=0).max() > 1:
        node = int((table.sum(dim=0) > 1).nonzero()[0, 0])
        raise ValueError(f"{where}: node {node} is in two parts of a split, expected one")
    if (store.y[table.any(dim=2).any(dim=0)] < 0).any():
        raise ValueError(f"{where}: got a negative label in a split, expected 0 or more")
