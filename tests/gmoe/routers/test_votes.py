"""Votes between tokens. Shapes: B groups, H heads, S tokens a pool, d head width, T tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gmoe.routing import votes
from gmoe.routing.votes import group_votes
from tests.gmoe.reference import naive_group_votes

B, H, S, D = 2, 3, 6, 2
MASK = torch.tensor([[True, True, False, True, True, False], [True, False, False, False, False, False]])

blocks = pytest.mark.parametrize("block", [1, 2, 4, 6, 100, None])
heads = pytest.mark.parametrize("query_heads", [H, 1], ids=["per_head", "shared"])
masks = pytest.mark.parametrize("mask", [None, MASK], ids=["full", "masked"])


def random_qk(query_heads: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return tuple(torch.randn(B, h, S, D, dtype=torch.float64, requires_grad=True) for h in (query_heads, H))  # type: ignore[return-value]


def test_by_hand() -> None:
    # q = 1 and log 3, keys 1 and 0: token 0 spreads e : 1, token 1 spreads 3 : 1
    q, k = torch.tensor([[1.0], [math.log(3)]]), torch.tensor([[1.0], [0.0]])
    found = group_votes(q[None, None], k[None, None])[0, 0]
    e = math.e
    torch.testing.assert_close(found, torch.tensor([e / (e + 1) + 0.75, 1 / (e + 1) + 0.25]))


@blocks
@masks
@heads
def test_group_votes_equal_naive(query_heads: int, mask: Tensor | None, block: int | None) -> None:
    q, k = random_qk(query_heads)
    found = group_votes(q, k, mask, block)
    for b in range(B):
        tokens = [s for s in range(S) if mask is None or mask[b, s]]
        for h in range(H):
            query = list(q[b, h if query_heads > 1 else 0] * math.sqrt(D))  # the reference divides by sqrt(d)
            expected = torch.stack(naive_group_votes(query, list(k[b, h]), [tokens]))
            torch.testing.assert_close(found[b, h], expected, atol=1e-12, rtol=0)


@blocks
@masks
@heads
def test_group_votes_gradcheck(query_heads: int, mask: Tensor | None, block: int | None) -> None:
    assert torch.autograd.gradcheck(lambda q, k: group_votes(q, k, mask, block), random_qk(query_heads))


def test_one_side_may_be_frozen() -> None:
    q, k = random_qk(H)
    (grad_q, grad_k) = torch.autograd.grad(group_votes(q, k).square().sum(), [q, k])
    torch.testing.assert_close(torch.autograd.grad(group_votes(q, k.detach()).square().sum(), q)[0], grad_q)
    torch.testing.assert_close(torch.autograd.grad(group_votes(q.detach(), k).square().sum(), k)[0], grad_k)


@masks
def test_votes_average_one_over_the_tokens(mask: Tensor | None) -> None:
    q, k = random_qk(H)
    size = torch.full((B, 1), float(S)) if mask is None else mask.sum(1, keepdim=True)
    found = group_votes(q, k, mask)
    torch.testing.assert_close(found.sum(-1), size.expand(B, H).double())
    if mask is not None:
        assert not found[~mask[:, None].expand_as(found)].any()


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
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))])
        return result


def test_nothing_of_all_pairs_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward hold no tensor that grows as S * S."""
    monkeypatch.setattr(votes, "BLOCK_ELEMENTS", 2**13)
    size = 600
    q, k = (torch.randn(1, 4, size, 8, requires_grad=True) for _ in range(2))
    with Largest() as largest:
        group_votes(q, k).square().sum().backward()
    assert largest.matmuls > 100  # blocks were seen in forward and backward
    assert largest.numel <= 4 * size * 8  # the queries themselves
    assert largest.numel < size * size / 10
