"""The parts of both GNNs: which activation, norm and residual map an argument stands for."""

from __future__ import annotations

from types import NoneType
from typing import Any

import pytest
import torch
from torch import nn
from torch_geometric.nn import BatchNorm

from gmoe.models.parts import activation_of, norm_of, residual_of


def test_none_is_the_identity() -> None:
    assert isinstance(activation_of(None), nn.Identity)
    assert isinstance(norm_of(None, 8), nn.Identity)


def test_a_name_and_a_function_are_activations() -> None:
    assert isinstance(activation_of("relu"), nn.ReLU)
    assert activation_of(torch.tanh) is torch.tanh


def test_a_norm_gets_the_width_of_the_hidden_layers() -> None:
    norm = norm_of("batch_norm", 8)
    assert isinstance(norm, BatchNorm)
    assert norm.module.num_features == 8


@pytest.mark.parametrize("act", [3, "foo", "none", "threshold", nn.ReLU])
def test_what_is_no_activation_is_refused(act: Any) -> None:
    with pytest.raises(ValueError, match=r"^act: got .*, expected the name of one of PyTorch's"):
        activation_of(act)


@pytest.mark.parametrize(
    "norm", [3, "foo", "none", "MessageNorm", "graph_size_norm", "hetero_batch_norm", nn.LayerNorm]
)
def test_what_is_no_norm_of_a_width_is_refused(norm: Any) -> None:
    with pytest.raises(ValueError, match=r"^norm: got .*, expected the name of one of PyG's norms"):
        norm_of(norm, 8)


@pytest.mark.parametrize(
    ("residual", "out", "expected"),
    [
        ("identity", 8, nn.Identity),
        ("identity", 4, NoneType),
        ("linear", 8, nn.Linear),
        ("linear", 4, nn.Linear),
        ("none", 8, NoneType),
    ],
)
def test_a_residual_is_the_input_where_widths_are_equal_or_linear_if_asked_for(
    residual: Any, out: int, expected: type[Any]
) -> None:
    assert isinstance(residual_of(residual, 8, out), expected)


def test_an_unknown_residual_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^residual: got 'sum', expected one of"):
        residual_of("sum", 8, 8)  # type: ignore[arg-type]
