"""The padded product: rows sorted by expert, in blocks of one expert each."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from gmoe import grouped_linear
from gmoe.padded import blocks_of
from gmoe.products import Backend
from tests.helpers.kernels import ends


@given(loads=st.lists(st.integers(0, 90), min_size=1, max_size=6))
def test_blocks_hold_each_row_once_and_rows_of_one_expert(loads: list[int]) -> None:
    num_rows, num_experts = sum(loads), len(loads)
    blocks = blocks_of(ends(loads), num_rows)
    expert_P = torch.arange(num_experts).repeat_interleave(torch.tensor(loads))
    places = torch.stack([blocks.block_P, blocks.slot_P], dim=1)
    assert len(places.unique(dim=0)) == num_rows
    assert not num_rows or (places[:, 1].min() >= 0 and places[:, 1].max() < blocks.size)
    assert torch.equal(blocks.expert_N[blocks.block_P], expert_P)
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
    y = grouped_linear(x, weight, None, ends([4, 1]), "padded")
    grad_x, grad_weight = torch.autograd.grad(y[:4].sum(), leaves)
    assert y[:4].isfinite().all()
    assert grad_x[:4].isfinite().all()
    assert grad_weight[0].isfinite().all()


@pytest.mark.parametrize(("rows", "size"), [(10, 16), (1023, 64), (1024, 64), (1025, 65)])
def test_a_block_has_a_quarter_of_an_experts_mean_load_rounded_up(rows: int, size: int) -> None:
    assert blocks_of(ends([rows, 0, 0, 0]), rows).size == size


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
@pytest.mark.parametrize("backend", ["grouped", "loop"])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_tensors_may_start_at_any_address(
    backend: Backend, offset: int, is_transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's kernel wants those of 16 bytes; parts of a flat buffer start anywhere."""
    starts: list[int] = []
    kernel = F.grouped_mm

    def noted(x: torch.Tensor, weight: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
        starts.extend(part.data_ptr() % 16 for part in (x, weight))
        return kernel(x, weight, offs=offs)

    monkeypatch.setattr(F, "grouped_mm", noted)
    flat = torch.randn(offset + 2 * 8 * 4 + 6 * 8)
    weight = flat[offset:][: 2 * 8 * 4]
    weight = weight.view(2, 4, 8).mT if is_transposed else weight.view(2, 8, 4)
    x = flat[offset + 2 * 8 * 4 :].view(6, 8).requires_grad_()
    y = grouped_linear(x, weight, None, ends([4, 2]), backend)
    torch.testing.assert_close(y, torch.cat([x[:4] @ weight[0], x[4:] @ weight[1]]))
    y.square().sum().backward()
    assert backend == "loop" or {*starts} == {0}
