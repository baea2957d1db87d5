"""The data sets by name. Each is imported when it is asked for, with the packages that it alone needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch_geometric.data import Data, HeteroData

from experiments.config import PAPERS, GraphConfig, HeteroConfig, ImageConfig, ImageSetConfig, RunConfig, load_object
from experiments.data.graph_data import GraphData, Split
from experiments.data.graph_task import graph_task, hetero_task, transformed
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
        return lambda _: found
    assert isinstance(config, GraphConfig | HeteroConfig)
    data = transformed(found, config)
    if isinstance(config, HeteroConfig):
        return lambda seed: hetero_task(found, data, config, seed)
    return lambda seed: graph_task(found, data, config, seed)


def own_data(found: Any, config: RunConfig) -> GraphData | Task:
    """What the function of ``--data`` returns, as a graph data set, or as a task of images.

    Args:
        found: for ``graph`` a PyG ``Data`` with x, edge_index and y, for ``hetero`` a ``HeteroData`` of which one node
            type has y, each with train_mask, val_mask and test_mask (of that type), or none of them; for ``images``
            see :func:`experiments.data.own_images.own_images`.
        config: of the run, whose kind says which.

    Raises:
        ValueError: something else, or something that cannot be what it should.
    """
    name = config.data or config.dataset
    if isinstance(config, ImageSetConfig):
        from experiments.data.own_images import own_images

        return own_images(found, name, config)
    if isinstance(config, ImageConfig):
        raise ValueError(f"data: got {name} for {config.dataset}, expected none; the preset images takes your own")
    from experiments.data.user_graph import graph_of

    expected = HeteroData if isinstance(config, HeteroConfig) else Data
    if not isinstance(found, expected):
        raise ValueError(
            f"data: got a {type(found).__name__} for {config.dataset}, expected a PyG {expected.__name__} "
            "(the preset graph takes a Data, hetero a HeteroData, images pairs of images and labels)"
        )
    return graph_of(found.cpu(), name, getattr(config, "metric", None), where=name)


def _load(config: RunConfig) -> GraphData | Task:
    if isinstance(config, ImageConfig):
        return _images(config)
    assert isinstance(config, GraphConfig | HeteroConfig)
    if config.dataset == "digits-graph":
        from experiments.data.digits import digits_graph

        return digits_graph()
    if config.dataset == "mosaic":
        from experiments.data.mosaic import mosaic

        return mosaic()
    if isinstance(config, GraphConfig) and _is_stored(config):
        from experiments.data.stored import stored_task

        return stored_task(config)
    if isinstance(config, GraphConfig) and config.dataset == "graph":
        from experiments.data.user_graph import user_graph

        return user_graph(config.data_root, config.metric)
    if config.dataset == "hetero":
        raise ValueError("data: got None for hetero, expected package.module:function that returns a PyG HeteroData")
    from experiments.data.registry import load_graph

    return load_graph(
        config.dataset, config.data_root, offline=config.offline, allow_large_downloads=config.allow_large_downloads
    )


def _is_stored(config: GraphConfig) -> bool:
    """Whether the graph stays on disk: ogbn-papers100M, or a converted folder of the user's own."""
    return config.dataset == PAPERS or (config.dataset == "graph" and (config.data_root / "graph.json").is_file())


def _images(config: ImageConfig) -> Task:
    if isinstance(config, ImageSetConfig):
        from experiments.data.images import images

        return images(config)
    from experiments.data.digits import digits

    return digits(config.label_smoothing)
