"""Any model is called in evaluation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gmoe._calls import evaluating

X = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


def test_modes_come_back_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5).eval())
    with evaluating(model):
        assert not any(part.training for part in model.modules())
        assert not torch.is_grad_enabled()
    with pytest.raises(TypeError), evaluating(model):
        model(X, X)
    assert [part.training for part in model.modules()] == [True, True, False]
    assert torch.is_grad_enabled()
