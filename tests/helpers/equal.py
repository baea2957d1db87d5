"""When two outputs are the same."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
