"""Votes in a group and along edges. Shapes: B groups, H heads, S tokens a group, d head width, T tokens."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gmoe.routers import attention_vote
from gmoe.routers.attention_vote import group_votes, neighbor_votes
from tests.gmoe.reference import naive_group_votes, naive_neighbor_votes

B, H, S, D = 2, 3, 6, 2
MASK = torch.tensor([[True, True, False, True, True, False], [True, False, False, False, False, False]])

blocks = pytest.mark.parametrize("block", [1, 4, None], indirect=True)
heads = pytest.mark.parametrize("query_heads", [H, 1], ids=["per_head", "shared"])
masks = pytest.mark.parametrize("mask", [None, MASK], ids=["full", "masked"])


@pytest.fixture(autouse=True)
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """That many voters at a time, computed again in the backward pass; ``None`` for all, kept."""
    if getattr(request, "param", None) is not None:
        monkeypatch.setattr(attention_vote, "KEPT", 0)
        monkeypatch.setattr(attention_vote, "BLOCK_ELEMENTS", request.param * B * H * S)


def random_qk(query_heads: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return tuple(torch.randn(B, h, S, D, dtype=torch.float64, requires_grad=True) for h in (query_heads, H))  # type: ignore[return-value]


@blocks
@masks
@heads
def test_group_votes_equal_naive(query_heads: int, mask: Tensor | None, block: None) -> None:
    q, k = random_qk(query_heads)
    found = group_votes(q, k, mask)
    for b in range(B):
        tokens = [s for s in range(S) if mask is None or mask[b, s]]
        for h in range(H):
            query = list(q[b, h if query_heads > 1 else 0] * math.sqrt(D))  # the reference divides by sqrt(d)
            expected = torch.stack(naive_group_votes(query, list(k[b, h]), [tokens]))
            torch.testing.assert_close(found[b, h], expected, atol=1e-12, rtol=0)


@blocks
@masks
@heads
def test_group_votes_gradcheck(query_heads: int, mask: Tensor | None, block: None) -> None:
    assert torch.autograd.gradcheck(lambda q, k: group_votes(q, k, mask), random_qk(query_heads))


def test_far_apart_scores_are_finite() -> None:
    q, k = random_qk(1)
    (1e4 * group_votes(1e4 * q, k, MASK)).sum().backward()
    assert k.grad is not None
    assert q.grad is not None
    assert bool(k.grad.isfinite().all() & q.grad.isfinite().all())


class Largest(TorchDispatchMode):
    """The largest number of elements that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.matmuls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.matmuls += func in (torch.ops.aten.bmm.default, torch.ops.aten.mm.default)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                held = leaf._nnz() if leaf.layout == torch.sparse_csr else leaf.numel()
                self.numel = max(self.numel, held)
        return result


def test_nothing_of_all_pairs_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward hold no tensor that grows as S * S."""
    monkeypatch.setattr(attention_vote, "BLOCK_ELEMENTS", 2**13)
    size = 600
    q, k = (torch.randn(1, 4, size, 8, requires_grad=True) for _ in range(2))
    with Largest() as largest:
        group_votes(q, k).square().sum().backward()
    assert largest.matmuls > 100  # blocks were seen in forward and backward
    assert largest.numel <= 4 * size * 8  # the queries themselves
    assert largest.numel < size * size / 10


# Along edges

T = 6
EDGES = [(0, 1), (0, 1), (0, 2), (1, 0), (3, 3), (3, 1), (4, 4), (4, 4)]  # parallels, self-loops; 2 and 5 have none


def random_tokens(query_heads: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return tuple(torch.randn(T, h, D, dtype=torch.float64, requires_grad=True) for h in (query_heads, H))  # type: ignore[return-value]


@pytest.mark.parametrize("copies", [1, 3, 6, 7, 40])  # up to more edges than pairs of nodes
@heads
def test_neighbor_votes_and_gradients_equal_naive(query_heads: int, copies: int) -> None:
    q, k = random_tokens(query_heads)
    edges, grad = EDGES * copies, torch.randn(T, H, dtype=torch.float64)
    found = neighbor_votes(q, k, torch.tensor(edges).T)
    queries = [list(q[:, h if query_heads > 1 else 0] * math.sqrt(D)) for h in range(H)]  # the reference divides
    votes = [torch.stack(naive_neighbor_votes(queries[h], list(k[:, h]), edges)) for h in range(H)]
    expected = torch.stack(votes, dim=1)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(found.mean(0), torch.ones(H, dtype=torch.float64))
    wanted = torch.autograd.grad(expected, (q, k), grad)
    torch.testing.assert_close(torch.autograd.grad(found, (q, k), grad), wanted, atol=1e-12, rtol=0)


def test_large_scores_do_not_overflow() -> None:
    q, k = (300 * value.detach() for value in random_tokens(H))
    torch.testing.assert_close(neighbor_votes(q, k, torch.tensor(EDGES).T).mean(0), torch.ones(H).double())


def test_autocast_leaves_votes_alone_and_no_warning_reaches_the_user() -> None:
    q, k = (value.detach().float().requires_grad_() for value in random_tokens(H))
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("error")
        found = neighbor_votes(q, k, torch.tensor(EDGES).T)
        found.sum().backward()
    torch.testing.assert_close(found, neighbor_votes(q, k, torch.tensor(EDGES).T), rtol=0, atol=0)


def test_neighbor_votes_hold_nothing_of_all_pairs() -> None:
    q, k = (torch.randn(600, 4, 8, requires_grad=True) for _ in range(2))
    with Largest() as largest:
        neighbor_votes(q, k, torch.randint(600, (2, 1200))).square().sum().backward()
    assert largest.numel <= 4 * 600 * 8
