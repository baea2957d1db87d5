"""The benchmark of forces compares layers that compute the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import gmoe
from experiments.benchmark.forces import ForcesBenchmark, OfType
from experiments.train.data.forces import ELEMENTS
from experiments.train.potential import ATOMWISE, Potential
from gmoe.routers import ByType

TINY = ForcesBenchmark(molecules=2, atoms=4, widths=(4,), repeats=1)


def test_variants_are_timed_beside_the_dense_one() -> None:
    found = TINY.run()
    assert list(found) == [
        "linear 4, dense",
        "linear 4, by element",
        "linear 4, HeteroLinear",
        "force step 4, dense",
        "force step 4, by element",
        "force step 4, by element, W_0 + D",
        "force step 4, weights mixed by composition",
        "force step 4, outputs mixed by composition",
        "force step 4, HeteroLinear",
    ]
    assert found["linear 4, dense"]["ratio"]["cpu"] == 1.0
    assert all(figures["wall"]["median"] > 0 for figures in found.values())


def test_hetero_linear_has_the_outputs_and_gradients_of_experts() -> None:
    torch.manual_seed(0)
    z = torch.tensor(ELEMENTS).repeat(2)
    model = gmoe.moefy(
        Potential(4, 1.0), targets=ATOMWISE, router=ByType("z", ELEMENTS), start="plain"
    ).double()
    other = copy.deepcopy(model)
    for name, layer in [*other.named_modules()]:
        if isinstance(layer, gmoe.MoE):
            other.set_submodule(name, OfType(layer))
    pos = torch.randn(len(z), 3, dtype=torch.double, requires_grad=True)
    found = list[Any]()
    for one in (model, other):
        energy = one(z, pos, torch.zeros_like(z), z)
        (slope,) = torch.autograd.grad(energy.sum(), pos, create_graph=True)
        slope.square().sum().backward()
        found.append((energy, slope, pos.grad))
        pos.grad = None
    torch.testing.assert_close(*found)


def test_a_variant_that_computes_something_else_is_refused(monkeypatch: Any) -> None:
    forward = OfType.forward
    monkeypatch.setattr(OfType, "forward", lambda self, x: 2 * forward(self, x))
    with pytest.raises(AssertionError, match="HeteroLinear and gmoe differ"):
        TINY.run()
