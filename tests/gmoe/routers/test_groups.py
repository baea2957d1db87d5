"""Groups. Shapes: T tokens, E experts, B groups, C capacity, P pairs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gmoe.routing.groups import Groups, segment_logsumexp
from tests.gmoe.reference import best_first, capacity

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)
segments = st.lists(st.sampled_from([0, 2, 3, 9]), min_size=1, max_size=24)


def members(ids: list[int]) -> list[list[int]]:
    """Tokens of each pool, groups in ascending order of their ids."""
    return [[t for t, i in enumerate(ids) if i == pool] for pool in sorted(set(ids))]


def test_equal_groups_are_recognised() -> None:
    assert Groups.from_segments(torch.tensor([4, 4, 7, 7])) == Groups.equal(2, 2)
    unsorted = Groups.from_segments(torch.tensor([7, 4, 4, 7]))
    assert (unsorted.size, unsorted.num_groups) == (2, 2)
    ragged = Groups.from_segments(torch.tensor([7, 4, 4]))
    assert ragged.size is None
    assert Groups.from_segments(torch.zeros(0, dtype=torch.long)).num_groups == 0
    assert Groups.equal(3, 0).num_groups == 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool], ids=str)
def test_any_integer_is_a_segment_id(dtype: torch.dtype) -> None:
    groups = Groups.from_segments(torch.tensor([1, 0, 1]).to(dtype))
    assert groups.of(torch.tensor([0, 1, 2])).tolist() == [1, 0, 1]


@SETTINGS
@given(ids=segments)
def test_of(ids: list[int]) -> None:
    groups = Groups.from_segments(torch.tensor(ids))
    expected = [sorted(set(ids)).index(i) for i in ids]
    assert groups.of(torch.arange(len(ids))).tolist() == expected
    assert groups.num_groups == len(set(ids))


@SETTINGS
@given(
    ids=segments,
    k=st.integers(1, 4),
    num_experts=st.integers(4, 9),
    factor=st.sampled_from([0.001, 0.1, 0.3, 0.5, 0.7, 1.0, 1.05, 1.1, 1.25, 2.0, 100.0]),
)
def test_capacity(ids: list[int], k: int, num_experts: int, factor: float) -> None:
    found = Groups.from_segments(torch.tensor(ids)).capacity(k, num_experts, factor)
    expected = [capacity(k, len(tokens), num_experts, factor) for tokens in members(ids)]
    if isinstance(found, Tensor):
        assert found.tolist() == expected
    else:
        assert [found] * len(expected) == expected


def test_capacity_by_hand() -> None:
    assert Groups.equal(1, 10).capacity(1, 4, 1.0) == 3  # ceil(2.5)
    assert Groups.equal(1, 100).capacity(1, 10, 1.1) == 11  # 11.000000000000002 in floating point
    assert Groups.equal(1, 10).capacity(2, 4, 1.0) == 5
    assert Groups.equal(1, 3).capacity(1, 8, 0.1) == 1  # at least 1
    assert Groups.equal(1, 3).capacity(4, 4, 5.0) == 3  # at most T


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
    found = Groups.from_segments(torch.tensor(ids)).logsumexp(logits)
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
    groups = Groups.from_segments(torch.tensor(ids))
    found = groups.top_tokens(scores, groups.capacity(1, 2, factor))
    for e in range(2):
        expected: list[int] = []
        for tokens in members(ids):
            best = best_first(tokens, lambda t, e=e: scores[t, e].item())  # type: ignore[misc]
            expected += best[: capacity(1, len(tokens), 2, factor)]
        assert found[e].tolist() == sorted(expected)


@SETTINGS
@given(ids=segments)
def test_mean_of_pairs(ids: list[int]) -> None:
    groups = Groups.from_segments(torch.tensor(ids))
    token = torch.arange(len(ids)).repeat(2)[: len(ids) + len(ids) // 2]  # some tokens twice
    value = torch.randn(len(token), dtype=torch.float64)
    for position, mean in enumerate(groups.mean_of_pairs(value, token).tolist()):
        same = [v for v, t in zip(value.tolist(), token.tolist(), strict=True) if ids[t] == ids[int(token[position])]]
        assert mean == pytest.approx(sum(same) / len(same), abs=1e-12)


@SETTINGS
@given(ids=segments)
def test_padded_batches_hold_each_token_once(ids: list[int]) -> None:
    groups = Groups.from_segments(torch.tensor(ids))
    batches = groups.padded()
    rows: list[list[int]] = []
    for token, mask in batches:
        mask = torch.ones_like(token, dtype=torch.bool) if mask is None else mask
        assert token.shape == mask.shape
        assert bool((mask.sum(1) * 2 >= token.size(1)).all())  # a padded pool is at most twice as long
        rows += [row[keep].tolist() for row, keep in zip(token, mask, strict=True)]
    if batches:
        assert sorted(rows) == sorted(members(ids))
    else:
        assert members(ids) == torch.arange(len(ids)).view(groups.num_groups, -1).tolist()


def test_segment_logsumexp() -> None:
    value = torch.tensor([[0.0], [1000.0], [1000.0], [-torch.inf]], dtype=torch.float64)
    found = segment_logsumexp(value, torch.tensor([0, 2, 2, 3]), 4)[:, 0]
    expected = [0.0, -torch.inf, 1000.0 + torch.tensor(2.0, dtype=torch.float64).log().item(), -torch.inf]
    assert found.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("capacity", [1, 2, 4])
def test_top_tokens_of_odd_values(capacity: int) -> None:
    """NaN first, then infinity, and every expert gets its number whatever it sees; with and without sorting."""
    nan, inf = torch.nan, torch.inf
    scores = torch.tensor([[0.0, -inf, inf], [nan, -inf, 2.0], [-0.0, -inf, inf], [1.0, -inf, nan]])
    groups = Groups.equal(1, 4)
    expected = [[1, 3, 0, 2], [0, 1, 2, 3], [0, 2, 3, 1]]  # NaN and infinity are ties
    found = groups.top_tokens(scores, capacity)
    assert found.tolist() == [sorted(row[:capacity]) for row in expected]
