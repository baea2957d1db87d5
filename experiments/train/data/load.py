"""The data sets by name, each imported when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from experiments.train.config import PAPERS, ImageConfig, RunConfig
from experiments.train.data.graphs import directed, graph_task
from experiments.train.data.on_disk import stored_folder
from experiments.train.data.task import Task
from experiments.train.user_code import load_object

LOADERS = {
    "digits": "images:digits",
    "digits-graph": "made:digits_graph",
    "mosaic": "made:mosaic",
    "graph": "own_graph:configured",
    "hetero": "own_graph:configured",
    PAPERS: "stored:stored_task",
    **dict.fromkeys(("cifar10", "cifar100", "imagenette", "pacs", "images"), "images:image_set"),
}
"""Modules and functions of the data sets that are not in :mod:`experiments.train.data.named`."""


def load_tasks(config: RunConfig) -> Callable[[int], Task]:
    """Load the data set of a run; the result gives the task of a seed, whose split it chooses
    where there are several.

    Raises:
        ValueError: an unknown name, a broken file, or something else than data from ``--data``.
        FileNotFoundError: files are missing and cannot be fetched.
    """
    place, given = LOADERS.get(config.dataset, "named:load_graph"), [config]
    for family in ("regimes", "concept"):
        if config.dataset.startswith(f"{family}-"):
            place = f"made:{family}"
    if config.dataset.startswith("ogbg-"):
        place = "molecules:molecule_task"
    if config.data is not None:
        place = "images:own_images" if isinstance(config, ImageConfig) else "own_graph:own_object"
        given = [load_object("data", config.data)(), config]
    elif stored_folder(config) is not None:
        place = LOADERS[PAPERS]
    found = load_object("dataset", f"experiments.train.data.{place}")(*given)
    if isinstance(found, Task):
        return lambda _: found
    return partial(graph_task, directed(found, config), config)
