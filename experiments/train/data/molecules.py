"""OGB's molecule sets (Hu et al., 2020): graphs with several labels, some of which are missing.

The files are OGB's download, or what ``experiments.convert molecules`` makes of MoleculeNet's
tables.

Shapes: G graphs, N nodes of all graphs, M edges (both directions), L labels a graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch_geometric.data import Batch as PyGBatch
from torch_geometric.data import Data

from experiments.train.data.graphs import order_of
from experiments.train.data.ogb import OGBMetric, folder_of, read_ogb
from experiments.train.data.published import published
from experiments.train.data.task import Batch, Shard, Split, Splits, Task
from gmoe._checks import check


@dataclass(frozen=True, kw_only=True)
class Molecules:
    """A set of molecules in memory."""

    name: str
    graphs: list[Data]
    y: Tensor  # (G, L), NaN where a label is missing
    split: Splits


def load_molecules(name: str, root: Path) -> Molecules:
    """One of OGB's molecule sets, with its split; ``root`` holds ogb's folder, ``ogbg_molhiv``.

    Graphs have ``x`` (nodes, 9) and ``edge_attr`` (edges, 3), whole numbers, and edges in both
    directions, each followed by its reverse.

    Raises:
        FileNotFoundError: missing files; says where they are published.
        ValueError: broken ones.
    """
    dataset, split = read_ogb(name, root)
    given = list(dataset)
    graphs = [Data(x=one.x, edge_index=one.edge_index, edge_attr=one.edge_attr) for one in given]
    y = torch.cat([one.y for one in given]).float()
    return Molecules(name=name, graphs=graphs, y=y, split=split)


def molecule_task(name: str, root: Path) -> Task:
    """Train on some molecules, validate and test on those of other scaffolds."""
    data = load_molecules(name, root)
    batches = MoleculeBatches(data)
    said = published(data.name)
    is_binary = said["task type"] == "binary classification"
    for part in ("val", "test") if is_binary else ():
        y = data.y[data.split[part]]
        has_both = ((y == 0).any(dim=0) & (y == 1).any(dim=0)).any()
        where = str(folder_of(name, root))
        check(has_both, where, f"no label with both classes in {part}", "one or more")
    return Task(
        name=data.name,
        kind="molecule",
        in_channels=data.graphs[0].x.size(1),
        num_classes=data.y.size(1),
        metric_name={"rocauc": "roc_auc"}.get(said["eval metric"], said["eval metric"]),
        metric=partial(OGBMetric, data.name),
        loader=batches,
        steps=batches.steps,
        loss=partial(loss_of_known, is_binary),
        split=data.split,
    )


class MoleculeBatches:
    """The batches of a set: several molecules side by side, as one graph of separate parts."""

    def __init__(self, data: Molecules) -> None:
        self.data = data

    def steps(self, batch_size: int) -> int:
        """How many training batches an epoch has."""
        return -(-len(self.data.split["train"]) // batch_size)

    def __call__(
        self, part: Split, batch_size: int, seed: int | None, shard: Shard = (0, 1)
    ) -> Iterator[Batch]:
        """Batches of nearly equal size: a last one of a single atom would have no batch norm."""
        rank, world = shard
        rows = self.data.split[part]
        count = -(-len(rows) // batch_size)
        for whole in rows[order_of(len(rows), seed)].tensor_split(count):
            yield self.batch(whole.tensor_split(world)[rank])

    def batch(self, rows: Tensor) -> Batch:
        """The molecules of these rows; the inputs are those of ``MoleculeGNN``."""
        graph: Any = PyGBatch.from_data_list([self.data.graphs[row] for row in rows.tolist()])
        inputs = (graph.x, graph.edge_index, graph.edge_attr, graph.batch, len(rows))
        return Batch(inputs, self.data.y[rows])


def loss_of_known(is_binary: bool, logits: Tensor, target: Tensor) -> Tensor:
    """The mean loss over the labels that are there; zero if there is none.

    Binary cross-entropy, or of numbers the squared error.
    """
    known = ~target.isnan()
    given = target.where(known, 0.0).to(logits.dtype)
    if is_binary:
        losses = F.binary_cross_entropy_with_logits(logits, given, reduction="none")
    else:
        losses = (logits - given).square()
    return (losses * known).sum() / known.sum().clamp(min=1)
