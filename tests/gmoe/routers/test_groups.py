"""Groups, and from scores to pairs. Shapes: T tokens, E experts, K experts a token, B groups, C capacity, P pairs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gmoe.routers.groups import Groups, drop_over_capacity
from tests.gmoe.reference import Pair, best_first, capacity, drop, group_lists

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)
segments = st.lists(st.sampled_from([0, 2, 3, 9]), min_size=1, max_size=24)


def members(ids: list[int]) -> list[list[int]]:
    """Tokens of each group, groups in ascending order of their ids."""
    return [[t for t, i in enumerate(ids) if i == group] for group in sorted(set(ids))]


def of(ids: list[int]) -> Groups:
    return Groups.of(torch.tensor(ids), len(ids))


@SETTINGS
@given(ids=segments, dtype=st.sampled_from([torch.int64, torch.int32, torch.uint8]))
def test_of(ids: list[int], dtype: torch.dtype) -> None:
    groups = Groups.of(torch.tensor(ids, dtype=dtype), len(ids))
    assert groups.of_tokens(torch.arange(len(ids))).tolist() == [sorted(set(ids)).index(i) for i in ids]
    assert groups.num_groups == len(set(ids))


@SETTINGS
@given(
    ids=segments,
    k=st.integers(1, 4),
    num_experts=st.integers(4, 9),
    factor=st.sampled_from([0.001, 0.1, 0.3, 0.5, 0.7, 1.0, 1.05, 1.1, 1.25, 2.0, 100.0]),
)
def test_capacity(ids: list[int], k: int, num_experts: int, factor: float) -> None:
    found = of(ids).capacity(k, num_experts, factor)
    expected = [capacity(k, len(tokens), num_experts, factor) for tokens in members(ids)]
    if isinstance(found, Tensor):
        assert found.tolist() == expected
    else:
        assert [found] * len(expected) == expected


@SETTINGS
@given(ids=segments, data=st.data())
def test_logsumexp(ids: list[int], data: st.DataObject) -> None:
    logits = torch.randn(
        len(ids), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    )
    logits = 300 * logits.requires_grad_()  # exp would overflow
    expected = torch.empty_like(logits)
    for tokens in members(ids):
        expected[tokens] = logits[tokens].logsumexp(dim=0)
    found = of(ids).logsumexp(logits)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    cotangent = torch.randn(logits.shape, dtype=torch.float64)
    wanted = torch.autograd.grad((expected * cotangent).sum(), logits)
    torch.testing.assert_close(torch.autograd.grad((found * cotangent).sum(), logits), wanted, atol=1e-10, rtol=0)


@SETTINGS
@given(ids=segments, factor=st.sampled_from([0.3, 0.5, 1.0, 2.0]), data=st.data())
def test_top_tokens_with_ties(ids: list[int], factor: float, data: st.DataObject) -> None:
    """Scores from three values: most of them tie, and the lowest token index wins."""
    drawn = data.draw(st.lists(st.sampled_from([-1.0, 0.0, 2.0]), min_size=2 * len(ids), max_size=2 * len(ids)))
    scores = torch.tensor(drawn).view(-1, 2)
    groups = of(ids)
    found = groups.top_tokens(scores, groups.capacity(1, 2, factor))
    for e in range(2):
        expected: list[int] = []
        for tokens in members(ids):
            best = best_first(tokens, lambda t, e=e: scores[t, e].item())  # type: ignore[misc]
            expected += best[: capacity(1, len(tokens), 2, factor)]
        assert found[e].nonzero()[:, 0].tolist() == sorted(expected)


@SETTINGS
@given(ids=segments)
def test_batches_hold_each_token_once_and_give_it_back(ids: list[int]) -> None:
    groups = of(ids)
    rows: list[list[int]] = []
    total = torch.zeros(len(ids), dtype=torch.long)
    for part in groups.batches(total.device):
        token = part.take(torch.arange(len(ids)))
        mask = torch.ones_like(token, dtype=torch.bool) if part.mask is None else part.mask
        assert token.shape == mask.shape == part.shape
        assert bool((mask.sum(1) * 2 >= token.size(1)).all())  # a padded group is at most twice as long
        assert torch.equal(groups.of_tokens(token[:, 0]), part.group)
        rows += [row[keep].tolist() for row, keep in zip(token, mask, strict=True)]
        total = part.add(total, (token + 1) * mask)
    assert sorted(rows) == sorted(members(ids))
    assert total.tolist() == list(range(1, len(ids) + 1))


@pytest.mark.parametrize("capacity", [1, 2, 4])
def test_top_tokens_of_odd_values(capacity: int) -> None:
    """NaN first, then infinity, and every expert gets its number whatever it sees; with and without sorting."""
    nan, inf = torch.nan, torch.inf
    scores = torch.tensor([[0.0, -inf, inf], [nan, -inf, 2.0], [-0.0, -inf, inf], [1.0, -inf, nan]])
    groups = Groups.of(4, 4)
    expected = [[1, 3, 0, 2], [0, 1, 2, 3], [0, 2, 3, 1]]  # NaN and infinity are ties
    found = groups.top_tokens(scores, capacity)
    assert [row.nonzero()[:, 0].tolist() for row in found] == [sorted(row[:capacity]) for row in expected]


# From scores to pairs


def as_pairs(token_P: Tensor, offsets_E: Tensor) -> list[Pair]:
    """Pairs in the order of the routing: by expert, then by token."""
    assert token_P.dtype == torch.int64
    assert offsets_E.dtype == torch.int32
    owner = torch.searchsorted(offsets_E.long(), torch.arange(len(token_P)), right=True)
    return list(zip(token_P.tolist(), owner.tolist(), strict=True))


def by_expert(pairs: list[Pair]) -> list[Pair]:
    return sorted(pairs, key=lambda pair: (pair[1], pair[0]))


def best_experts(probs: Tensor, k: int) -> Tensor:
    return probs.argsort(dim=-1, descending=True, stable=True)[:, :k]


@SETTINGS
@given(
    ids=st.lists(st.sampled_from([0, 1, 5]), min_size=1, max_size=14),
    k=st.integers(1, 3),
    factor=st.sampled_from([0.2, 0.5, 1.0, 1.5]),
    data=st.data(),
)
def test_drop_over_capacity_with_ties(ids: list[int], k: int, factor: float, data: st.DataObject) -> None:
    """Probabilities from few values: equally sure tokens keep their place by index."""
    row = st.permutations([0.1, 0.3, 0.6]) | st.permutations([0.2, 0.3, 0.5]) | st.just([0.4, 0.2, 0.4])
    probs = torch.tensor(data.draw(st.lists(row, min_size=len(ids), max_size=len(ids))), dtype=torch.float64)
    groups = of(ids)
    expert_TK = best_experts(probs, k)
    found = drop_over_capacity(expert_TK, probs, groups, groups.capacity(k, 3, factor))
    expected = drop(expert_TK.tolist(), [list(p) for p in probs], group_lists(probs, torch.tensor(ids)), factor)
    assert as_pairs(*found) == by_expert(expected)
