"""From a heterogeneous graph to batches: the whole graph, or sampled neighborhoods."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch_geometric.data import Data, HeteroData

from experiments.config import HeteroConfig
from experiments.data.graph_data import GraphData, Split, task_loss
from experiments.data.task import Batch, Task
from gmoe.data.loader import neighbor_loader


def hetero_task(graph: GraphData, data: Data | HeteroData, config: HeteroConfig, seed: int) -> Task:
    """Classification of the nodes of one type."""
    assert isinstance(data, HeteroData)
    assert graph.target is not None
    target, split = graph.target, graph.splits(seed)
    whole: tuple[Any, ...] = (data.collect("x"), data.edge_index_dict)
    if config.sampling == "neighbor":  # once, not in every epoch
        data = data.sort(sort_by_row=False)

    def full(part: Split, batch_size: int, seed: int | None) -> Iterable[Batch]:
        return [Batch(whole, data[target].y[split[part]], split[part])]

    def neighbors(part: Split, batch_size: int, seed: int | None) -> Iterator[Batch]:
        loader = neighbor_loader(
            data,
            list(config.fanout),
            input_nodes=(target, split[part]),
            batch_size=batch_size,
            shuffle=seed is not None,
            generator=None if seed is None else torch.Generator().manual_seed(seed),
            num_workers=config.workers,
            is_sorted=True,
        )
        for batch in loader:
            ids = {kind: batch[kind].n_id for kind in batch.node_types}
            size = batch[target].batch_size
            inputs = (batch.collect("x"), batch.edge_index_dict, ids)
            yield Batch(inputs, batch[target].y[:size], slice(0, size))

    def loader(part: Split, batch_size: int, seed: int | None) -> Iterable[Batch]:
        whole_graph = config.sampling == "full" or (part != "train" and config.evaluation == "full")
        return (full if whole_graph else neighbors)(part, batch_size, seed)

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
