"""Helpers of autograd functions and compiled code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gmoe
from gmoe._autograd import first_order, lazy, operator, outside_backward, refuse_transforms


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


@operator(fake=lambda x: x.new_empty(x.shape))
def _triple_for_a_test(x: Tensor) -> Tensor:
    return 3 * x


def test_the_first_gradient_passes_and_a_second_one_is_refused() -> None:
    x = torch.ones(2, requires_grad=True)
    (grad,) = torch.autograd.grad(Double.apply(x).sum(), x)
    assert grad.tolist() == [2, 2]
    with pytest.raises(RuntimeError, match="create_graph: got True"):
        torch.autograd.grad(Double.apply(x).sum(), x, create_graph=True)


def test_a_batch_of_gradients_is_refused() -> None:
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="batches of gradients"):
        torch.autograd.functional.jacobian(Double.apply, x, vectorize=True)


def test_a_transform_of_torch_func_is_refused() -> None:
    def inside(x: Tensor) -> Tensor:
        refuse_transforms()
        return x

    refuse_transforms()
    with pytest.raises(RuntimeError, match="are not supported by gmoe's layers"):
        torch.func.vmap(inside)(torch.ones(2))


def test_tracing_is_refused() -> None:
    def inside(x: Tensor) -> Tensor:
        refuse_transforms()
        return x

    with pytest.raises(RuntimeError, match="are not supported by gmoe's layers"):
        torch.jit.trace(inside, torch.ones(2))


def test_an_operator_computes_values_and_gives_shapes_without_values() -> None:
    assert _triple_for_a_test(torch.ones(2)).tolist() == [3, 3]
    assert torch.ops.gmoe.triple_for_a_test(torch.ones(2)).tolist() == [3, 3]
    assert _triple_for_a_test(torch.ones(2, device="meta")).shape == (2,)


def test_a_lazy_property_is_computed_once() -> None:
    class Counts:
        count = 0

        @lazy
        def value(self) -> int:
            """The docstring."""
            self.count += 1
            return self.count

    counts = Counts()
    assert (counts.value, counts.value) == (1, 1)
    assert Counts().value == 1


def test_compiled_code_learns_at_each_run_whether_it_runs_in_a_backward_pass() -> None:
    seen = []

    def run(x: Tensor) -> Tensor:
        return torch.where(outside_backward(x), x, -x)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    x = torch.ones(2, requires_grad=True)
    y = x.clone()
    y.register_hook(lambda grad: seen.append(compiled(grad)))
    assert compiled(torch.ones(2)).tolist() == [1, 1]
    y.sum().backward()
    assert seen[0].tolist() == [-1, -1]


@pytest.mark.parametrize("conv", ["gcn", "gat"])
def test_shapes_are_found_on_the_meta_device(conv: str) -> None:
    """Which has no autocast to ask for."""
    with torch.device("meta"):
        gnn = gmoe.GNNMoE(5, 8, 3, conv=conv, num_experts=4)
        moe = gmoe.MoE(gmoe.TokenChoice(5, num_experts=4), gmoe.MLPExperts(5, 8, 2, num_experts=4))
        x, edge_index = torch.ones(7, 5), torch.zeros(2, 9, dtype=torch.long)
    assert gnn(x, edge_index).shape == (7, 3)
    assert moe(x).shape == (7, 2)
