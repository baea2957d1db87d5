"""From scores to pairs. Shapes: T tokens, E experts, K experts a token, C capacity."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gmoe.routing.pools import Pools
from gmoe.routing.select import drop_over_capacity, pairs_of_choices, pairs_of_experts, pairs_of_mask, top_experts
from tests.gmoe.reference import Pair, best_first, drop, pool_lists

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)


def as_pairs(token_P: Tensor, offsets_E: Tensor) -> list[Pair]:
    """Pairs in the order of the routing: by expert, then by token."""
    assert token_P.dtype == torch.int64
    assert offsets_E.dtype == torch.int32
    owner = torch.searchsorted(offsets_E.long(), torch.arange(len(token_P)), right=True)
    return list(zip(token_P.tolist(), owner.tolist(), strict=True))


def by_expert(pairs: list[Pair]) -> list[Pair]:
    return sorted(pairs, key=lambda pair: (pair[1], pair[0]))


@SETTINGS
@given(
    scores=st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=4, max_size=4), max_size=8), k=st.integers(1, 4)
)
def test_top_experts_with_ties(scores: list[list[float]], k: int) -> None:
    found = top_experts(torch.tensor(scores).view(-1, 4), k)
    assert found.tolist() == [best_first(range(4), row.__getitem__)[:k] for row in scores]
    pairs = as_pairs(*pairs_of_choices(found, 4))
    assert pairs == by_expert([(t, int(e)) for t, row in enumerate(found) for e in row])


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
    pools = Pools.from_segments(torch.tensor(ids))
    expert_TK = top_experts(probs, k)
    found = drop_over_capacity(expert_TK, probs, pools, pools.capacity(k, 3, factor))
    expected = drop(expert_TK.tolist(), [list(p) for p in probs], pool_lists(probs, torch.tensor(ids)), factor)
    assert as_pairs(*found) == by_expert(expected)


def test_drop_by_priority_not_by_position() -> None:
    """Three tokens prefer expert 0, which takes two: the surest, 1 and 2, and not the first ones."""
    probs = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.7, 0.3]])
    found = drop_over_capacity(top_experts(probs, 1), probs, Pools.equal(1, 3), 2)
    assert as_pairs(*found) == [(1, 0), (2, 0)]


def test_first_choices_go_before_second_ones() -> None:
    """Expert 1 takes one token: the unsure token 1, whose first choice it is, before the sure token 0."""
    probs = torch.tensor([[0.7, 0.3, 0.0], [0.1, 0.5, 0.4]])
    found = drop_over_capacity(top_experts(probs, 2), probs, Pools.equal(1, 2), 1)
    assert as_pairs(*found) == [(0, 0), (1, 1), (1, 2)]


def test_the_surest_of_the_first_choice_where_the_choice_is_biased() -> None:
    """A bias sent token 0 (0.9, 0.1) to expert 1 with 0.1; token 1 chose it with 0.6, and has priority."""
    probs = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    found = drop_over_capacity(torch.tensor([[1], [1]]), probs, Pools.equal(1, 2), 1)
    assert as_pairs(*found) == [(1, 1)]


def test_pairs_of_experts_and_of_masks() -> None:
    assert as_pairs(*pairs_of_experts(torch.tensor([[0, 2], [1, 2]]))) == [(0, 0), (2, 0), (1, 1), (2, 1)]
    mask = torch.tensor([[True, False, True], [False, False, True]])
    assert as_pairs(*pairs_of_mask(mask)) == [(0, 0), (0, 2), (1, 2)]
    assert as_pairs(*pairs_of_mask(torch.zeros(0, 3, dtype=torch.bool))) == []
    assert as_pairs(*pairs_of_choices(torch.zeros(0, 2, dtype=torch.long), 3)) == []
