"""What the training loop needs of a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

Split: TypeAlias = Literal["train", "val", "test"]


class Batch(NamedTuple):
    """One call of the model: ``model(*inputs)`` gives logits, of which the rows ``rows`` (all if ``None``) count."""

    inputs: tuple[Tensor, ...]
    target: Tensor
    rows: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """A data set, ready to train on.

    Args:
        name: of the data set.
        kind: ``"graph"`` (inputs are ``x, edge_index``) or ``"image"`` (inputs are ``images``).
        in_channels: width of the nodes, or height and width of the images.
        num_classes: classes.
        metric_name: of the metric, higher is better, between 0 and 1.
        metric: makes the metric; it is updated with (logits, target).
        loader: ``loader(split, batch_size, shuffle_seed)`` gives the batches of one epoch; no shuffling without a seed.
        planted: (T,) the expert that each token should go to, where that is known.
    """

    name: str
    kind: Literal["graph", "image"]
    in_channels: int
    num_classes: int
    metric_name: str
    metric: Callable[[], Metric]
    loader: Callable[[Split, int, int | None], Iterable[Batch]]
    planted: Tensor | None = None


def image_task(name: str, images: Tensor, labels: Tensor, split: dict[Split, Tensor]) -> Task:
    """Classification by accuracy of images that lie in memory, (N, C, H, W)."""
    num_classes = int(labels.max()) + 1

    def loader(part: Split, batch_size: int, seed: int | None) -> Iterator[Batch]:
        index = split[part]
        if seed is not None:
            index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))]
        for rows in index.split(batch_size):
            yield Batch((images[rows],), labels[rows])

    return Task(
        name=name,
        kind="image",
        in_channels=images.size(-1),
        num_classes=num_classes,
        metric_name="accuracy",
        metric=partial(MulticlassAccuracy, num_classes=num_classes, average="micro"),
        loader=loader,
    )


def graph_task(
    name: str,
    x: Tensor,
    edge_index: Tensor,
    y: Tensor,
    split: dict[Split, Tensor],
    planted: Tensor | None = None,
) -> Task:
    """Full-batch node classification by accuracy."""
    num_classes = int(y.max()) + 1

    def loader(part: Split, batch_size: int, seed: int | None) -> Iterable[Batch]:
        return [Batch((x, edge_index), y[split[part]], split[part])]

    return Task(
        name=name,
        kind="graph",
        in_channels=x.size(1),
        num_classes=num_classes,
        metric_name="accuracy",
        metric=partial(MulticlassAccuracy, num_classes=num_classes, average="micro"),
        loader=loader,
        planted=planted,
    )
