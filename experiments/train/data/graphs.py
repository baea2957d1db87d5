"""From a graph to batches.

A batch is the whole graph, or neighborhoods.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from torch_geometric.data import Data
from torch_geometric.data.data import DataEdgeAttr, DataTensorAttr
from torch_geometric.data.storage import BaseStorage, EdgeStorage, GlobalStorage, NodeStorage
from torch_geometric.nn import GCNConv, GINConv, GraphConv, SAGEConv, SimpleConv
from torch_geometric.transforms import ToUndirected
from torch_geometric.utils import contains_self_loops, to_torch_csr_tensor
from torchmetrics import Metric
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.utilities import dim_zero_cat

from experiments.train.config import GraphConfig, RunConfig
from experiments.train.data.task import Batch, GraphData, MetricName, Shard, Split, Splits, Task
from experiments.train.user_code import load_conv
from gmoe._checks import check
from gmoe.conv.kinds import class_of, factory_of
from gmoe.data import neighbor_loader

MASKS: dict[Split, str] = {part: f"{part}_mask" for part in get_args(Split)}
DATA: list[Any] = [
    Data,
    DataEdgeAttr,
    DataTensorAttr,
    BaseStorage,
    GlobalStorage,
    NodeStorage,
    EdgeStorage,
]
"""What a PyG ``Data`` is made of."""


def directed(graph: GraphData, undirected: bool) -> GraphData:
    """The graph, in both directions if asked for; an edge there twice gets the mean of its
    weights."""
    return replace(graph, data=ToUndirected(reduce="mean")(graph.data)) if undirected else graph


def graph_task(graph: GraphData, config: Any, seed: int) -> Task:
    """Node classification on the split of a seed; ``config`` is a ``NodeConfig``."""
    split = graph.splits(seed)
    data: Any = graph.data
    labels = (data if graph.target is None else data[graph.target]).y
    if graph.metric_name == "roc_auc" and graph.metric is None:
        for each in config.seeds:  # before the first is trained
            parts = graph.splits(each)
            one = [part for part in ("val", "test") if len(labels[parts[part]].unique()) < 2]
            got = f"'roc_auc' with nodes of one class only in {' and '.join(one)} of seed {each}"
            check(not one, "metric", got, "both classes there")
    of_kind: dict[str, Any]
    if graph.target is None:
        batches = GraphBatches(graph, config, split)
        of_kind = {
            "kind": "graph",
            "in_channels": data.x.size(1),
            "loader": batches,
            "steps": batches.steps,
            "graph": batches.data,
        }
    else:
        x_dict = data.collect("x")
        whole = {
            part: [Batch((x_dict, data.edge_index_dict), labels[rows], rows)]
            for part, rows in split.items()
        }
        of_kind = {
            "kind": "typed",
            "in_channels": {kind: x.size(1) for kind, x in x_dict.items()},
            "loader": lambda part, *_: whole[part],
            "graph": data,
        }
    return Task(
        name=graph.name,
        num_classes=graph.num_outputs,
        metric_name=graph.metric_name,
        metric=graph.metric or make_metric(graph.metric_name, graph.num_outputs),
        loss=task_loss,
        split=split,
        target=graph.target,
        planted=graph.planted,
        **of_kind,
    )


class GraphBatches:
    """The batches of a graph of one node type in the split of a seed."""

    def __init__(self, graph: GraphData, config: GraphConfig, split: Splits) -> None:
        self.config = config
        self.split = split
        given: Any = graph.data
        data: Any = Data(
            x=given.x, edge_index=given.edge_index, y=given.y, edge_weight=given.edge_weight
        )
        if data.edge_weight is not None and not any(weighs_edges(config)):
            warnings.warn(
                f"edge_weight: {graph.name} has some, {', '.join(config.convs())} takes none",
                stacklevel=3,
            )
            del data.edge_weight
        self.whole = _inputs(data, adjacency(config, data))
        self.data = data.sort(sort_by_row=False) if config.sampling == "neighbor" else data

    def steps(self, batch_size: int) -> int:
        """How many training batches an epoch has."""
        if self.config.sampling == "full":
            return 1
        return -(-len(self.split["train"]) // batch_size)

    def __call__(
        self, part: Split, batch_size: int, seed: int | None, shard: Shard = (0, 1)
    ) -> Iterable[Batch]:
        rows = self.split[part]
        if self.config.sampling == "full" or part != "train":
            return [Batch(self.whole, self.data.y[rows], rows)]
        return neighborhoods(self.data, self.config, rows, batch_size, seed, shard)


def neighborhoods(
    data: Any,
    config: GraphConfig,
    rows: Tensor,
    batch_size: int,
    seed: int | None,
    shard: Shard,
) -> Iterator[Batch]:
    """Sampled neighborhoods of the nodes ``rows``, shuffled with a seed; edges are sorted by
    destination.

    The nodes of a batch come first in it, and only they count.
    """
    rank, world = shard
    loader = neighbor_loader(
        data,
        list(config.fanout),
        input_nodes=rows,
        batch_sampler=[
            whole.tensor_split(world)[rank].tolist()
            for whole in order_of(len(rows), seed).split(batch_size)
        ],
        num_workers=config.workers,
        is_sorted=True,
    )
    # Workers are seeded here.
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed + (rank << 50))
        batches = iter(loader)
    for batch in batches:
        inputs = _inputs(batch, batch.edge_index)
        # Layers compute what later ones hear
        if config.model is None and config.layers == len(config.fanout):
            inputs += (None,) * (6 - len(inputs)) + (
                batch.num_sampled_nodes,
                batch.num_sampled_edges,
            )
        yield Batch(inputs, batch.y[: batch.batch_size], slice(0, batch.batch_size))


def _inputs(part: Any, adj: Tensor) -> tuple[Any, ...]:
    """What the model is called with; a matrix holds the weights itself."""
    if part.edge_weight is None or adj.is_sparse_csr:
        return part.x, adj
    return part.x, adj, part.edge_weight


def order_of(count: int, seed: int | None) -> Tensor:
    """(count,) a permutation that follows from the seed, on all processes alike."""
    if seed is None:
        return torch.arange(count)
    generator = torch.Generator().manual_seed(seed)
    # As DataLoader draws before it shuffles
    torch.empty((), dtype=torch.int64).random_(generator=generator)
    return torch.randperm(count, generator=generator)


def weighs_edges(config: RunConfig) -> list[bool]:
    """Whether each kind of conv of the run takes edge weights."""
    convs = config.convs()[:1] if config.router == "dense" else config.convs()
    classes: list[Any] = [class_of(factory_of(load_conv(conv))) for conv in convs]
    return ["edge_weight" in inspect.signature(cls.forward).parameters for cls in classes]


MULTIPLYING: frozenset[type] = frozenset({GCNConv, GINConv, GraphConv, SAGEConv, SimpleConv})
"""Convs that PyG runs as a product with a sparse matrix, without a message for every edge."""


def adjacency(config: GraphConfig, data: Data) -> Tensor:
    """The edges of the whole graph: a sparse matrix where convs run on it and it is the same
    graph, or ``edge_index``.

    It is not for one's own model, in mixed precision (no sparse kernels in bfloat16), with edge
    weights that some of the convs do not take, with self-loops that a conv would double, or
    with parallel edges (one place in a matrix).
    """
    classes = {class_of(factory_of(load_conv(conv))) for conv in config.conv}
    if (
        config.model is None
        and config.sampling == "full"
        and config.precision != "bf16-mixed"
        and classes <= MULTIPLYING
        and (data.edge_weight is None or len(set(weighs_edges(config))) == 1)
        and not (GCNConv in classes and contains_self_loops(data.edge_index))
    ):
        ends = data.edge_index.flip([0])
        size = (data.num_nodes, data.num_nodes)
        matrix = to_torch_csr_tensor(ends, edge_attr=data.edge_weight, size=size)
        if matrix.values().numel() == data.num_edges:
            return matrix
    return data.edge_index


def task_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of classes; of (., tasks) binary labels, their mean binary cross-entropy."""
    if target.dim() == 2:
        return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype))
    return F.cross_entropy(logits, target)


