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
from torch_geometric.nn import MessagePassing
from torch_geometric.transforms import ToUndirected
from torch_geometric.utils import contains_self_loops, to_torch_csr_tensor

from experiments.config import GraphConfig, HeteroConfig
from experiments.data.graph_data import GraphData, Split, task_loss
from experiments.data.task import Batch, Loader, Shard, Task
from gmoe.conv.kinds import factory_of
from gmoe.data.loader import neighbor_loader

CSR_CONVS = frozenset({"gcn", "sage", "graph", "gin", "mlp", "filter", "identity", "low_pass", "high_pass", "two_hop"})
"""Convs that PyG runs on a sparse matrix without a message for every edge."""
NORMALIZED = CSR_CONVS - {"sage", "graph", "gin", "mlp", "identity"}
"""Those of them that add self-loops: in a matrix also where there are some, in ``edge_index`` only where not."""


def transformed(graph: GraphData, config: GraphConfig | HeteroConfig) -> Data | HeteroData:
    """The graph with the edges that the run asks for: both directions, self-loops.

    An edge that is there in both directions, or several times, gets the mean of its weights and features; a new
    self-loop gets weight 1, and the mean of the features of the node's in-edges.
    """
    data = graph.data
    if config.undirected:
        data = ToUndirected(reduce="mean")(data)
    return data


def weighs_edges(config: GraphConfig) -> list[bool]:
    """Whether each kind of conv of the run takes edge weights.

    Raises:
        ValueError: an unknown conv.
    """
    kinds = config.conv[:1] if config.router == "dense" else config.conv
    return ["edge_weight" in inspect.signature(conv_class(kind).forward).parameters for kind in kinds]


def uses_csr(config: GraphConfig, data: Data) -> bool:
    """Whether the whole graph is given as a sparse matrix; see ``--adjacency``.

    Raises:
        ValueError: a sparse matrix is asked for where it is not the same graph: with edge features, in mixed precision,
            with edge weights that some of the convs do not take, or with self-loops that a conv would double.
    """
    hidden = data.edge_weight is not None and len(set(weighs_edges(config))) > 1  # all convs would see the values
    refused = {
        "precision": config.precision == "bf16-mixed",  # there are no sparse kernels in bfloat16
        "edge_weight": hidden,
        "self-loops": not NORMALIZED.isdisjoint(config.conv) and contains_self_loops(data.edge_index),
    }
    names = ", ".join(name for name, is_refused in refused.items() if is_refused)
    if config.adjacency == "csr" and names:
        raise ValueError(f"adjacency: got 'csr', expected 'auto' or 'edge_index' because of {names}")
    if config.adjacency != "auto":
        return config.adjacency == "csr"
    return config.sampling == "full" and set(config.conv) <= CSR_CONVS and not names


def label_rows(y: Tensor, num_outputs: int) -> Tensor:
    """(N, outputs) labels as input: one-hot of classes, binary labels as they are."""
    return y if y.dim() == 2 else F.one_hot(y, num_outputs)


