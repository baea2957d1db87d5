"""What training needs of a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import Tensor
from torch.nn import functional as F
from torch_geometric.data import Data, HeteroData
from torchmetrics import Metric

Split: TypeAlias = Literal["train", "val", "test"]
Splits: TypeAlias = dict[Split, Tensor]
MetricName: TypeAlias = Literal["accuracy", "roc_auc"]
Shard: TypeAlias = tuple[int, int]
"""A process's number r and how many there are, W: of each batch it takes the r-th of W slices
(``tensor_split``)."""


class Batch(NamedTuple):
    """One call of the model: ``model(*inputs)`` gives logits.

    The rows ``rows`` of these count, all if ``None``.
    """

    inputs: tuple[Any, ...]
    target: Tensor
    rows: Tensor | slice | None = None

    def counted(self, logits: Tensor) -> Tensor:
        """The logits that loss and metric count."""
        return logits if self.rows is None else logits[self.rows]

    def parts(self, number: int) -> list[Batch]:
        """As many slices of the batch, as even as possible; the last ones may be empty."""
        if number == 1:
            return [self]
        inputs = [value.tensor_split(number) for value in self.inputs]
        target = self.target.tensor_split(number)
        return [
            Batch(tuple(value[part] for value in inputs), target[part]) for part in range(number)
        ]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A data set with one split, ready to train on.

    ``loader(split, batch_size, shuffle_seed, shard)`` gives the batches of one epoch; no
    shuffling without a seed, and without a shard all of each batch. The slices of a small batch
    may be empty.
    """

    name: str
    # Inputs are those of a GNN, of a relational one, of a GNN of molecules, or images
    kind: Literal["graph", "typed", "molecule", "image"]
    # Width of the nodes (by type, None without features), or height and width of the images
    in_channels: Any
    num_classes: int  # width of the logits
    metric_name: str
    # Is updated with (logits, target); higher is better, in 0..1, unless it is one of ERRORS
    metric: Callable[[], Metric]
    loader: Callable[..., Iterable[Batch]]
    # Further metrics of the test set, by name
    beside: Mapping[str, Callable[[], Metric]] = field(default_factory=dict)
    steps: Callable[[int], int] = lambda _: 1  # training batches in an epoch, by batch size
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy  # of (logits, target), in training
    # The whole graph, for models that need more of it than batches hold
    graph: Data | HeteroData | None = None
    split: Splits | None = None  # the nodes, or molecules, of train, val and test
    target: str | None = None  # of a typed graph, the node type that has labels
    # (T,) the expert that each token should go to, where that is known
    planted: Tensor | None = None
    classes: tuple[str, ...] = ()  # names, where they are known
    # Of images, a channel: the model sees (value in 0..1 - mean) / std
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class GraphData:
    """A graph before it is made into batches: nodes, edges, labels, and who is trained on."""

    name: str
    data: Data | HeteroData  # y is (N,) classes, or (N, tasks) binary labels
    splits: Callable[[int], Splits]  # of a seed; of S fixed splits seed s takes s % S
    num_outputs: int  # width of the logits
    metric_name: MetricName = "accuracy"
    metric: Callable[[], Metric] | None = None  # another than that of the name
    target: str | None = None  # of a typed graph, the node type that has labels
    # (N,) the expert that each node should go to, where that is known
    planted: Tensor | None = None