class TwoClassAUROC(BinaryAUROC):
    """Area under the ROC curve of two logits a node; NaN where a logit is.

    Exact: by ranks, where probabilities of large logits would all round to 1.
    """

    def update(self, preds: Tensor, target: Tensor) -> None:
        logits = preds.detach().cpu().double()  # not every accelerator has float64
        self.preds.append(logits[:, 1] - logits[:, 0])
        self.target.append(target.cpu())

    def compute(self) -> Tensor:  # type: ignore[override]
        margin = dim_zero_cat(self.preds)
        target = dim_zero_cat(self.target)
        if margin.isnan().any():
            return margin.new_tensor(torch.nan)
        values, rank = margin.unique(return_inverse=True)
        return binary_auroc(rank.double() / len(values), target)


def make_metric(name: MetricName, num_classes: int) -> Callable[[], Metric]:
    """A factory of the metric; ``"roc_auc"`` takes two classes."""
    if name == "accuracy":
        return partial(MulticlassAccuracy, num_classes=num_classes, average="micro")
    got = f"'roc_auc' for {num_classes} classes"
    check(num_classes == 2, "metric", got, "'accuracy' (roc_auc takes two)")
    return TwoClassAUROC


def fixed_splits(store: Any, seed: int) -> Splits:
    """The split of a seed, by the masks of a graph, or of a node type.

    Masks are (N,), or (N, S) for S splits.
    """
    masks = {part: store[name].view(len(store.y), -1) for part, name in MASKS.items()}
    return {part: mask[:, seed % mask.size(1)].nonzero().view(-1) for part, mask in masks.items()}


