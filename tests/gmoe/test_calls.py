"""Any model is called on a batch of any form, in evaluation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch_geometric.data import Data, HeteroData

from gmoe._calls import arguments_of, evaluating

X = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


@pytest.mark.parametrize("batch", [X, (X,), [X], {"x": X}])
def test_a_batch_is_a_tensor_a_sequence_or_a_dictionary(batch: Any) -> None:
    args, kwargs = arguments_of(batch, "graph")
    assert [*args, *kwargs.values()][0] is X


@pytest.mark.parametrize("data", [Data(x=X, edge_index=torch.zeros(2, 1).long()), HeteroData()])
def test_data_of_pyg_are_refused_as_they_are(data: Any) -> None:
    """They are iterable, but of attributes."""
    with pytest.raises(
        ValueError, match=r"^graph: got a batch of type .*Data, .* \(x, edge_index\)$"
    ):
        arguments_of(data, "graph")


def test_another_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^graph: got a batch of type SimpleNamespace, expected"):
        arguments_of(SimpleNamespace(x=X), "graph")


def test_modes_come_back_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5).eval())
    with evaluating(model):
        assert not any(part.training for part in model.modules())
        assert not torch.is_grad_enabled()
    with pytest.raises(TypeError), evaluating(model):
        model(X, X)
    assert [part.training for part in model.modules()] == [True, True, False]
    assert torch.is_grad_enabled()
