"""Results that an object keeps until their sources change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gmoe.conv.kept import KeptResult, once, versions_of


class Sums:
    """As a graph does: edge arguments, what is kept of them, and a check of arguments set anew."""

    def __init__(self) -> None:
        self.edge_weight: Tensor | None = torch.ones(3)
        self.edge_attr: Tensor | None = None
        self.matrix_values: Tensor | None = None
        self._kept: dict[tuple[object, ...], KeptResult[Any]] = {}
        self.checks = self.calls = 0

    def _check_args(self) -> None:
        self.checks += 1

    @once
    def total(self, *, factor: Any = 1) -> Tensor:
        self.calls += 1
        assert self.edge_weight is not None
        return factor * self.edge_weight.sum()


def test_a_result_is_computed_once_for_the_same_options() -> None:
    sums = Sums()
    assert sums.total() is sums.total()
    assert sums.total(factor=2) == 6
    assert sums.total(factor=2) is sums.total(factor=2)
    assert sums.calls == sums.checks == 2


def written(sums: Any) -> None:
    sums.edge_weight.add_(1)


def replaced(sums: Any) -> None:
    sums.edge_weight = torch.full((3,), 2.0)


@pytest.mark.parametrize("change", [written, replaced])
def test_a_result_is_computed_anew_after_its_source_changed(change: Callable[[Any], None]) -> None:
    sums = Sums()
    assert sums.total() == 3
    change(sums)
    assert sums.total() == 6


def test_a_result_with_a_gradient_is_not_kept() -> None:
    sums = Sums()
    sums.total()
    sums.edge_weight = torch.ones(3, requires_grad=True)
    assert sums.total() is not sums.total()
    assert not sums._kept


def test_a_result_of_inference_mode_can_be_trained_with() -> None:
    sums = Sums()
    with torch.inference_mode():
        assert not sums.total().is_inference()


def test_the_versions_of_tensors_count_writes_and_those_of_none_are_none() -> None:
    value = torch.ones(2)
    before = versions_of((value, None))
    value.zero_()
    assert before[1] is None
    assert versions_of((value, None)) != before
