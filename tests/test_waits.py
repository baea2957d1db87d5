"""A training step on a GPU does not wait for it, and launches no more than it did.

The meta device has no values, so a step that asks for one fails there. What an operator of gmoe
does inside is not run on that device; ``tests.helpers.waits`` counts that, too.
"""

from __future__ import annotations

import pytest
import torch

from tests.helpers.steps import LAUNCHES, STEPS
from tests.helpers.waits import Found, on_cuda_branches

WITHOUT_WAIT = [name for name, step in STEPS.items() if not step.waits and "Graph" not in name]
"""A ``Graph`` is made of values, before the step."""

WITH_WAIT = [name for name, step in STEPS.items() if step.waits]


def run_on_meta(name: str) -> torch.Tensor:
    """The gradient of the features after a training step."""
    step = STEPS[name]
    with torch.device("meta"):
        layer = step.layer().train()
        inputs = step.inputs()
        layer(*inputs).sum().backward()
    gradient: torch.Tensor = inputs[0].grad
    return gradient


@pytest.mark.parametrize("name", WITHOUT_WAIT)
def test_a_training_step_asks_for_no_value(name: str) -> None:
    assert run_on_meta(name).is_meta


@pytest.mark.parametrize("name", WITH_WAIT)
def test_a_step_whose_sizes_follow_from_values_asks_for_one(name: str) -> None:
    """Or the table, and the page of what waits, say too much."""
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        run_on_meta(name)


@pytest.fixture(scope="module")
def found() -> Found:
    """What the branches of CUDA do, counted in a process of its own: ten seconds."""
    return on_cuda_branches()


@pytest.mark.parametrize("name", STEPS)
def test_a_step_launches_no_more_than_it_did(name: str, found: Found) -> None:
    few, many = found.launches[name]
    most_of_few, most_of_many = LAUNCHES[name]
    assert few <= most_of_few
    assert many <= most_of_many


@pytest.mark.parametrize("name", STEPS)
def test_a_step_on_a_gpu_waits_as_often_as_its_table_says(name: str, found: Found) -> None:
    assert sum(found.waits[name].values()) == STEPS[name].waits


def test_torch_has_kernels_for_all_that_is_launched(found: Found) -> None:
    assert not found.without_kernel
