"""The differential check of what is built from somebody's module."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from gmoe._verify import comparable, form_of, move_, probe_copy, rows_are_equal


def test_all_parameters_and_buffers_are_moved_alike_in_copies() -> None:
    norm: Any = nn.BatchNorm1d(3)
    one, other = copy.deepcopy(norm), copy.deepcopy(norm)
    move_(one)
    move_(other)
    for name, value in norm.state_dict().items():
        moved = one.state_dict()[name]
        assert torch.equal(moved, other.state_dict()[name])
        assert bool((moved != value).all()) == value.is_floating_point()
    assert (one.running_var > norm.running_var).all()


def test_a_probe_is_a_copy_in_float64_that_draws_nothing() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).eval()
    probe = probe_copy(module)
    assert probe.training
    assert probe[1].p == 0.0
    assert {parameter.dtype for parameter in probe.parameters()} == {torch.float64}
    assert module[1].p == 0.5


ROWS = torch.tensor([[1.0, -2.0], [1000.0, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "equal"),
    [
        (torch.zeros(2, 2), True),
        (torch.tensor([[0.0, 0.0], [0.0, 1e-7]]), True),  # by the largest number of the row
        (torch.tensor([[1e-7, 0.0], [0.0, 0.0]]), False),
        (torch.tensor([[torch.nan, 0.0], [0.0, 0.0]]), False),
        (torch.tensor([[torch.inf, 0.0], [0.0, 0.0]]), False),
    ],
)
def test_rows_are_compared_one_by_one(change: Any, equal: bool) -> None:
    assert rows_are_equal(ROWS + change, ROWS) == equal
    assert rows_are_equal(ROWS + change, ROWS + change)


def test_rows_of_another_shape_differ() -> None:
    assert not rows_are_equal(ROWS, ROWS[:1])


def test_modules_of_one_form_differ_in_values_alone() -> None:
    def mlp(act: nn.Module, bias: bool = True) -> nn.Module:
        return nn.Sequential(nn.Linear(2, 3, bias=bias), act)

    assert form_of(mlp(nn.GELU())) == form_of(mlp(nn.GELU()))
    frozen = mlp(nn.GELU()).requires_grad_(False)
    others = [mlp(nn.GELU("tanh")), mlp(nn.ReLU()), mlp(nn.GELU(), bias=False), frozen]
    patched: Any = mlp(nn.GELU())
    patched.scale = 2.0
    assert len({form_of(module) for module in (mlp(nn.GELU()), *others, patched)}) == 6


def test_values_of_unknown_classes_equal_only_themselves() -> None:
    one, other = object(), object()
    assert comparable({"a": [one, 1.0]}) == comparable({"a": [one, 1.0]})
    assert comparable([one]) != comparable([other])
    assert comparable(1) != comparable(True)
