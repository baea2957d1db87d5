"""Sums and products along messages equal a row for each message, in values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gmoe.conv import segment
from gmoe.conv.segment import Messages, blocks, dot, weighted_sum
from tests.gmoe.conv.masked import features

HEADS, WIDTH = 2, 3


def messages(pairs: list[tuple[int, int]], num_senders: int, num_receivers: int) -> Messages:
    receiver, sender = torch.tensor(sorted(pairs), dtype=torch.long).reshape(-1, 2).T
    return Messages(sender, receiver, num_senders, num_receivers)


def slow_sum(weight_MH: Tensor, value_UHC: Tensor, heard: Messages) -> Tensor:
    row_MHC = weight_MH[:, :, None] * value_UHC[heard.sender]
    return row_MHC.new_zeros(heard.num_receivers, *row_MHC.shape[1:]).index_add(0, heard.receiver, row_MHC)


def slow_dot(query_PHC: Tensor, key_UHC: Tensor, heard: Messages) -> Tensor:
    return (query_PHC[heard.receiver] * key_UHC[heard.sender]).sum(dim=-1)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("devices", [("cpu",), ()], ids=["sparse", "blocks"])
@pytest.mark.parametrize(("fast", "slow"), [(weighted_sum, slow_sum), (dot, slow_dot)])
def test_equals_a_row_for_each_message(
    fast: Callable[..., Tensor], slow: Callable[..., Tensor], devices: tuple[str, ...], data: st.DataObject
) -> None:
    """Repeated and missing messages, rows that are shared by the heads, more messages than pairs of ends."""
    senders, receivers = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    pair = st.tuples(st.integers(0, receivers - 1), st.integers(0, senders - 1))
    heard = messages(data.draw(st.lists(pair, max_size=12)), senders, receivers)
    rows = len(heard.sender) if fast is weighted_sum else receivers
    first = features(rows, HEADS, *([] if fast is weighted_sum else [WIDTH]), seed=1).requires_grad_()
    second = features(senders, data.draw(st.sampled_from([1, HEADS])), WIDTH, seed=2).requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segment, "SPARSE_DEVICES", devices)
        patch.setattr(segment, "NUMBERS", 20)
        expected, actual = slow(first, second, heard), fast(first, second, heard)
        grad = features(*expected.shape, seed=3)
        ours, theirs = (torch.autograd.grad(y, [first, second], grad) for y in (actual, expected))
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("function", [weighted_sum, dot])
def test_takes_expanded_gradients(function: Callable[..., Tensor]) -> None:
    heard = messages([(0, 0), (0, 1), (1, 1)], 2, 2)
    first = features(3, HEADS) if function is weighted_sum else features(2, HEADS, WIDTH)
    second = features(2, HEADS, WIDTH, seed=2).requires_grad_()
    function(first, second, heard).sum().backward()
    slow = slow_sum if function is weighted_sum else slow_dot
    assert second.grad is not None
    torch.testing.assert_close(second.grad, torch.autograd.grad(slow(first, second, heard).sum(), second)[0])


def test_low_precision_is_summed_in_float32() -> None:
    heard = messages([(0, 0)] * 1000, 1, 1)
    weight, value = torch.ones(1000, 1, dtype=torch.bfloat16), torch.ones(1, 1, 1, dtype=torch.bfloat16)
    y = weighted_sum(weight, value, heard)
    assert y.dtype == torch.bfloat16
    assert float(y) == 1000.0  # a sum in bfloat16 stops at 256
    assert weighted_sum(weight.float(), value, heard).dtype == torch.float32


def test_reverse() -> None:
    heard = messages([(0, 2), (1, 0), (1, 2), (3, 1)], 3, 4)
    back, order = heard.reverse
    assert (back.num_senders, back.num_receivers) == (4, 3)
    assert back.receiver.tolist() == [0, 1, 2, 2]
    assert back.sender.tolist() == heard.receiver[order].tolist()
    assert sorted(back.sender[2:].tolist()) == [0, 1]
    assert heard.start.tolist() == [0, 1, 3, 3, 4]


@given(start=st.integers(0, 20), length=st.integers(0, 40), width=st.integers(1, 300))
def test_blocks_cover_all_once(start: int, length: int, width: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segment, "NUMBERS", 100)
        found = list(blocks(start, start + length, width, torch.device("cpu")))
    assert [i for block in found for i in range(block.start, block.stop)] == list(range(start, start + length))
    assert all((block.stop - block.start) * width <= max(100, width) for block in found)
