"""What is timed of a cell is the step that trains it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from experiments.study.measured import step_times
from experiments.train.data.load import load_tasks
from experiments.train.presets import DIGITS_GRAPH
from experiments.train.training import Training


def test_the_timed_step_is_that_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three to warm up and one that is timed, of each arm.

    None adds to what an epoch has summed.
    """
    config, update = replace(DIGITS_GRAPH, hidden=8), Training.update
    arms, sums = Counter[str](), []

    def counted(training: Training, *args: Any) -> Any:
        arms[training.config.router] += 1
        losses = update(training, *args)
        sums.append(training.epoch.batches)
        return losses

    monkeypatch.setattr(Training, "update", counted)
    times = step_times(config, load_tasks(config)(0), repeats=1)
    assert arms == {"dense": 8, "token_choice": 4}  # the dense model on edges and on a matrix
    assert set(times) == {"dense", "dense-csr", "cell"}
    assert set(sums) == {0}
