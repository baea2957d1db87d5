"""Votes along edges equal the naive ones. Shapes: T tokens, H heads, d head width."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gmoe.routing.neighbour_votes import neighbour_votes
from tests.gmoe.reference import naive_neighbour_votes

T, H, D = 6, 3, 2
EDGES = [(0, 1), (0, 1), (0, 2), (1, 0), (3, 3), (3, 1), (4, 4), (4, 4)]  # parallels, self-loops; 2 and 5 have none

heads = pytest.mark.parametrize("query_heads", [H, 1], ids=["per_head", "shared"])


def random_tokens(query_heads: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return tuple(torch.randn(T, h, D, dtype=torch.float64, requires_grad=True) for h in (query_heads, H))  # type: ignore[return-value]


@heads
def test_equal_naive(query_heads: int) -> None:
    q, k = random_tokens(query_heads)
    found = neighbour_votes(q, k, torch.tensor(EDGES).T)
    for h in range(H):
        query = list(q[:, h if query_heads > 1 else 0] * math.sqrt(D))  # the reference divides by sqrt(d)
        expected = torch.stack(naive_neighbour_votes(query, list(k[:, h]), EDGES))
        torch.testing.assert_close(found[:, h], expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(found.mean(0), torch.ones(H, dtype=torch.float64))


@heads
def test_gradients_equal_naive(query_heads: int) -> None:
    q, k = random_tokens(query_heads)
    grad = torch.randn(T, H, dtype=torch.float64)
    found = torch.autograd.grad(neighbour_votes(q, k, torch.tensor(EDGES).T), (q, k), grad)
    columns = []
    for h in range(H):
        query = list(q[:, h if query_heads > 1 else 0] * math.sqrt(D))
        columns.append(torch.stack(naive_neighbour_votes(query, list(k[:, h]), EDGES)))
    expected = torch.autograd.grad(torch.stack(columns, dim=1), (q, k), grad)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("copies", [1, 3, 6, 7, 40])
def test_more_edges_than_pairs_of_nodes(copies: int) -> None:
    q, k = random_tokens(H)
    edges = EDGES * copies
    found = neighbour_votes(q, k, torch.tensor(edges).T)
    expected = torch.stack(
        [torch.stack(naive_neighbour_votes(list(q[:, h] * math.sqrt(D)), list(k[:, h]), edges)) for h in range(H)],
        dim=1,
    )
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    grad = torch.randn(T, H, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(found, (q, k), grad), torch.autograd.grad(expected, (q, k), grad), atol=1e-12, rtol=0
    )


@heads
def test_gradcheck(query_heads: int) -> None:
    assert torch.autograd.gradcheck(
        lambda q, k: neighbour_votes(q, k, torch.tensor(EDGES).T), random_tokens(query_heads)
    )


def test_without_edges_each_node_keeps_its_vote() -> None:
    found = neighbour_votes(*random_tokens(H), torch.zeros(2, 0, dtype=torch.long))
    torch.testing.assert_close(found, torch.ones(T, H, dtype=torch.float64))


def test_no_nodes() -> None:
    q = torch.randn(0, H, D, requires_grad=True)
    votes = neighbour_votes(q, torch.randn(0, H, D), torch.zeros(2, 0, dtype=torch.long))
    votes.sum().backward()
    assert votes.shape == (0, H)
    assert q.grad is not None


def test_large_scores_do_not_overflow() -> None:
    q, k = (300 * value.detach() for value in random_tokens(H))
    found = neighbour_votes(q, k, torch.tensor(EDGES).T)
    assert found.isfinite().all()
    torch.testing.assert_close(found.mean(0), torch.ones(H, dtype=torch.float64))


def test_autocast_leaves_votes_alone() -> None:
    q, k = (value.detach().float() for value in random_tokens(H))
    expected = neighbour_votes(q, k, torch.tensor(EDGES).T)
    with torch.autocast("cpu", torch.bfloat16):
        found = neighbour_votes(q, k, torch.tensor(EDGES).T)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_no_warning_reaches_the_user() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        q, k = random_tokens(H)
        neighbour_votes(q, k, torch.tensor(EDGES).T).sum().backward()


class Largest(TorchDispatchMode):
    """The largest number of elements that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                held = leaf._nnz() if leaf.layout == torch.sparse_csr else leaf.numel()
                self.numel = max(self.numel, held)
        return result


def test_nothing_of_all_pairs_is_held() -> None:
    q, k = (torch.randn(600, 4, 8, requires_grad=True) for _ in range(2))
    with Largest() as largest:
        neighbour_votes(q, k, torch.randint(600, (2, 1200))).square().sum().backward()
    assert largest.numel <= 4 * 600 * 8
