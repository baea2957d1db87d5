"""torch's own kernels of grouped products, on tensors that start anywhere."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from gmoe import grouped_linear
from gmoe.products import Kernel
from tests.helpers.kernels import ends, kernel_is


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
@pytest.mark.parametrize("kernel", ["grouped", "loop"])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_tensors_may_start_at_any_address(
    kernel: Kernel, offset: int, is_transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's kernel wants those of 16 bytes; parts of a flat buffer start anywhere."""
    starts: list[int] = []
    of_torch = F.grouped_mm

    def noted(x: torch.Tensor, weight: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
        starts.extend(part.data_ptr() % 16 for part in (x, weight))
        return of_torch(x, weight, offs=offs)

    monkeypatch.setattr(F, "grouped_mm", noted)
    flat = torch.randn(offset + 2 * 8 * 4 + 6 * 8)
    weight = flat[offset:][: 2 * 8 * 4]
    weight = weight.view(2, 4, 8).mT if is_transposed else weight.view(2, 8, 4)
    x = flat[offset + 2 * 8 * 4 :].view(6, 8).requires_grad_()
    with kernel_is(kernel):
        y = grouped_linear(x, weight, None, ends([4, 2]))
    torch.testing.assert_close(y, torch.cat([x[:4] @ weight[0], x[4:] @ weight[1]]))
    y.square().sum().backward()
    assert kernel == "loop" or {*starts} == {0}
