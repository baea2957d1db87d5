"""Any model is called on batches of any form, and its outputs are compared."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.data import Data, HeteroData

from gmoe._calls import arguments_of, outputs_of, relative_change

X = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


class Model(nn.Module):
    """Returns floats in a dictionary and a tuple, integers, and whether it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.Dropout(0.5).eval()

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
        drawn = torch.rand(2)
        return {"y": scale * self.dropout(x), "more": (drawn, x.long(), [None, x[0]])}


class Counter(nn.Module):
    """Counts rows."""

    def forward(self, x: Tensor) -> int:
        return len(x)


@pytest.mark.parametrize("batch", [X, (X,), [X], {"x": X}])
def test_a_batch_is_a_tensor_a_sequence_or_a_dictionary(batch: Any) -> None:
    args, kwargs = arguments_of(batch)
    assert [*args, *kwargs.values()][0] is X


@pytest.mark.parametrize("data", [Data(x=X, edge_index=torch.zeros(2, 1).long()), HeteroData()])
def test_data_of_pyg_are_refused_as_they_are(data: Any) -> None:
    """They are iterable, but of attributes."""
    with pytest.raises(
        ValueError, match=r"^data: got a batch of type .*Data, .* \(x, edge_index\)$"
    ):
        outputs_of(nn.Identity(), data)


def test_another_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^data: got a batch of type SimpleNamespace, expected a"):
        arguments_of(SimpleNamespace(x=X))


@pytest.mark.parametrize("data", [X, (X, 1.0), {"x": X, "scale": 1.0}, [X], iter([(X, 1.0)])])
def test_all_floats_of_the_outputs_are_found_in_evaluation(data: Any) -> None:
    model = Model()
    model.dropout.train()
    state = torch.get_rng_state()
    y, drawn, row = outputs_of(model, data)
    assert torch.equal(y, X)  # without dropout
    assert torch.equal(row, X[0])
    assert not y.requires_grad
    # What the caller has stays: modes, and the state of the generator.
    assert (model.training, model.dropout.training, model.frozen.training) == (True, True, False)
    assert torch.equal(torch.get_rng_state(), state)
    # Each batch draws the same numbers.
    twice = outputs_of(model, [X, X])
    assert torch.equal(twice[1], drawn)
    assert torch.equal(twice[4], drawn)


def test_modes_come_back_after_an_error() -> None:
    model = Model()
    with pytest.raises(TypeError):
        outputs_of(model, {"z": X})
    assert model.training


def test_the_change_is_relative_to_what_came_out_before() -> None:
    before, after = [X, X[0]], [X + 0.1, X[0]]
    expected = 0.2 / math.sqrt(float(X.square().sum() + X[0].square().sum()))
    assert relative_change(before, after) == pytest.approx(expected)
    assert relative_change(before, before) == 0.0
    assert relative_change([torch.zeros(2)], [torch.ones(2)]) == math.inf
    assert relative_change([torch.zeros(2)], [torch.zeros(2)]) == 0.0


def test_the_same_infinity_twice_is_no_difference() -> None:
    masked = torch.tensor([3.0, -torch.inf, 4.0])
    assert relative_change([masked], [masked]) == 0.0
    moved = masked + torch.tensor([0.0, 0.0, 0.5])
    assert relative_change([masked], [moved]) == pytest.approx(0.1)
    for other in (-masked, torch.tensor([3.0, 0.0, 4.0])):
        assert relative_change([masked], [other]) == math.inf


@pytest.mark.parametrize("after", [[X[:1]], [X, X], [torch.full_like(X, torch.nan)]])
def test_other_shapes_and_nan_are_an_infinite_change(after: list[Tensor]) -> None:
    assert relative_change([X], after) == math.inf


def test_data_without_a_batch_and_models_without_floats_are_refused() -> None:
    for data, message in (
        ([], r"^data: got none, expected at least one batch"),
        (iter(()), r"^data: got none, expected at least one batch"),
        (3, r"^data: got int, expected a batch"),
    ):
        with pytest.raises(ValueError, match=message):
            outputs_of(Model(), data)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^inputs: got some for which the model returns no fl"):
        outputs_of(Counter(), X, "inputs")
