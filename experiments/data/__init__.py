"""The data sets by name. Each is imported when it is asked for, with the packages that it alone needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch_geometric.data import Data, HeteroData
from torch_geometric.transforms import ToUndirected

from experiments.config import GraphConfig, HeteroConfig, ImageConfig, ImageSetConfig, RunConfig, load_object
from experiments.data.graph_data import GraphData, Split
from experiments.data.graph_task import graph_task
from experiments.data.task import Batch, Task

__all__ = ["Batch", "Split", "Task", "load_tasks", "own_data"]


def load_tasks(config: RunConfig) -> Callable[[int], Task]:
    """Load the data set of a run; the result gives the task of a seed, whose split it chooses where there are several.

    Raises:
        ValueError: an unknown name, a broken file, or something else than data from ``--data``.
        FileNotFoundError: files are missing and cannot be fetched.
    """
    found = _load(config) if config.data is None else own_data(load_object("data", config.data)(), config)
    if isinstance(found, Task):
        task = found
        return lambda _: task
    assert isinstance(config, GraphConfig | HeteroConfig)
    return partial(graph_task, directed(found, config), config)


def directed(graph: GraphData, config: GraphConfig | HeteroConfig) -> GraphData:
    """The graph, in both directions if the run asks for it; an edge there twice gets the mean of its weights."""
    return replace(graph, data=ToUndirected(reduce="mean")(graph.data)) if config.undirected else graph


def own_data(found: Any, config: RunConfig) -> GraphData | Task:
    """What the function of ``--data`` returns, as a graph data set, or as a task of images.

    See :func:`experiments.data.own_graph.graph_of` for graph and hetero, :func:`experiments.data.images.own_images`.
    """
    name = config.data or config.dataset
    if isinstance(config, ImageSetConfig):
        from experiments.data.images import own_images

        return own_images(found, name, config)
    expected = None if isinstance(config, ImageConfig) else HeteroData if isinstance(config, HeteroConfig) else Data
    if expected is None or not isinstance(found, expected):
        raise ValueError(
            f"data: got a {type(found).__name__} for {config.dataset}, expected a Data for the preset graph, a "
            "HeteroData for hetero, or pairs of images and labels for images"
        )
    from experiments.data.own_graph import graph_of

    return graph_of(found.cpu(), name, name, getattr(config, "metric", None))


LOADERS = {
    "digits": "digits:digits",
    "digits-graph": "digits:digits_graph",
    "mosaic": "mosaic:mosaic",
    "graph": "own_graph:configured",
    "hetero": "own_graph:configured",
    "ogbn-papers100M": "stored:stored_task",
    **dict.fromkeys(("cifar10", "cifar100", "imagenette", "images"), "images:image_set"),
}
"""Modules and functions of the data sets that are not in :mod:`experiments.data.named`."""


def _load(config: RunConfig) -> GraphData | Task:
    place = LOADERS.get(config.dataset, "named:configured")
    if config.dataset == "graph" and (config.data_root / "graph.json").is_file():  # of experiments.convert
        place = LOADERS["ogbn-papers100M"]
    found: GraphData | Task = load_object("dataset", f"experiments.data.{place}")(config)
    return found
