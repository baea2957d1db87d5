"""When two outputs are the same."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_same(a: Tensor, b: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)
