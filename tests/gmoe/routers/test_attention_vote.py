"""Attention vote. Shapes: T tokens, D width, E experts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gmoe import AttentionVote

D, E = 6, 4
OPTIONS: list[dict[str, Any]] = [
    {"shared_queries": shared, "scope": scope} for shared in (False, True) for scope in ("group", "neighbors")
]
each = pytest.mark.parametrize("options", OPTIONS, ids=str)


@each
@pytest.mark.parametrize(
    "batch",
    [[0] * 12, [0] * 6 + [1] * 6, [0, 3] * 6, [5, 0, 0, 1, 5, 5, 5, 5, 5, 5, 0, 5]],
    ids=["one", "equal", "equal_unsorted", "ragged"],
)
def test_votes_and_selected_weights_average_one_in_each_group(options: dict[str, Any], batch: list[int]) -> None:
    group, edge_index = torch.tensor(batch), torch.randint(12, (2, 60))
    edge_index = edge_index[:, group[edge_index[0]] == group[edge_index[1]]]
    routing = AttentionVote(D, E, k=2, **options)(2 * torch.randn(12, D), group, edge_index)
    assert routing.weight.max() < 10
    for ids in group.unique():
        torch.testing.assert_close(routing.scores[group == ids].mean(0), torch.ones(E))
        assert routing.weight[group[routing.token] == ids].mean().item() == pytest.approx(1.0, abs=1e-5)


def test_the_weight_is_capped_at_ten() -> None:
    """All vote for one token of 40: it alone is selected with a vote, 20 times the mean of 20."""
    router = AttentionVote(1, 1, capacity_factor=0.5, head_dim=1)
    with torch.no_grad():
        router.query.weight.fill_(30.0)
        router.key.weight.fill_(30.0)
    weight = router(torch.tensor([[1.0]] * 39 + [[2.0]])).weight
    assert weight.max() == 10
    assert weight.isfinite().all()


@pytest.mark.parametrize(("shared", "projections"), [(False, 2 * E), (True, E + 1)])
def test_number_of_projections(shared: bool, projections: int) -> None:
    router = AttentionVote(D, E, shared_queries=shared, head_dim=5)
    assert sum(parameter.numel() for parameter in router.parameters()) == projections * 5 * D


def test_popular_token_is_taken() -> None:
    router = AttentionVote(2, 1, capacity_factor=0.25, head_dim=2)
    with torch.no_grad():
        router.query.weight.copy_(torch.eye(2))
        router.key.weight.copy_(torch.eye(2))
    x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [5.0, 0.0], [0.0, 1.0]])
    assert router(x).token.tolist() == [2]


def test_neighbors_need_edges() -> None:
    with pytest.raises(ValueError, match=r"edge_index: got None with scope='neighbors', expected the \(2, num_edges\)"):
        AttentionVote(D, E, scope="neighbors")(torch.randn(3, D))


MEASURE = """
import resource, sys, time, torch
from gmoe import AttentionVote, LinearExperts, MoE
layer = MoE(AttentionVote(64, 4), LinearExperts(64, 64, 4))
def run(num_tokens):
    layer(torch.randn(num_tokens, 64)).square().sum().backward()
run(4000)  # the block of votes and torch's own buffers
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
run(int(sys.argv[1]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, time.perf_counter() - start)
"""


def measure(num_tokens: int) -> tuple[float, float]:
    """Peak memory in KiB above that of a small call, and seconds."""
    root = Path(__file__).parents[3]
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(num_tokens)],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    memory, seconds = map(float, result.stdout.split())
    return memory, seconds


@pytest.mark.slow
def test_memory_grows_linearly() -> None:
    """T = 20,000 and E = 4, forward and backward: one (T, T) float matrix would be 1.6 GB."""
    half, _ = measure(10_000)
    full, seconds = measure(20_000)
    assert seconds < 60
    assert full < 300 * 1024
    assert full <= 2.3 * max(half, 16 * 1024)  # below 16 MiB the difference is the allocator's


def test_dense_votes_are_ranked_not_tied() -> None:
    """At T = 3,000 in float32 neighboring votes are a few ulp apart; the experts take the best all the same."""
    torch.manual_seed(0)
    router = AttentionVote(16, 2, head_dim=8)
    routing = router(torch.randn(3000, 16))
    scores = routing.scores.detach()
    for expert, chosen in enumerate(routing.token.split(routing.load.tolist())):
        assert float(scores[chosen, expert].min()) >= float(scores[:, expert].topk(len(chosen)).values.min()) * (
            1 - 1e-6
        )
