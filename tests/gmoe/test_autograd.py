"""Helpers of autograd functions and compiled code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gmoe
from gmoe._autograd import (
    gradients_of,
    lazy,
    operator,
    outside_backward,
    refuse_transforms,
    unbatched,
)


class Product(torch.autograd.Function):
    """Of two tensors, one of which may be missing; its backward works in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, y)
        return x.clone() if y is None else x * y

    @staticmethod
    @unbatched
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, y = ctx.saved_tensors
        if torch.is_grad_enabled():
            return gradients_of(Product.plain, (x, y), ctx.needs_input_grad, grad)
        return grad.clone() if y is None else grad.clone().mul_(y), None if y is None else grad * x

    @staticmethod
    def plain(x: Tensor, y: Tensor | None) -> Tensor:
        return x.clone() if y is None else x * y


@operator(fake=lambda x: x.new_empty(x.shape))
def _triple_for_a_test(x: Tensor) -> Tensor:
    return 3 * x


def test_the_gradients_of_a_plain_form_can_be_differentiated_again() -> None:
    x, y = torch.randn(2, 3, 2, dtype=torch.double).unbind()
    x.requires_grad_()
    assert torch.autograd.gradgradcheck(Product.apply, (x, y.requires_grad_()))
    assert torch.autograd.gradgradcheck(lambda x: Product.apply(x.sin(), None), (x,))
    assert torch.autograd.gradgradcheck(lambda y: Product.apply(x.detach(), y), (y,))


def test_a_value_that_follows_from_another_one_does_not_pass_its_gradient_on_twice() -> None:
    x = torch.tensor([2.0], requires_grad=True)
    (grad,) = torch.autograd.grad(Product.apply(x, x.square()), x, create_graph=True)
    assert grad.tolist() == [12]  # 3 x²
    assert torch.autograd.grad(grad, x)[0].tolist() == [12]  # 6 x


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_batch_of_gradients_is_refused(create_graph: bool) -> None:
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="batches of gradients"):
        torch.autograd.functional.jacobian(
            lambda x: Product.apply(x, None), x, create_graph=create_graph, vectorize=True
        )


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
