"""A small directed graph, tasks on it, and the logits of a model.

The model follows from the configuration alone.
"""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch_geometric.data import Data

from experiments.train.build import build_model
from experiments.train.config import GraphConfig, TypedConfig
from experiments.train.data.graphs import directed, graph_task
from experiments.train.data.task import GraphData, Split, Splits, Task

NODES, CLASSES = 60, 3
PARTS: tuple[Split, ...] = get_args(Split)


def make_split() -> Splits:
    order = torch.randperm(NODES, generator=torch.Generator().manual_seed(5))
    return {"train": order[:25], "val": order[25:38], "test": order[38:50]}


def make_graph(weights: bool = False, binary: bool = False, simple: bool = False) -> GraphData:
    """A directed graph whose first feature is the number of the node; ten nodes have no label. It
    has self-loops and parallel edges where it is not ``simple``."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(NODES, 4, generator=generator)
    x[:, 0] = torch.arange(NODES)
    edge_index = torch.randint(NODES - 5, (2, 150), generator=generator)  # five nodes have none
    if simple:
        edge_index = edge_index[:, edge_index[0] != edge_index[1]].unique(dim=1)
    split = make_split()
    y = torch.randint(CLASSES, (NODES,), generator=generator)
    if binary:
        y = (torch.rand(NODES, CLASSES, generator=generator) < 0.5).float()
    else:
        y[~torch.isin(torch.arange(NODES), torch.cat(list(split.values())))] = -1
    data = Data(x=x, edge_index=edge_index, y=y)
    if weights:  # of both ends, so that an edge and its weight can be told apart
        data.edge_weight = 1 + edge_index.sum(dim=0) / NODES
    return GraphData(name="made", data=data, splits=lambda _: split, num_outputs=CLASSES)


def make_config(**changes: Any) -> GraphConfig:
    defaults: dict[str, Any] = {
        "dataset": "made",
        "conv": ("sage",),
        "hidden": 6,
        "experts": 2,
        "batch_size": 7,
        "undirected": False,
    }
    if changes.get("sampling") == "neighbor":
        defaults["fanout"] = (3, 3)
    return GraphConfig(**(defaults | changes))


def make_task(config: GraphConfig | TypedConfig, graph: GraphData | None = None) -> Task:
    return graph_task(directed(graph or make_graph(), config.undirected), config, 0)


def model_of(config: GraphConfig, task: Task) -> nn.Module:
    torch.manual_seed(0)
    return build_model(config, task).double().eval()


def double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


@torch.no_grad()
def logits_of(config: GraphConfig, task: Task) -> Tensor:
    """(N, classes) of the whole graph; the model follows from the configuration alone."""
    (batch,) = task.loader("val", config.batch_size, None)
    logits: Tensor = model_of(config, task)(*map(double, batch.inputs))
    return logits
