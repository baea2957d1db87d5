"""The data sets by name."""

from __future__ import annotations

from collections.abc import Callable

from experiments.config import GraphConfig, HeteroConfig, ImageConfig, RunConfig
from experiments.data.digits import digits, digits_graph
from experiments.data.graph_data import GraphData, Split
from experiments.data.graph_task import graph_task, transformed
from experiments.data.hetero_task import hetero_task
from experiments.data.mosaic import mosaic
from experiments.data.registry import load_graph
from experiments.data.task import Batch, Task
from experiments.data.user_graph import user_graph

__all__ = ["Batch", "Split", "Task", "load_tasks"]

FOLDERS_ONLY = ("image_size", "augment", "mixup", "cutmix", "val_share", "split_seed", "skip_broken")
"""Options of images that `digits`, which has its own split and size, does not take."""


def load_tasks(config: RunConfig) -> Callable[[int], Task]:
    """Load the data set of a run; the result gives the task of a seed, whose split it chooses where there are several.

    Raises:
        ValueError: an unknown name, or a broken file.
        FileNotFoundError: files are missing and cannot be fetched.
    """
    if isinstance(config, ImageConfig):
        pictures = _images(config)
        return lambda _: pictures
    assert isinstance(config, GraphConfig | HeteroConfig)
    graph = _load_graph(config)
    data = transformed(graph, config)
    if isinstance(config, HeteroConfig):
        return lambda seed: hetero_task(graph, data, config, seed)
    return lambda seed: graph_task(graph, data, config, seed)


def _images(config: ImageConfig) -> Task:
    if config.dataset == "digits":
        for name in FOLDERS_ONLY:
            value, default = getattr(config, name), getattr(ImageConfig, name)
            if value != default:
                raise ValueError(f"{name}: got {value!r} for digits, expected {default!r}; only image folders take it")
        return digits(config.label_smoothing)
    from experiments.data.images import images  # torchvision, which graphs do without

    return images(config)


def _load_graph(config: GraphConfig | HeteroConfig) -> GraphData:
    if config.dataset == "digits-graph":
        return digits_graph()
    if config.dataset == "mosaic":
        return mosaic()
    if isinstance(config, GraphConfig) and config.dataset == "graph":
        return user_graph(config.data_root, config.metric)
    return load_graph(
        config.dataset, config.data_root, offline=config.offline, allow_large_downloads=config.allow_large_downloads
    )
