"""A graph data set as it comes from its loader, before it is made into batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

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


def fixed_splits(data: Data) -> Callable[[int], Splits]:
    """The splits that the masks of ``data`` give: (N,), or (N, S) for S splits."""
    masks = {part: data[f"{part}_mask"].bool() for part in ("train", "val", "test")}

    def split(seed: int) -> Splits:
        chosen = {part: mask[:, seed % mask.size(1)] if mask.dim() == 2 else mask for part, mask in masks.items()}
        return {part: chosen[part].nonzero().view(-1) for part in ("train", "val", "test")}

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