def graph_task(graph: GraphData, data: Data | HeteroData, config: GraphConfig, seed: int) -> Task:
    """Node classification on the split of a seed.

    Args:
        graph: the data set.
        data: its graph, :func:`transformed`.
        config: how it is batched.
        seed: chooses the split.

    Raises:
        ValueError: edge features are asked for, and there are none; label use with layer-wise evaluation; whatever
            :func:`uses_csr` refuses.
    """
    assert isinstance(data, Data)
    if config.label_reuse and config.evaluation == "layerwise":
        raise ValueError(
            f"label_reuse: got {config.label_reuse} with evaluation='layerwise', expected evaluation='full'"
        )
    split = graph.splits(seed)
    data = _seen(graph, data, config)
    adj: Any = data.edge_index
    if uses_csr(config, data):
        ends, size = data.edge_index.flip([0]), (data.num_nodes, data.num_nodes)
        matrix = to_torch_csr_tensor(ends, edge_attr=data.edge_weight, size=size)
        if matrix.values().numel() == data.num_edges:
            adj = matrix
        elif config.adjacency == "csr":  # which has one place for all of them
            raise ValueError("adjacency: got 'csr', expected 'auto' or 'edge_index' because of parallel edges")

    def inputs_of(part: Data, adj: Tensor) -> tuple[Any, ...]:
        weight = None if adj.is_sparse_csr else part.edge_weight  # a matrix holds them
        if part.edge_attr is not None:
            return part.x, adj, weight, part.edge_attr
        return (part.x, adj) if weight is None else (part.x, adj, weight)

    whole = inputs_of(data, adj)
    if config.sampling == "neighbor":  # once, not in every epoch
        data = data.sort(sort_by_row=False)

    # a layer then computes only what the later ones hear
    trims = config.layers == len(config.fanout) and not (data.edge_weight is not None and data.edge_attr is not None)

    def full(part: Split, batch_size: int, seed: int | None, shard: Shard = (0, 1)) -> Iterable[Batch]:
        rows, known = split[part], split["train"]
        if not config.label_reuse:
            return [Batch(whole, data.y[rows], rows)]
        if part == "train":  # learn from labels that are not given away
            generator = torch.Generator().manual_seed(0 if seed is None else seed)
            draws = torch.rand(len(rows), generator=generator)
            given = draws < config.label_reuse
            given[draws.argmax()] = False  # of a few labels all may be drawn
            rows, known = rows[~given], rows[given]
        labels = data.x.new_zeros(data.num_nodes, graph.num_outputs)
        labels[known] = label_rows(data.y[known], graph.num_outputs).to(labels.dtype)
        return [Batch((torch.cat([data.x, labels], dim=1), *whole[1:]), data.y[rows], rows)]

    def neighbors(part: Split, batch_size: int, seed: int | None, shard: Shard = (0, 1)) -> Iterator[Batch]:
        # seeds come first, and only they count
        for batch in _sampled(data, config, split[part], batch_size, seed, shard):
            inputs = inputs_of(batch, batch.edge_index)
            if trims:
                hops = (batch.num_sampled_nodes, batch.num_sampled_edges)
                inputs += (None,) * (6 - len(inputs)) + hops
            yield Batch(inputs, batch.y[: batch.batch_size], slice(0, batch.batch_size))

    def parts(part: Split, batch_size: int, seed: int | None, shard: Shard = (0, 1)) -> Iterator[Batch]:
        rank, world = shard
        member = torch.zeros(data.num_nodes, dtype=torch.bool)
        member[split[part]] = True
        count = -(-data.num_nodes // batch_size)
        for whole in _order(data.num_nodes, seed).split(-(-data.num_nodes // count)):
            if member[whole].any():  # on all processes, or on none
                nodes = whole.tensor_split(world)[rank]
                batch, rows = data.subgraph(nodes), member[nodes].nonzero().view(-1)
                yield Batch(inputs_of(batch, batch.edge_index), batch.y[rows], rows)

    loaders: dict[str, Loader] = {"full": full, "neighbor": neighbors, "random_node": parts}
    sampled = loaders[config.sampling]

    def loader(part: Split, batch_size: int, seed: int | None, shard: Shard = (0, 1)) -> Iterable[Batch]:
        whole_graph = part != "train" and config.evaluation == "full"
        return (full if whole_graph else sampled)(part, batch_size, seed, shard)

    counted = {"neighbor": len(split["train"]), "random_node": data.num_nodes}
    return Task(
        name=graph.name,
        kind="graph",
        in_channels=data.x.size(1) + (graph.num_outputs if config.label_reuse else 0),
        num_classes=graph.num_outputs,
        metric_name=graph.metric_name,
        metric=graph.metric,
        loader=loader,
        steps=lambda size: -(-counted[config.sampling] // size) if config.sampling in counted else 1,
        loss=task_loss,
        graph=data,
        split=split,
        planted=graph.planted,
    )


def hetero_task(graph: GraphData, data: Data | HeteroData, config: HeteroConfig, seed: int) -> Task:
    """Classification of the nodes of one type."""
    assert isinstance(data, HeteroData)
    assert graph.target is not None
    target, split = graph.target, graph.splits(seed)
    whole: tuple[Any, ...] = (data.collect("x"), data.edge_index_dict)
    if config.sampling == "neighbor":  # once, not in every epoch
        data = data.sort(sort_by_row=False)

    def full(part: Split, batch_size: int, seed: int | None, shard: Shard = (0, 1)) -> Iterable[Batch]:
        return [Batch(whole, data[target].y[split[part]], split[part])]

    def neighbors(part: Split, batch_size: int, seed: int | None, shard: Shard = (0, 1)) -> Iterator[Batch]:
        for batch in _sampled(data, config, (target, split[part]), batch_size, seed, shard):
            ids = {kind: batch[kind].n_id for kind in batch.node_types}
            size = batch[target].batch_size
            inputs = (batch.collect("x"), batch.edge_index_dict, ids)
            yield Batch(inputs, batch[target].y[:size], slice(0, size))

    def loader(part: Split, batch_size: int, seed: int | None, shard: Shard = (0, 1)) -> Iterable[Batch]:
        whole_graph = config.sampling == "full" or (part != "train" and config.evaluation == "full")
        return (full if whole_graph else neighbors)(part, batch_size, seed, shard)

    return Task(
        name=graph.name,
        kind="hetero",
        in_channels={kind: data[kind].x.size(1) if "x" in data[kind] else None for kind in data.node_types},
        num_classes=graph.num_outputs,
        metric_name=graph.metric_name,
        metric=graph.metric,
        loader=loader,
        steps=lambda size: -(-len(split["train"]) // size) if config.sampling == "neighbor" else 1,
        loss=task_loss,
        graph=data,
        split=split,
        target=target,
    )


def _sampled(
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


def conv_class(kind: str) -> type[MessagePassing]:
    """The class of a conv by its name.

    Raises:
        ValueError: an unknown one.
    """
    made: Any = factory_of(kind)
    while isinstance(made, partial):  # of GIN and others, what the factory is given
        made = made.args[0] if made.args else made.func
    found: type[MessagePassing] = made
    return found


def _seen(graph: GraphData, data: Data, config: GraphConfig) -> Data:
    """The graph with what the models are to see, and nothing else."""
    seen = Data(x=data.x, edge_index=data.edge_index, y=data.y)
    if data.edge_weight is not None:
        if any(weighs_edges(config)):
            seen.edge_weight = data.edge_weight
        else:
            warnings.warn(f"edge_weight: {graph.name} has some, but {', '.join(config.conv)} takes none", stacklevel=3)
    return seen
