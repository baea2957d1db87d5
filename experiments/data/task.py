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

    ``loader(split, batch_size, shuffle_seed, shard)`` gives the batches of one epoch; no shuffling without a seed, and
    without a shard all of each batch. The slices of a small batch may be empty.
    """

    name: str
    kind: Literal["graph", "hetero", "image"]  # inputs are those of a GNN, of a relational one, or images
    in_channels: Any  # width of the nodes (by type, None without features), or height and width of the images
    num_classes: int  # width of the logits
    metric_name: str
    metric: Callable[[], Metric]  # is updated with (logits, target); higher is better, in 0..1
    loader: Loader
    steps: Callable[[int], int] = lambda _: 1  # training batches in an epoch, by batch size
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy  # of (logits, target), in training
    graph: Data | HeteroData | None = None  # the whole graph, for models that need more of it than batches hold
    split: Splits | None = None  # the nodes, or images, of train, val and test
    target: str | None = None  # of a heterogeneous graph, the node type that has labels
    planted: Tensor | None = None  # (T,) the expert that each token should go to, where that is known
    classes: tuple[str, ...] = ()  # names, where they are known
    mean: tuple[float, ...] = ()  # of images, a channel: the model sees (value in 0..1 - mean) / std
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
