"""Experts, and the parts that users put in them. Shapes: E experts, P pairs sorted by expert, I in, H hidden, O out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmoe import Experts, LinearExperts, MLPExperts, combine, dispatch
from gmoe.dispatch import Backend
from tests.gmoe.conv.masked import features, routing_of
from tests.gmoe.reference import naive_expert

OFFSETS = torch.tensor([2, 2, 5], dtype=torch.int32)
OWNER = [0, 0, 2, 2, 2]
GATE = torch.tensor([[0.5, 0.0, 2.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
"""(T, E) weights; a token without an expert, and one with all."""

EXPERTS: dict[str, Callable[..., Experts]] = {
    "linear": lambda **kw: LinearExperts(4, 3, 3, **kw),
    "linear-no_bias": lambda **kw: LinearExperts(4, 3, 3, bias=False, **kw),
    "mlp": lambda **kw: MLPExperts(4, 6, 3, 3, **kw),
    "mlp-glu": lambda **kw: MLPExperts(4, 6, 3, 3, glu=True, activation="silu", **kw),
    "mlp-no_bias": lambda **kw: MLPExperts(4, 6, 3, 3, bias=False, activation="tanh", **kw),
    "mlp-function": lambda **kw: MLPExperts(4, 6, 3, 3, activation=torch.sin, **kw),
}
each = pytest.mark.parametrize("build", EXPERTS.values(), ids=EXPERTS)
each_backend = pytest.mark.parametrize("backend", get_args(Backend))


def with_gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [y, *torch.autograd.grad(y, leaves, features(*y.shape, seed=9))]


@each
@each_backend
def test_rows_meet_their_expert(build: Callable[..., Experts], backend: Backend) -> None:
    experts, x = build(backend=backend).double(), features(5, 4).requires_grad_()
    expected = torch.stack([naive_expert(experts, e, row) for e, row in zip(OWNER, x, strict=True)])
    leaves = [x, *experts.parameters()]
    for own, other in zip(with_gradients(experts(x, OFFSETS), leaves), with_gradients(expected, leaves), strict=True):
        torch.testing.assert_close(own, other, atol=1e-12, rtol=0)


@each
def test_tokens_meet_their_experts(build: Callable[..., Experts]) -> None:
    experts, x = build().double(), features(4, 4).requires_grad_()
    routing = routing_of(GATE.clone().requires_grad_())
    by_rows = combine(experts(dispatch(x, routing), routing.offsets), routing)
    leaves = [x, routing.weight, *experts.parameters()]
    for own, other in zip(with_gradients(experts(x, routing), leaves), with_gradients(by_rows, leaves), strict=True):
        torch.testing.assert_close(own, other, atol=1e-12, rtol=0)


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("kind", [nn.ELU, nn.Hardswish, nn.Mish, nn.ReLU, nn.SiLU, nn.Dropout])
def test_activations_that_work_in_place(kind: Callable[..., nn.Module], glu: bool) -> None:
    x, routing = features(4, 4).requires_grad_(), routing_of(GATE)
    found = []
    for activation in (kind(), kind(inplace=True), nn.Sequential(kind(inplace=True))):
        torch.manual_seed(0)
        experts = MLPExperts(4, 6, 3, 3, activation=activation, glu=glu).double()
        found.append(with_gradients(experts(x, routing), [x, *experts.parameters()]))
    torch.testing.assert_close(found[1:], found[:1] * 2)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("elu", F.elu),
        ("gelu", F.gelu),
        ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
        ("identity", lambda x: x),
        ("leaky_relu", F.leaky_relu),
        ("relu", F.relu),
        ("silu", F.silu),
        ("tanh", torch.tanh),
    ],
)
def test_activations_by_name(name: str, function: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    experts = MLPExperts(4, 6, 3, 3, activation=name)
    torch.manual_seed(0)
    other = MLPExperts(4, 6, 3, 3, activation=lambda x: function(x))
    x, routing = torch.randn(4, 4), routing_of(GATE.float())
    torch.testing.assert_close(experts(x, routing), other(x, routing))


# What users put in


class LoRA(nn.Module):
    """A frozen layer of experts and a low-rank one beside it."""

    def __init__(self, base: LinearExperts) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = LinearExperts(base.in_features, 2, base.num_experts, bias=False)
        self.b = LinearExperts(2, base.out_features, base.num_experts, bias=False)

    def forward(self, x_PI: Tensor, offsets_E: Tensor) -> Tensor:
        return self.base(x_PI, offsets_E) + self.b(self.a(x_PI, offsets_E), offsets_E)


class Quantized(nn.Module):
    """Weights in int8, one scale an expert."""

    def __init__(self, base: LinearExperts) -> None:
        super().__init__()
        self.scale = base.weight.detach().abs().amax(dim=(1, 2), keepdim=True) / 127
        self.weight = (base.weight.detach() / self.scale).round().to(torch.int8)
        self.bias = base.bias

    def forward(self, x_PI: Tensor, offsets_E: Tensor) -> Tensor:
        layer = LinearExperts(self.weight.size(1), self.weight.size(2), len(offsets_E)).to(x_PI.dtype)
        layer.copy_(slice(None), self.weight * self.scale, self.bias)
        return layer(x_PI, offsets_E)


def put(name: str, part: Callable[[Any], Any]) -> Callable[[MLPExperts], Any]:
    """Put ``part`` of the old one in its place."""
    return lambda experts: setattr(experts, name, part(getattr(experts, name)))


REPLACED: dict[str, Callable[[MLPExperts], Any]] = {
    "LoRA up": put("up", LoRA),
    "LoRA down": put("down", LoRA),
    "quantized up": put("up", Quantized),
    "another module for dropout": put("hidden_dropout", lambda _: nn.Tanh()),
    "a hook on up": lambda experts: experts.up.register_forward_hook(lambda _, __, y: 2 * y + 1),
}


@pytest.mark.parametrize("replace", REPLACED.values(), ids=REPLACED)
def test_replaced_parts_run(replace: Callable[[MLPExperts], Any]) -> None:
    torch.manual_seed(0)
    experts, x, routing = MLPExperts(4, 6, 3, 3).eval(), torch.randn(4, 4), routing_of(GATE.float())
    before = experts(x, routing)
    replace(experts)
    rows, offsets = dispatch(x, routing), routing.offsets
    by_hand = experts.down(experts.hidden_dropout(experts.activation(experts.up(rows, offsets))), offsets)
    torch.testing.assert_close(experts(x, routing), combine(by_hand, routing))
    assert not torch.equal(experts(x, routing), before)


@pytest.mark.parametrize("part", ["hidden_dropout", "output_dropout"])
def test_a_dropout_in_training_mode_drops_at_evaluation(part: str) -> None:
    """Monte Carlo dropout."""
    experts, x, routing = MLPExperts(4, 64, 32, 3, dropout=0.5).eval(), torch.randn(4, 4), routing_of(GATE.float())
    assert torch.equal(experts(x, routing), experts(x, routing))
    experts.get_submodule(part).train()
    assert not torch.equal(experts(x, routing), experts(x, routing))


def test_a_backward_hook_is_called() -> None:
    experts, seen = MLPExperts(4, 6, 3, 3), list[torch.Size]()
    experts.up.register_full_backward_hook(lambda *args: seen.append(args[2][0].shape))
    experts(torch.randn(4, 4, requires_grad=True), routing_of(GATE.float())).sum().backward()
    assert seen == [(6, 6)]


# Construction


@pytest.mark.parametrize("bias", [True, False])
def test_initialized_as_separate_linears(bias: bool) -> None:
    torch.manual_seed(0)
    experts = LinearExperts(6, 4, 5, bias=bias)
    torch.manual_seed(0)
    for e in range(5):
        linear = nn.Linear(6, 4, bias=bias)
        assert torch.equal(experts.weight[e], linear.weight.T)
        if experts.bias is not None:
            assert torch.equal(experts.bias[e], linear.bias)
    assert (experts.bias is not None) == bias


def test_reset_parameters_draws_as_the_constructor() -> None:
    torch.manual_seed(3)
    experts = MLPExperts(4, 6, 3, 2)
    first = copy.deepcopy(experts.state_dict())
    experts.reset_parameters()
    assert not torch.equal(experts.up.weight, first["up.weight"])
    torch.manual_seed(3)
    experts.reset_parameters()
    assert all(torch.equal(value, first[name]) for name, value in experts.state_dict().items())


@pytest.mark.parametrize("bias", [True, False])
def test_experts_that_start_at_zero(bias: bool) -> None:
    """Drawn anew too, whether as a whole or part by part, the outer before the inner."""
    experts = MLPExperts(4, 5, 3, 2, bias=bias, zero_init=True)
    x, offsets = torch.randn(6, 4), torch.tensor([2, 6])
    assert not experts(x, offsets).any()
    for parts in ([experts], [experts, experts.up, experts.down]):
        for parameter in experts.parameters():
            nn.init.constant_(parameter, torch.nan)
        for part in parts:
            part.reset_parameters()
        assert experts.up.weight.any()
        assert not experts(x, offsets).any()


def test_dropout_drops_that_share_of_the_outputs() -> None:
    experts = MLPExperts(4, 64, 32, 1, dropout=(0.0, 0.5))
    x, offsets = torch.randn(8, 4), torch.tensor([8], dtype=torch.int32)
    assert 0.3 < (experts(x, offsets) == 0).float().mean().item() < 0.7
    assert not MLPExperts(4, 6, 3, 1, dropout=1.0)(x, offsets).any()


def test_repr() -> None:
    assert repr(LinearExperts(4, 3, 3)) == "LinearExperts(4, 3, num_experts=3)"


def test_experts_are_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Experts(4, 4, 2)  # type: ignore[abstract]


@pytest.mark.parametrize(
    ("build", "args", "kwargs", "argument"),
    [
        (LinearExperts, (0, 4, 2), {}, "in_features"),
        (LinearExperts, (4, 0, 2), {}, "out_features"),
        (LinearExperts, (4, 4, True), {}, "num_experts"),
        (LinearExperts, (4, 4, 3.0), {}, "num_experts"),
        (LinearExperts, (4, 4, 2), {"backend": "fast"}, "backend"),
        (MLPExperts, (4, 0, 4, 2), {}, "hidden_features"),
        (MLPExperts, (4, 8, 4, 2), {"activation": "swish"}, "activation"),
        (MLPExperts, (4, 8, 4, 2), {"dropout": 1.5}, "dropout"),
    ],
)
def test_bad_arguments(
    build: Callable[..., Experts], args: tuple[Any, ...], kwargs: dict[str, Any], argument: str
) -> None:
    with pytest.raises(ValueError, match=argument):
        build(*args, **kwargs)


@pytest.mark.parametrize("count", [np.int64(3), np.int32(3)])
def test_counts_may_be_numpys(count: Any) -> None:
    assert LinearExperts(count, count, count).weight.shape == (3, 3, 3)
