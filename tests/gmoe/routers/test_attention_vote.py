"""Attention vote, beyond ``test_base.py``: blocks, memory, edges.

Shapes: T tokens, D width, E experts.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gmoe import AttentionVote, LinearExperts, MoE
from gmoe.routers import attention_vote
from tests.helpers.reference import CASES, DTYPE, Case, assert_same_as_naive

VOTES = [case for case in CASES if case.router is AttentionVote]
RAGGED = torch.tensor([5, 0, 5, 9, 0, 0, 5, 9, 9, 9, 2])


def layer(case: Case) -> MoE:
    torch.manual_seed(0)
    return MoE(case.build(5, 3, 2), LinearExperts(5, 4, num_experts=3)).to(DTYPE)


@pytest.mark.parametrize("voters", [1, 4])
@pytest.mark.parametrize("batch", [None, RAGGED], ids=["full", "masked"])
@pytest.mark.parametrize("case", VOTES[:2], ids=lambda case: case.name)
def test_blocks_of_voters_equal_naive(
    case: Case, batch: Tensor | None, voters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many voters at a time, computed again in the backward pass."""
    monkeypatch.setattr(attention_vote, "KEPT_PER_WIDTH", 0)
    monkeypatch.setattr(attention_vote, "BLOCK_ELEMENTS", voters * 3 * 11)
    assert_same_as_naive(layer(case), torch.randn(11, 5, dtype=DTYPE), batch)


def test_the_weight_is_capped_at_ten() -> None:
    """All 20 tokens vote for the first, by nearly all of their votes.

    It has 20 times the mean, which is cut to 10, and has no gradient above.
    """
    router = AttentionVote(2, num_experts=1, head_dim=1)
    with torch.no_grad():
        router.query.weight.copy_(torch.tensor([[1.0, 0.0]]))
        router.key.weight.copy_(torch.tensor([[0.0, 1.0]]))
    x = torch.tensor([[1.0, 10.0]] + [[1.0, 0.0]] * 19, requires_grad=True)
    weight = router(x).weight
    assert weight[0].item() == 10.0
    assert weight[1].item() == pytest.approx(20 / (math.exp(10) + 19), rel=1e-5)
    weight[0].backward()
    assert x.grad is not None
    assert not x.grad.any()


class Largest(TorchDispatchMode):
    """The largest number of elements that an operation returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                held = leaf._nnz() if leaf.layout == torch.sparse_csr else leaf.numel()
                self.numel = max(self.numel, held)
        return result


@pytest.mark.parametrize("scope", ["group", "neighbors"])
def test_nothing_of_all_pairs_is_held(scope: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward hold no tensor that grows as T * T."""
    monkeypatch.setattr(attention_vote, "BLOCK_ELEMENTS", 2**13)
    router, x = AttentionVote(8, num_experts=4, scope=scope, head_dim=8), torch.randn(600, 8)
    with Largest() as largest:
        router(x, edge_index=torch.randint(600, (2, 1200))).weight.square().sum().backward()
    # of each token and expert: the key, the key times a number, and that number
    assert 0 < largest.numel <= 600 * 4 * (2 * 8 + 1)


PEAK = """
import resource, torch
from gmoe import AttentionVote

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

torch.manual_seed(0)
torch.set_num_threads(1)
router = AttentionVote(64, num_experts=4)
router(torch.randn(300, 64)).weight.sum().backward()
before = peak()
router(torch.randn(4_000, 64)).weight.sum().backward()
print(peak() - before)
"""


def test_memory_is_that_of_a_block_with_the_default_allocator() -> None:
    """All scores of 4,000 tokens at once would take 730 MB, where 200 do."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")
    }
    run = subprocess.run(
        [sys.executable, "-c", PEAK], env=environment, capture_output=True, text=True, check=True
    )
    assert float(run.stdout) < 350  # MB


def test_autocast_leaves_votes_alone_and_no_warning_reaches_the_user() -> None:
    router, x, edges = (
        AttentionVote(5, num_experts=3, scope="neighbors"),
        torch.randn(6, 5),
        torch.randint(6, (2, 20)),
    )
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("error")
        found = router(x, edge_index=edges).scores
        found.square().sum().backward()
    torch.testing.assert_close(found, router(x, edge_index=edges).scores, rtol=0, atol=0)
    torch.testing.assert_close(found.mean(0), torch.ones(3))


def test_experts_per_token_are_at_most_all_experts() -> None:
    found = [
        AttentionVote(5, num_experts=4, k=2, capacity_factor=factor).experts_per_token
        for factor in (0.5, 1.5, 3.0)
    ]
    assert found == [1.0, 3.0, 4.0]


@pytest.mark.parametrize("is_masked", [False, True])
def test_votes_by_blocks_have_the_second_gradients_of_all_votes(
    is_masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_vote, "KEPT_PER_WIDTH", 0)
    monkeypatch.setattr(attention_vote, "BLOCK_ELEMENTS", 2 * 3 * 2 * 5)
    q = torch.randn(3, 2, 5, 4, dtype=DTYPE, requires_grad=True)
    k = torch.randn(3, 2, 5, 4, dtype=DTYPE, requires_grad=True)
    mask = torch.arange(5) < torch.tensor([[5], [3], [1]]) if is_masked else None

    def run(q: Tensor, k: Tensor) -> Any:
        return attention_vote.group_votes(q.sin(), k.sin(), mask).square()

    assert torch.autograd.gradgradcheck(run, (q, k), fast_mode=True)
