"""The differential check of what is built from somebody's module."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from gmoe._verify import (
    Sieve,
    comparable,
    form_of,
    moved_copy,
    probe_copy,
    rows_are_equal,
)


def test_all_copies_of_a_module_have_the_same_numbers() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    one, other = moved_copy(module), moved_copy(module)
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def test_a_probe_is_a_moved_copy_in_training() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).eval()
    probe = probe_copy(module)
    x = torch.randn(3, 2, dtype=torch.float64)
    assert probe.training
    assert torch.equal(probe(x), moved_copy(module)(x))


def test_a_moved_copy_has_other_numbers_in_float64_and_leaves_the_module_as_it_is() -> None:
    module: Any = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).to(torch.bfloat16)
    before = copy.deepcopy(module.state_dict())
    copied: Any = moved_copy(module)
    assert not copied.training
    assert module.training
    for name, value in copied.state_dict().items():
        assert torch.equal(module.state_dict()[name], before[name])
        if value.is_floating_point():
            assert value.dtype == torch.float64
            assert bool((value != before[name]).all())
    assert (copied[1].running_var > 1.0).all()


def test_the_numbers_of_a_moved_copy_tell_a_matrix_from_its_transpose() -> None:
    copied: Any = moved_copy(nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9)))
    first, second = copied[0].weight, copied[1].weight
    assert not torch.isclose(first, second).any()
    assert not torch.isclose(first, first.T)[~torch.eye(9, dtype=torch.bool)].any()
    assert torch.linalg.matrix_rank(first) == 9


def test_a_moved_copy_takes_little_memory() -> None:
    module = nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768))
    storages = [value.untyped_storage() for value in moved_copy(module).parameters()]
    in_full = sum(8 * value.numel() for value in module.parameters())
    assert sum(storage.nbytes() for storage in storages) < 0.02 * in_full


def test_tied_weights_of_a_moved_copy_stay_tied() -> None:
    module: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    copied: Any = moved_copy(module)
    assert copied[1].weight is copied[0].weight


def normed(linear: Any) -> torch.Tensor:
    """The weight under torch's old weight norm."""
    direction: torch.Tensor = linear.weight_v
    return linear.weight_g * direction / direction.norm(dim=1, keepdim=True)


@pytest.mark.parametrize(
    ("compute", "weight_of"),
    [
        (nn.utils.weight_norm, normed),
        (prune.identity, lambda linear: linear.weight_orig * linear.weight_mask),
    ],
    ids=["weight norm", "pruning"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_moved_copy_has_the_hooks_of_torch_that_compute_weights_and_no_others(
    compute: Any, weight_of: Any
) -> None:
    calls: list[Any] = []
    linear: Any = nn.Linear(4, 3)
    compute(linear, "weight")
    linear.register_forward_hook(lambda *args: calls.append(args))
    linear(torch.ones(1, 4))
    copied: Any = moved_copy(linear)
    copied(torch.ones(1, 4, dtype=torch.float64))
    assert len(calls) == 1
    torch.testing.assert_close(copied.weight, weight_of(copied))
    assert not torch.isclose(copied.weight, linear.weight.double()).any()


class Halving(nn.Dropout):
    """A dropout that does more than to drop."""

    def forward(self, x: Any) -> Any:
        return super().forward(x) / 2


def test_sieves_drop_the_same_numbers_each_time_once_they_are_on() -> None:
    copied: Any = moved_copy(nn.Sequential(nn.Dropout(0.3), Halving(0.3))).train()
    x = torch.ones(2, 4, dtype=torch.float64)
    assert isinstance(copied[0], Sieve)
    assert copied[0].p == 0.3
    assert isinstance(copied[1], Halving)
    assert torch.equal(copied[0](x), x)
    copied[0].is_on = True
    assert copied[0](x).tolist() == [[0.0, 2.0, 0.0, 2.0]] * 2


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
