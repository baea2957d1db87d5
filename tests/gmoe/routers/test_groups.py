"""Groups of tokens that compete, and the pairs that win. Shapes: T tokens, E experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gmoe.routers import Groups

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


def test_groups_of_several_sizes_in_one_batch_are_padded_behind_their_tokens() -> None:
    groups = Groups.of(torch.tensor([0] * 5 + [1] * 8), 13)
    (batch,) = groups.batches(torch.device("cpu"))
    assert batch.shape == (2, 8)
    assert batch.mask is not None
    assert batch.mask.sum(dim=1).tolist() == [5, 8]
    values = batch.take(torch.arange(13.0)[:, None], padding=-1.0)[:, :, 0]
    assert values.tolist() == [[0, 1, 2, 3, 4, -1, -1, -1], [5, 6, 7, 8, 9, 10, 11, 12]]
