"""How often a training step on a GPU waits for it, as counted on a CPU; see :mod:`tests.waits`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.waits import (
    BRANCHES,
    Found,
    Results,
    copy_with_cuda_branches,
    on_cuda_branches,
    results,
    step_waits,
)

COUNTS = {
    "gcn": 0,
    "sage": 0,
    "graph": 0,
    "gin": 0,
    "gat": 0,
    "gatv2": 0,
    "transformer": 0,
    "gcn on a Graph": 0,
    "gat on a Graph": 0,
    "gcn, weighted edges": 0,
    "GNNMoE": 0,
    "gcn, copies": 0,
    "sage, copies": 0,
    "graph, copies": 0,
    "gin, copies": 0,
    "gat, copies": 0,
    "gatv2, copies": 0,
    "transformer, copies": 0,
    "gcn on a Graph, copies": 0,
    "gat on a Graph, copies": 0,
    "gcn, weighted edges, copies": 0,
    "GNNMoE, copies": 0,
    "gat, expert_choice": 1,
    "gatv2, expert_choice": 1,
    "GNNMoE of gat": 0,
    "filters": 0,
    "mixed kinds": 1,
    "MoE, token_choice": 0,
    "MoE, expert_choice": 0,
    "MoE, attention_vote": 0,
    "MoE, multi_centroid": 0,
    "MoE, random": 0,
    "MoE, uniform": 0,
    "MoE, importance and load": 0,
    "MoE, switch and z": 0,
    "MoE, capacity": 1,
    "MoE, top_p": 1,
    "MoE, threshold": 0,
    "MoE, token_choice on a batch": 0,
    "SoftMoE": 0,
}
"""Waits of a training step, forward and backward, in float32 on a GPU of capability 8.0."""


@pytest.fixture(scope="module")
def found() -> Found:
    return on_cuda_branches()


@pytest.fixture(scope="module")
def expected() -> Results:
    return results()


def test_the_table_has_every_layer(found: Found) -> None:
    assert [*found.waits] == [*found.results] == [*COUNTS]


@pytest.mark.parametrize("layer", COUNTS)
def test_a_training_step_waits_as_often_as_the_table_says(layer: str, found: Found) -> None:
    places = found.waits[layer]
    assert sum(places.values()) == COUNTS[layer], places


@pytest.mark.parametrize("layer", COUNTS)
def test_the_branches_of_cuda_compute_what_those_of_the_cpu_do(
    layer: str, found: Found, expected: Results
) -> None:
    """Outputs and gradients of a training step, in float64."""
    assert len(found.results[layer]) > 2
    torch.testing.assert_close(found.results[layer], expected[layer], atol=1e-10, rtol=1e-10)


class Waiting(nn.Module):
    """A layer that waits in each way that is looked for, once or as often as said."""

    def forward(self, x: Tensor) -> Tensor:
        some = x > 0
        x[some].sum().item()  # a mask, and a number
        x.nonzero()
        x.detach().cpu()
        x.detach().to("cpu")
        x.new_tensor([1.0])
        x.tolist()
        x.repeat_interleave(some.long(), output_size=None)
        return x * 2


def test_each_way_to_wait_is_seen() -> None:
    seen = [
        place.partition(" ")[0]
        for place in step_waits(Waiting(), torch.randn(4, requires_grad=True))
    ]
    ways = [
        "index",
        "_local_scalar_dense",
        "nonzero",
        "cpu",
        "to",
        "new_tensor",
        "tolist",
        "repeat_interleave",
    ]
    assert seen == ways


class Patient(nn.Module):
    """What looks like it, and waits for nothing."""

    def forward(self, x: Tensor) -> Tensor:
        x.repeat_interleave(torch.tensor(2).expand(4), output_size=8)
        x.repeat_interleave(2)
        x.to(torch.float64)
        return torch.where(x > 0, x, 0.0)[torch.arange(4)]


def test_what_needs_no_values_is_not_counted() -> None:
    waits = step_waits(Patient(), torch.randn(4, requires_grad=True))
    # The numbers of the test itself
    assert [place.partition(" ")[0] for place in waits] == ["tensor"]


def test_a_question_for_a_device_that_nobody_answers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(BRANCHES, r"\.is_cuda\b")
    with pytest.raises(ValueError, match=r"BRANCHES: got '.is_cuda' in \w+\.py"):
        copy_with_cuda_branches(tmp_path)
