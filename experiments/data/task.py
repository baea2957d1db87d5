"""What the training loop needs of a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

from torch import Tensor
from torch.nn import functional as F
from torch_geometric.data import Data, HeteroData
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from experiments.data.graph_data import Splits

Shard = tuple[int, int]
"""A process's number r and how many there are, W: of each batch it takes the r-th of W slices (``tensor_split``)."""
Loader = Callable[..., Iterable["Batch"]]


class Batch(NamedTuple):
    """One call of the model: ``model(*inputs)`` gives logits, of which the rows ``rows`` (all if ``None``) count."""

    inputs: tuple[Any, ...]
    target: Tensor
    rows: Tensor | slice | None = None

    def counted(self, logits: Tensor) -> Tensor:
        """The logits that loss and metric count."""
        return logits if self.rows is None else logits[self.rows]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A data set with one split, ready to train on.

    Args:
        name: of the data set.
        kind: ``"graph"`` (inputs are those of a GNN), ``"hetero"``, or ``"image"`` (inputs are ``images``).
        in_channels: width of the nodes (by node type, ``None`` without features), or height and width of the images.
        num_classes: width of the logits.
        metric_name: of the metric, higher is better, between 0 and 1.
        metric: makes the metric; it is updated with (logits, target).
        loader: ``loader(split, batch_size, shuffle_seed, shard)`` gives the batches of one epoch; no shuffling without
            a seed, and without a shard all of each batch. The slices of a small batch may be empty.
        steps: how many training batches an epoch has, by batch size.
        loss: of (logits, target), in training.
        graph: the whole graph, for models that need more of it than batches hold.
        split: the nodes, or images, of train, val and test.
        target: of a heterogeneous graph, the node type that has labels.
        planted: (T,) the expert that each token should go to, where that is known.
        classes: names of the classes, where they are known.
        mean, std: of images, a channel; what the model sees is (value in 0..1 - mean) / std.
    """

    name: str
    kind: Literal["graph", "hetero", "image"]
    in_channels: Any
    num_classes: int
    metric_name: str
    metric: Callable[[], Metric]
    loader: Loader
    steps: Callable[[int], int] = lambda _: 1
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    graph: Data | HeteroData | None = None
    split: Splits | None = None
    target: str | None = None
    planted: Tensor | None = None
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


def image_task(label_smoothing: float, split: Splits, classes: tuple[str, ...], **given: Any) -> Task:
    """Classification of images by accuracy; ``given`` is the rest of the :class:`Task`."""
    return Task(
        kind="image",
        num_classes=len(classes),
        metric_name="accuracy",
        metric=partial(MulticlassAccuracy, num_classes=len(classes), average="micro"),
        steps=lambda batch_size: -(-len(split["train"]) // batch_size),
        loss=partial(F.cross_entropy, label_smoothing=label_smoothing),
        split=split,
        classes=classes,
        **given,
    )
