"""Groups of tokens that compete, and the pairs that win. Shapes: T tokens, E experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gmoe.routers import Groups
from gmoe.routers.groups import drop_over_capacity

RAGGED = torch.tensor([5, 0, 5, 9, 0, 5])


def test_ids_that_are_unsorted_with_gaps_are_counted_from_zero() -> None:
    groups = Groups.of(RAGGED, 6)
    assert (groups.num_groups, groups.size) == (3, 0)
    assert groups.of_tokens(torch.arange(6)).tolist() == [1, 0, 1, 2, 0, 1]
    assert groups.order is not None
    assert groups.order.tolist() == [1, 4, 0, 2, 5, 3]


def test_equal_groups_in_order_need_nothing_but_their_size() -> None:
    for group in (3, torch.tensor([0, 0, 0, 4, 4, 4])):
        groups = Groups.of(group, 6)
        assert (groups.num_groups, groups.size) == (2, 3)
        assert groups.index is groups.order is groups.counts is None
        assert groups.of_tokens(torch.arange(6)).tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("group", [0, torch.empty(0, dtype=torch.long)])
def test_without_tokens_there_are_no_groups(group: Any) -> None:
    assert Groups.of(group, 0).num_groups == 0


@pytest.mark.parametrize("group", [RAGGED, torch.tensor([1, 0, 1, 0, 1, 0]), 2])
def test_each_token_is_in_one_slot_of_one_batch(group: Any) -> None:
    groups, x = Groups.of(group, 6), torch.arange(1.0, 7.0)[:, None]
    total = torch.zeros(6, 1)
    for batch in groups.batches(x.device):
        values = batch.take(x, padding=0.0)
        assert values.shape == (*batch.shape, 1)
        total = batch.add(total, values)
    assert torch.equal(total, x)


def test_a_capacity_is_rounded_up_but_not_for_a_rounding_error() -> None:
    assert Groups.of(100, 100).capacity(0.07) == 7  # 7.000000000000001
    assert Groups.of(10, 10).capacity(0.31) == 4
    assert Groups.of(10, 10).capacity(0.0) == 1
    assert Groups.of(10, 10).capacity(9.0) == 10
    capacity = Groups.of(RAGGED, 6).capacity(0.5)
    assert isinstance(capacity, torch.Tensor)
    assert capacity.tolist() == [1, 2, 1]
    least = Groups.of(RAGGED, 6).capacity(0.0)
    assert isinstance(least, torch.Tensor)
    assert least.tolist() == [1, 1, 1]


def test_an_expert_takes_the_best_tokens_of_each_group_and_of_ties_the_first() -> None:
    scores_TE = torch.tensor([[1.0], [3.0], [2.0], [0.0], [3.0], [2.0]])
    chosen = Groups.of(RAGGED, 6).top_tokens(scores_TE, torch.tensor([1, 2, 1]))
    assert chosen.tolist() == [[False, True, True, True, False, True]]
    ties = Groups.of(6, 6).top_tokens(torch.ones(6, 1), 2)
    assert ties.nonzero()[:, 1].tolist() == [0, 1]
    nan = Groups.of(6, 6).top_tokens(scores_TE.masked_fill(scores_TE == 0, torch.nan), 1)
    assert nan.nonzero()[:, 1].tolist() == [3]


def test_the_log_sum_exp_is_that_of_the_tokens_group() -> None:
    logits_TE = torch.randn(6, 2)
    found = Groups.of(RAGGED, 6).logsumexp(logits_TE)
    for token, group in enumerate(RAGGED):
        torch.testing.assert_close(found[token], logits_TE[group == RAGGED].logsumexp(dim=0))


def test_first_choices_go_before_second_ones_and_likelier_ones_first() -> None:
    probs_TE = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.2, 0.8], [0.3, 0.7]])
    expert_TK = probs_TE.topk(2).indices
    token_P, offsets_E = drop_over_capacity(expert_TK, probs_TE, Groups.of(4, 4), 0.75)
    assert offsets_E.tolist() == [3, 6]
    # Expert 0: its own two, then the second choice of the surer of the others.
    assert token_P.tolist() == [0, 1, 2, 1, 2, 3]


def test_groups_of_several_sizes_in_one_batch_are_padded_behind_their_tokens() -> None:
    groups = Groups.of(torch.tensor([0] * 5 + [1] * 8), 13)
    (batch,) = groups.batches(torch.device("cpu"))
    assert batch.shape == (2, 8)
    assert batch.mask is not None
    assert batch.mask.sum(dim=1).tolist() == [5, 8]
    values = batch.take(torch.arange(13.0)[:, None], padding=-1.0)[:, :, 0]
    assert values.tolist() == [[0, 1, 2, 3, 4, -1, -1, -1], [5, 6, 7, 8, 9, 10, 11, 12]]
