"""The data set of a run."""

from __future__ import annotations

from collections.abc import Callable

from experiments.train.config import RunConfig
from experiments.train.data.task import Task
from experiments.train.kinds import kind_of


def load_tasks(config: RunConfig) -> Callable[[int], Task]:
    """Load the data set of a run; see :meth:`experiments.train.kinds.base.Kind.tasks`."""
    return kind_of(config).tasks()
