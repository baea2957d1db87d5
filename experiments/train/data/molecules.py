"""OGB's molecule sets (Hu et al., 2020): graphs with several labels, some of which are missing.

The files are OGB's download, or what ``experiments.convert molecules`` makes of MoleculeNet's
tables. They are read here, not by ``ogb``'s loader, which asks questions by ``input()``.

Shapes: G graphs, N nodes of all graphs, M edges (both directions), L labels a graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch_geometric.data import Batch as PyGBatch
from torch_geometric.data import Data

from experiments.train.data.graphs import order_of
from experiments.train.data.ogb import OGBMetric, kept_tensors, provide, table
from experiments.train.data.published import published, without_update_check
from experiments.train.data.task import Batch, Shard, Split, Splits, Task
from experiments.train.files import read_csv
from gmoe._checks import check

MEGABYTES = 3
"""Of a download, about: the files of molhiv, as converted, take 2."""


@dataclass(frozen=True, kw_only=True)
class Molecules:
    """A set of molecules in memory."""

    name: str
    graphs: list[Data]
    y: Tensor  # (G, L), NaN where a label is missing
    split: Splits


def files_of(name: str) -> dict[Any, str]:
    """The files that are read, by what they hold."""
    said = published(name)
    raw = {
        "edge": "edge",
        "edge_attr": "edge-feat",
        "x": "node-feat",
        "nodes": "num-node-list",
        "edges": "num-edge-list",
        "y": "graph-label",
    }
    files: dict[Any, str] = {of: f"raw/{file}.csv.gz" for of, file in raw.items()}
    files["release"] = f"RELEASE_v{said['version']}.txt"
    for part in get_args(Split):
        file = "valid" if part == "val" else part
        files[part] = f"split/{said['split']}/{file}.csv.gz"
    return files


def load_molecules(name: str, root: Path, *, offline: bool = False) -> Molecules:
    """One of OGB's molecule sets, with its split; ``root`` holds ogb's folder, ``ogbg_molhiv``.

    Graphs have ``x`` (nodes, 9) and ``edge_attr`` (edges, 3), whole numbers, and edges in both
    directions, each followed by its reverse, as ``PygGraphPropPredDataset`` has them.

    Raises:
        FileNotFoundError: missing files that may not or cannot be downloaded.
        ValueError: broken ones.
    """
    files = files_of(name)
    folder = provide(name, root.expanduser(), files, MEGABYTES, offline, True)
    tensors = kept_tensors(name, folder, files, _read)
    nodes = tensors["nodes"].tolist()
    edges = tensors["edges"].tolist()
    parts = zip(
        tensors["x"].split(nodes),
        tensors["edge_index"].split(edges, dim=1),
        tensors["edge_attr"].split(edges),
        strict=True,
    )
    graphs = [
        Data(x=x, edge_index=edge_index, edge_attr=edge_attr) for x, edge_index, edge_attr in parts
    ]
    return Molecules(name=name, graphs=graphs, y=tensors["y"], split=tensors["split"])


def _read(name: str, files: dict[Any, Path]) -> dict[str, Any]:
    """All tensors of a set: ``nodes`` and ``edges`` count those of each graph."""
    without_update_check()
    from ogb.utils.features import get_atom_feature_dims, get_bond_feature_dims

    said = published(name)
    most = np.iinfo(np.int32).max
    nodes = table(files["nodes"], None, [most]).view(-1)
    check(nodes.min() > 0, str(files["nodes"]), "a graph without nodes", "one or more in each")
    graphs = len(nodes)
    total = int(nodes.sum())
    edges = table(files["edges"], graphs, [most]).view(-1)
    ends = table(files["edge"], int(edges.sum()), [int(nodes.max())] * 2)
    inside = (ends < nodes.repeat_interleave(edges)[:, None]).all(dim=1)
    row = int(inside.int().argmin())
    got = f"row {row}, an edge {ends[row].tolist()}"
    check(inside.all(), str(files["edge"]), got, "nodes of its graph, from 0")
    x = table(files["x"], total, get_atom_feature_dims())
    edge_attr = table(files["edge_attr"], len(ends), get_bond_feature_dims())
    both = torch.stack([ends, ends.flip(1)], dim=1).view(-1, 2)
    split: Splits = {part: table(files[part], None, [graphs]).view(-1) for part in get_args(Split)}
    twice = torch.cat([*split.values()]).bincount()
    where = str(files["train"].parent)
    check(twice.max() < 2, where, f"graph {int(twice.argmax())} twice", "each at most once")
    return {
        "x": x,
        "edge_index": both.t().contiguous(),
        "edge_attr": edge_attr.repeat_interleave(2, dim=0),
        "nodes": nodes,
        "edges": 2 * edges,
        "y": _labels(files["y"], graphs, int(said["num tasks"]), said["task type"]),
        "split": split,
    }


def _labels(path: Path, graphs: int, tasks: int, kind: str) -> Tensor:
    """(G, L) the labels, NaN where one is missing."""
    y = read_csv(path, header=None, dtype=np.float64).to_numpy()
    known = y[~np.isnan(y)]
    is_binary = kind == "binary classification"
    is_table = y.shape == (graphs, tasks) and bool(np.isfinite(known).all())
    has_labels = not is_binary or bool(np.isin(known, (0, 1)).all())
    legal = "0, 1 or nothing" if is_binary else "numbers or nothing"
    check(
        is_table and has_labels,
        str(path),
        f"a table of shape {y.shape}",
        f"({graphs}, {tasks}) of {legal}",
    )
    return torch.from_numpy(y.astype(np.float32))


def molecule_task(name: str, root: Path, *, offline: bool = False) -> Task:
    """Train on some molecules, validate and test on those of other scaffolds."""
    data = load_molecules(name, root, offline=offline)
    batches = MoleculeBatches(data)
    said = published(data.name)
    is_binary = said["task type"] == "binary classification"
    for part in ("val", "test") if is_binary else ():
        y = data.y[data.split[part]]
        has_both = ((y == 0).any(dim=0) & (y == 1).any(dim=0)).any()
        where = str(root / data.name.replace("-", "_"))
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
        labels=data.y,
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
