"""A CUDA graph can take a compiled training step that does not wait for values.

Each node of the traced forward and backward is asked what inductor asks before it records.
"""

from __future__ import annotations

import pytest

from tests.helpers.captured import on_cuda_branches
from tests.helpers.steps import STEPS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def refused() -> dict[str, list[str]]:
    """What a CUDA graph refuses of each step, traced in a process of its own: two minutes."""
    return on_cuda_branches()


@pytest.mark.parametrize("name", STEPS)
def test_a_cuda_graph_takes_a_step_that_waits_for_nothing(
    name: str, refused: dict[str, list[str]]
) -> None:
    assert bool(refused[name]) == bool(STEPS[name].waits), refused[name]
