"""From a graph data set, of one node type or more, to batches: the whole graph, neighborhoods, or random parts."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch_geometric.data import Data, HeteroData
from torch_geometric.utils import contains_self_loops, to_torch_csr_tensor

from experiments.config import GraphConfig, HeteroConfig
from experiments.data.graph_data import GraphData, Split, Splits, task_loss
from experiments.data.task import Batch, Shard, Task
from gmoe.conv.kinds import factory_of
from gmoe.data.loader import neighbor_loader

CSR_CONVS = frozenset({"gcn", "sage", "graph", "gin", "mlp", "filter", "identity", "low_pass", "high_pass", "two_hop"})
"""Convs that PyG runs on a sparse matrix without a message for every edge."""
NORMALIZED = CSR_CONVS - {"sage", "graph", "gin", "mlp", "identity"}
"""Those of them that add self-loops: in a matrix also where there are some, in ``edge_index`` only where not."""


def graph_task(graph: GraphData, config: GraphConfig | HeteroConfig, seed: int) -> Task:
    """Node classification on the split of a seed."""
    split = graph.splits(seed)
    batches = (HeteroBatches if isinstance(config, HeteroConfig) else GraphBatches)(graph, config, split)
    return Task(
        name=graph.name,
        kind="graph" if graph.target is None else "hetero",
        in_channels=batches.in_channels,
        num_classes=graph.num_outputs,
        metric_name=graph.metric_name,
        metric=graph.metric,
        loader=batches,
        steps=batches.steps,
        loss=task_loss,
        graph=batches.data,
        split=split,
        target=graph.target,
        planted=graph.planted,
    )


class GraphBatches:
    """The batches of a graph of one node type, in the split of a seed."""

    def __init__(self, graph: GraphData, config: Any, split: Splits) -> None:
        if config.label_reuse and config.evaluation == "layerwise":
            raise ValueError(
                f"label_reuse: got {config.label_reuse} with evaluation='layerwise', expected evaluation='full'"
            )
        self.config, self.split, self.num_outputs = config, split, graph.num_outputs
        assert isinstance(graph.data, Data)
        data = Data(x=graph.data.x, edge_index=graph.data.edge_index, y=graph.data.y)
        if graph.data.edge_weight is not None:
            if any(weighs_edges(config)):
                data.edge_weight = graph.data.edge_weight
            else:
                warnings.warn(
                    f"edge_weight: {graph.name} has some, but {', '.join(config.conv)} takes none", stacklevel=3
                )
        self.whole = self.inputs(data, adjacency(config, data))
        self.data = data.sort(sort_by_row=False) if config.sampling == "neighbor" else data
        self.in_channels = data.x.size(1) + (graph.num_outputs if config.label_reuse else 0)

    def inputs(self, part: Data, adj: Tensor) -> tuple[Any, ...]:
        """What the model is called with; a matrix holds the weights itself."""
        weighs = part.edge_weight is not None and not adj.is_sparse_csr
        return (part.x, adj, part.edge_weight) if weighs else (part.x, adj)

    def steps(self, batch_size: int) -> int:
        """How many training batches an epoch has."""
        counts = {"full": 1, "neighbor": len(self.split["train"]), "random_node": self.data.num_nodes}
        return -(-counts[self.config.sampling] // (1 if self.config.sampling == "full" else batch_size))

    def __call__(self, part: Split, batch_size: int, seed: int | None, shard: Shard = (0, 1)) -> Iterable[Batch]:
        if self.config.sampling == "full" or (part != "train" and self.config.evaluation == "full"):
            return [self.full(part, seed)]
        if self.config.sampling == "neighbor":
            return self.neighbors(part, batch_size, seed, shard)
        return self.random_parts(part, batch_size, seed, shard)

    def full(self, part: Split, seed: int | None) -> Batch:
        """The whole graph; with label reuse some training labels are input, and the loss is on the others."""
        rows, known = self.split[part], self.split["train"]
        if not self.config.label_reuse:
            return Batch(self.whole, self.data.y[rows], rows)
        if part == "train":
            generator = torch.Generator().manual_seed(0 if seed is None else seed)
            draws = torch.rand(len(rows), generator=generator)
            given = draws < self.config.label_reuse
            given[draws.argmax()] = False  # of a few labels all may be drawn
            rows, known = rows[~given], rows[given]
        labels, y = self.data.x.new_zeros(self.data.num_nodes, self.num_outputs), self.data.y
        labels[known] = (y[known] if y.dim() == 2 else F.one_hot(y[known], self.num_outputs)).to(labels.dtype)
        return Batch((torch.cat([self.data.x, labels], dim=1), *self.whole[1:]), y[rows], rows)

    def neighbors(self, part: Split, batch_size: int, seed: int | None, shard: Shard) -> Iterator[Batch]:
        """Sampled neighborhoods; seeds come first, and only they count."""
        for batch in neighborhoods(self.data, self.config, self.split[part], batch_size, seed, shard):
            inputs = self.inputs(batch, batch.edge_index)
            if self.config.layers == len(self.config.fanout):  # a layer then computes only what the later ones hear
                inputs += (None,) * (6 - len(inputs)) + (batch.num_sampled_nodes, batch.num_sampled_edges)
            yield Batch(inputs, batch.y[: batch.batch_size], slice(0, batch.batch_size))

    def random_parts(self, part: Split, batch_size: int, seed: int | None, shard: Shard) -> Iterator[Batch]:
        """Subgraphs of random nodes."""
        rank, world = shard
        nodes = self.data.num_nodes
        member = torch.zeros(nodes, dtype=torch.bool)
        member[self.split[part]] = True
        count = -(-nodes // batch_size)
        for whole in _order(nodes, seed).split(-(-nodes // count)):
            if member[whole].any():  # on all processes, or on none
                mine = whole.tensor_split(world)[rank]
                batch, rows = self.data.subgraph(mine), member[mine].nonzero().view(-1)
                yield Batch(self.inputs(batch, batch.edge_index), batch.y[rows], rows)


class HeteroBatches:
    """The batches of the nodes of one type of a heterogeneous graph; see :class:`GraphBatches`."""

    def __init__(self, graph: GraphData, config: Any, split: Splits) -> None:
        self.config, self.split, self.target = config, split, graph.target
        data = graph.data
        self.whole = (data.collect("x"), data.edge_index_dict)
        self.data = data.sort(sort_by_row=False) if config.sampling == "neighbor" else data
        self.in_channels = {kind: data[kind].x.size(1) if "x" in data[kind] else None for kind in data.node_types}

    def steps(self, batch_size: int) -> int:
        """How many training batches an epoch has."""
        return -(-len(self.split["train"]) // batch_size) if self.config.sampling == "neighbor" else 1

    def __call__(self, part: Split, batch_size: int, seed: int | None, shard: Shard = (0, 1)) -> Iterator[Batch]:
        rows = self.split[part]
        if self.config.sampling == "full" or (part != "train" and self.config.evaluation == "full"):
            yield Batch(self.whole, self.data[self.target].y[rows], rows)
            return
        for batch in neighborhoods(self.data, self.config, (self.target, rows), batch_size, seed, shard):
            ids = {kind: batch[kind].n_id for kind in batch.node_types}
            size = batch[self.target].batch_size
            inputs = (batch.collect("x"), batch.edge_index_dict, ids)
            yield Batch(inputs, batch[self.target].y[:size], slice(0, size))


def neighborhoods(
    data: Data | HeteroData,
    config: GraphConfig | HeteroConfig,
    nodes: Any,
    batch_size: int,
    seed: int | None,
    shard: Shard,
) -> Iterable[Any]:
    """Neighborhoods of nodes, shuffled with a seed; edges of ``data`` are sorted by destination."""
    rank, world = shard
    order = _order(len(nodes[1]) if isinstance(nodes, tuple) else len(nodes), seed)
    return neighbor_loader(
        data,
        list(config.fanout),
        input_nodes=nodes,
        batch_sampler=[whole.tensor_split(world)[rank].tolist() for whole in order.split(batch_size)],
        generator=None if seed is None else torch.Generator().manual_seed(seed + (rank << 50)),  # the workers' draws
        num_workers=config.workers,
        is_sorted=True,
    )


def _order(count: int, seed: int | None) -> Tensor:
    """(count,) a permutation that follows from the seed, on all processes alike."""
    if seed is None:
        return torch.arange(count)
    generator = torch.Generator().manual_seed(seed)
    torch.empty((), dtype=torch.int64).random_(generator=generator)  # as DataLoader draws before it shuffles
    return torch.randperm(count, generator=generator)


def weighs_edges(config: GraphConfig) -> list[bool]:
    """Whether each kind of conv of the run takes edge weights."""
    found = []
    for kind in config.conv[:1] if config.router == "dense" else config.conv:
        made: Any = factory_of(kind)
        while isinstance(made, partial):  # of GIN and others, what the factory is given
            made = made.args[0] if made.args else made.func
        found.append("edge_weight" in inspect.signature(made.forward).parameters)
    return found


def adjacency(config: GraphConfig, data: Data) -> Tensor:
    """The edges of the whole graph as models get them, a sparse matrix or ``edge_index``; see ``--adjacency``.

    Raises:
        ValueError: a sparse matrix is asked for where it is not the same graph: in mixed precision, with edge weights
            that some of the convs do not take, with self-loops that a conv would double, or with parallel edges.
    """
    if config.adjacency == "edge_index":
        return data.edge_index
    refused = {
        "precision": config.precision == "bf16-mixed",  # there are no sparse kernels in bfloat16
        "edge_weight": data.edge_weight is not None and len(set(weighs_edges(config))) > 1,
        "self-loops": not NORMALIZED.isdisjoint(config.conv) and contains_self_loops(data.edge_index),
    }
    names = [name for name, is_refused in refused.items() if is_refused]
    if not names and (config.adjacency == "csr" or (config.sampling == "full" and set(config.conv) <= CSR_CONVS)):
        ends, size = data.edge_index.flip([0]), (data.num_nodes, data.num_nodes)
        matrix = to_torch_csr_tensor(ends, edge_attr=data.edge_weight, size=size)
        if matrix.values().numel() == data.num_edges:
            return matrix
        names = ["parallel edges"]  # for which it has one place
    if config.adjacency == "csr":
        raise ValueError(f"adjacency: got 'csr', expected 'auto' or 'edge_index' because of {', '.join(names)}")
    return data.edge_index
