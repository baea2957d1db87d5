"""The data sets by name."""

from __future__ import annotations

from collections.abc import Callable

from experiments.config import GRAPHS_ONLY, IMAGES_ONLY, TrainConfig
from experiments.data.digits import digits, digits_graph
from experiments.data.graph_data import GraphData, Split
from experiments.data.graph_task import graph_task, transformed
from experiments.data.hetero_task import hetero_task
from experiments.data.images import images
from experiments.data.mosaic import mosaic
from experiments.data.registry import load_graph
from experiments.data.task import Batch, Task
from experiments.data.user_graph import user_graph
from vision.images import NAMES as IMAGE_SETS

__all__ = ["Batch", "Split", "Task", "load_tasks"]

MODEL_OF_IMAGES = ("mlp_scale", "moe_blocks", "patch", "dim", "vit_heads", "label_smoothing")
"""Options of images that are not about where they come from."""


def load_tasks(config: TrainConfig) -> Callable[[int], Task]:
    """Load the data set of a run; the result gives the task of a seed, whose split it chooses where there are several.

    Raises:
        ValueError: an unknown name, or a broken file.
        FileNotFoundError: files are missing and cannot be fetched.
    """
    if config.dataset == "digits":
        config.refuse(GRAPHS_ONLY, "graphs")
        config.refuse(tuple(name for name in IMAGES_ONLY if name not in MODEL_OF_IMAGES), "image folders")
        small = digits(config.label_smoothing)
        return lambda _: small
    if config.dataset in IMAGE_SETS:
        config.refuse(GRAPHS_ONLY, "graphs")
        pictures = images(config)
        return lambda _: pictures
    config.refuse(IMAGES_ONLY, "images")
    graph = _load_graph(config)
    data = transformed(graph, config)
    make = graph_task if graph.target is None else hetero_task
    return lambda seed: make(graph, data, config, seed)


def _load_graph(config: TrainConfig) -> GraphData:
    if config.dataset == "digits-graph":
        return digits_graph()
    if config.dataset == "mosaic":
        return mosaic()
    if config.dataset == "graph":
        return user_graph(config.data_root, config.metric)
    return load_graph(
        config.dataset, config.data_root, offline=config.offline, allow_large_downloads=config.allow_large_downloads
    )
