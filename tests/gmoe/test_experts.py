"""Experts, and the parts that users put in them.

Shapes: E experts, P pairs sorted by expert, I in, H hidden, O out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmoe import Experts, LinearExperts, MLPExperts, combine, dispatch
from gmoe.products import Kernel
from tests.helpers.kernels import kernel_is
from tests.helpers.masked import features, routing_of
from tests.helpers.reference import naive_expert

OFFSETS = torch.tensor([2, 2, 5], dtype=torch.int32)
OWNER = [0, 0, 2, 2, 2]
GATE = torch.tensor(
    [[0.5, 0.0, 2.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]], dtype=torch.float64
)
"""(T, E) weights; a token without an expert, and one with all."""

EXPERTS: dict[str, Callable[..., Experts]] = {
    "linear": lambda **kw: LinearExperts(4, 3, num_experts=3, **kw),
    "mlp": lambda **kw: MLPExperts(4, 6, 3, num_experts=3, **kw),
    "mlp-glu": lambda **kw: MLPExperts(4, 6, 3, num_experts=3, glu=True, activation="silu", **kw),
    "mlp-no_bias": lambda **kw: MLPExperts(
        4, 6, 3, num_experts=3, bias=False, activation="tanh", **kw
    ),
    "mlp-function": lambda **kw: MLPExperts(4, 6, 3, num_experts=3, activation=torch.sin, **kw),
}


def with_gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [y, *torch.autograd.grad(y, leaves, features(*y.shape, seed=9))]


@pytest.mark.parametrize("build", EXPERTS.values(), ids=EXPERTS)
@pytest.mark.parametrize("kernel", get_args(Kernel))
def test_rows_and_tokens_meet_their_experts(build: Callable[..., Experts], kernel: Kernel) -> None:
    experts, x = build().double(), features(5, 4).requires_grad_()
    expected = torch.stack([naive_expert(experts, e, row) for e, row in zip(OWNER, x, strict=True)])
    leaves = [x, *experts.parameters()]
    with kernel_is(kernel):
        ours = with_gradients(experts(x, OFFSETS), leaves)
    theirs = with_gradients(expected, leaves)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    routing = routing_of(GATE.clone().requires_grad_())
    leaves, y = [x, routing.weight, *experts.parameters()], experts(x[:4], routing)
    expected = combine(experts(dispatch(x[:4], routing), routing.offsets), routing)
    torch.testing.assert_close(
        with_gradients(y, leaves), with_gradients(expected, leaves), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("kind", [nn.ReLU, nn.Dropout])
def test_activations_that_work_in_place(kind: Callable[..., nn.Module], glu: bool) -> None:
    x, routing = features(4, 4).requires_grad_(), routing_of(GATE)
    found = []
    for activation in (kind(), kind(inplace=True), nn.Sequential(kind(inplace=True))):
        torch.manual_seed(0)
        experts = MLPExperts(4, 6, 3, num_experts=3, activation=activation, glu=glu).double()
        found.append(with_gradients(experts(x, routing), [x, *experts.parameters()]))
    torch.testing.assert_close(found[1:], found[:1] * 2)


NAMED: dict[str, Any] = {
    name: getattr(F, name) for name in ("elu", "gelu", "leaky_relu", "relu", "silu", "tanh")
}


@pytest.mark.parametrize("name", NAMED)
def test_activations_by_name(name: str) -> None:
    experts, x, offsets = (
        MLPExperts(4, 6, 3, num_experts=3, activation=name),
        torch.randn(5, 4),
        OFFSETS,
    )
    torch.testing.assert_close(
        experts(x, offsets), experts.down(NAMED[name](experts.up(x, offsets)), offsets)
    )


def test_parts_run_that_a_user_replaced() -> None:
    """Of layers and hooks see ``runs_what_users_put_in`` in ``tests/contract.py``."""
    x = torch.randn(5, 4)
    experts: Any = MLPExperts(4, 6, 3, num_experts=3).eval()
    experts.input_norm, experts.hidden_norm, experts.hidden_dropout = (
        nn.Tanh(),
        nn.Softplus(),
        nn.Sigmoid(),
    )
    hidden = F.softplus(F.gelu(experts.up(x.tanh(), OFFSETS)).sigmoid())
    torch.testing.assert_close(experts(x, OFFSETS), experts.down(hidden, OFFSETS))


@pytest.mark.parametrize("part", ["hidden_dropout", "output_dropout"])
def test_a_dropout_in_training_mode_drops_at_evaluation(part: str) -> None:
    """Monte Carlo dropout."""
    experts, x, routing = (
        MLPExperts(4, 64, 32, num_experts=3, dropout=0.5).eval(),
        torch.randn(4, 4),
        routing_of(GATE.float()),
    )
    assert torch.equal(experts(x, routing), experts(x, routing))
    experts.get_submodule(part).train()
    assert not torch.equal(experts(x, routing), experts(x, routing))


def test_initialized_as_separate_linears() -> None:
    torch.manual_seed(0)
    linears = [nn.Linear(6, 4) for _ in range(5)]
    torch.manual_seed(0)
    experts = LinearExperts(6, 4, num_experts=5)
    assert torch.equal(experts.weight, torch.stack([linear.weight for linear in linears]))
    assert experts.bias is not None
    assert torch.equal(experts.bias, torch.stack([linear.bias for linear in linears]))


def test_experts_that_start_at_zero_do_so_again() -> None:
    """Drawn anew as a whole, or part by part."""
    experts = MLPExperts(4, 5, 3, num_experts=2, zero_init=True)
    x, offsets = torch.randn(6, 4), torch.tensor([2, 6])
    assert not experts(x, offsets).any()
    for parts in ([experts], [experts.up, experts.down]):
        for parameter in experts.parameters():
            nn.init.constant_(parameter, torch.nan)
        for part in parts:
            part.reset_parameters()
        assert experts.up.weight.any()
        assert not experts(x, offsets).any()


@pytest.mark.parametrize(
    ("build", "argument"),
    [
        (lambda: LinearExperts(0, 4, num_experts=2), "in_features"),
        (lambda: LinearExperts(4, 0, num_experts=2), "out_features"),
        (lambda: LinearExperts(4, 4, num_experts=True), "num_experts"),
        (lambda: MLPExperts(4, 0, 4, num_experts=2), "hidden_features"),
        (lambda: MLPExperts(4, 8, 4, num_experts=2, activation="swish"), "activation"),
        (lambda: MLPExperts(4, 8, 4, num_experts=2, dropout=1.5), "dropout"),
    ],
)
def test_bad_arguments(build: Callable[[], Experts], argument: str) -> None:
    with pytest.raises(ValueError, match=argument):
        build()
