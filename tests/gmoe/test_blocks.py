"""Rows sorted by expert, in blocks of one expert each."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gmoe import grouped_linear
from gmoe.blocks import blocks_of
from tests.helpers.kernels import ends, kernel_is


@given(loads=st.lists(st.integers(0, 90), min_size=1, max_size=6))
def test_blocks_hold_each_row_once_and_rows_of_one_expert(loads: list[int]) -> None:
    num_rows, num_experts = sum(loads), len(loads)
    expert_P = torch.arange(num_experts).repeat_interleave(torch.tensor(loads))
    blocks = blocks_of(ends(loads), expert_P)
    assert len(blocks.place_P.unique()) == num_rows
    assert torch.equal(blocks.expert_N[blocks.place_P // blocks.size], expert_P)
    assert torch.equal(blocks.expert_N, blocks.expert_N.sort().values)
    assert len(blocks.expert_N) <= 5 * num_experts  # copies of an expert's weights
    assert len(blocks.expert_N) * blocks.size <= num_rows + num_experts * max(
        16, num_rows / (4 * num_experts) + 1
    )


def test_what_fills_a_block_up_meets_no_other_expert() -> None:
    """Zero times infinity would be NaN: one expert's bad numbers stay its own."""
    x, weight = torch.ones(5, 3), torch.ones(2, 3, 4)
    x[4], weight[1] = torch.inf, torch.nan
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    with kernel_is("padded"):
        y = grouped_linear(x, weight, None, ends([4, 1]))
    grad_x, grad_weight = torch.autograd.grad(y[:4].sum(), leaves)
    assert y[:4].isfinite().all()
    assert grad_x[:4].isfinite().all()
    assert grad_weight[0].isfinite().all()


@pytest.mark.parametrize(("rows", "size"), [(10, 16), (1023, 64), (1024, 64), (1025, 65)])
def test_a_block_has_a_quarter_of_an_experts_mean_load_rounded_up(rows: int, size: int) -> None:
    assert blocks_of(ends([rows, 0, 0, 0]), torch.zeros(rows).long()).size == size