def per_class_splits(store: Any, seed: int) -> Splits:
    """A random split with 20 nodes a class in train, 30 in val and the rest in test.

    That of Shchur et al. (2018).
    """
    order = torch.randperm(len(store.y), generator=torch.Generator().manual_seed(seed))
    parts = [order[store.y[order] == label].tensor_split([20, 50]) for label in store.y.unique()]
    check(all(len(test) for *_, test in parts), "split", "a class of 50 nodes or fewer", "more")
    return {
        part: torch.cat(nodes).sort().values
        for part, nodes in zip(MASKS, zip(*parts, strict=True), strict=True)
    }


def stratified_splits(store: Any, seed: int) -> Splits:
    """A random split of the nodes that have a label (0 or more).

    60 / 20 / 20 % of each class, to a node.
    """
    labeled = (store.y >= 0).nonzero().view(-1)
    shuffled = labeled[torch.randperm(len(labeled), generator=torch.Generator().manual_seed(seed))]
    by_class = shuffled[store.y[shuffled].sort(stable=True).indices]
    # Of any five in a row, three train: small classes need no rule
    place = (torch.arange(len(labeled)) + seed) % 5
    chosen = {"train": place < 3, "val": place == 3, "test": place == 4}
    return {part: by_class[chosen[part]].sort().values for part in MASKS}


def check_graph(where: str, data: Any, target: str | None = None) -> None:
    """Refuse a graph that cannot be what it should.

    Its shapes have to fit, its edges point inside, its features be finite; each split has nodes
    in train, val and test, none of them in two, and each of them has a label of 0 or more.
    ``where`` begins the message; ``target`` is the node type of a typed graph that has
    labels.
    """
    store = data if target is None else data[target]
    for x in [data.x] if target is None else data.collect("x", allow_empty=True).values():
        is_table = x.dim() == 2 and x.size(1) > 0
        got = f"features of shape {tuple(x.shape)}"
        check(is_table and x.isfinite().all(), where, got, "finite numbers (nodes, width)")
    try:
        data.validate()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    masks = [store[mask] for mask in MASKS.values() if mask in store]
    for value in (store.y, *masks):
        has_rows = value.dim() in (1, 2) and len(value) == store.num_nodes
        got = f"y or a mask of shape {tuple(value.shape)}"
        check(has_rows, where, got, f"a row for each of {store.num_nodes} nodes")
    if not masks:
        has_labels = (store.y >= 0).sum() >= 5
        check(has_labels, where, "fewer than 5 nodes with a label", "5 or more, or masks")
        return
    splits = max(mask[0].numel() for mask in masks)
    are_alike = all(mask.dim() == 1 or mask.size(1) == splits for mask in masks)
    check(are_alike, where, "masks of different numbers of splits", "as many in each")
    # (parts, N, S)
    table = torch.stack([mask.view(len(mask), -1).expand(-1, splits) for mask in masks])
    has_nodes = table.any(dim=1).all()
    check(has_nodes, where, "a split without nodes in one part", "some in train, val and test")
    check(table.sum(dim=0).max() <= 1, where, "a node in two parts of a split", "each in one")
    labels = store.y[table.any(dim=2).any(dim=0)]
    check((labels >= 0).all(), where, "a negative label in a split", "0 or more")
