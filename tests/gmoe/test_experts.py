"""Experts. Shapes: E experts, P pairs sorted by expert, I in, H hidden, O out features."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmoe import Experts, LinearExperts, MLPExperts, MoE, TokenChoice
from gmoe.dispatch import Backend
from tests.gmoe.reference import naive_expert

OFFSETS = torch.tensor([2, 2, 5], dtype=torch.int32)
OWNER = [0, 0, 2, 2, 2]

EXPERTS: dict[str, Callable[[], Experts]] = {
    "linear": lambda: LinearExperts(4, 3, 3),
    "linear-no_bias": lambda: LinearExperts(4, 3, 3, bias=False),
    "mlp": lambda: MLPExperts(4, 6, 3, 3),
    "mlp-glu": lambda: MLPExperts(4, 6, 3, 3, glu=True, activation="silu"),
    "mlp-no_bias": lambda: MLPExperts(4, 6, 3, 3, bias=False, activation="tanh"),
    "mlp-function": lambda: MLPExperts(4, 6, 3, 3, activation=torch.sin),
}
each = pytest.mark.parametrize("build", EXPERTS.values(), ids=EXPERTS)


@each
def test_equals_an_expert_at_a_time(build: Callable[[], Experts]) -> None:
    experts = build().double()
    x = torch.randn(5, 4, dtype=torch.float64)
    expected = torch.stack([naive_expert(experts, e, row) for e, row in zip(OWNER, x, strict=True)])
    torch.testing.assert_close(experts(x, OFFSETS), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("backend", ["loop", "padded", "grouped", "auto"])
@pytest.mark.parametrize("kind", [nn.ELU, nn.Hardswish, nn.LeakyReLU, nn.Mish, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Dropout])
def test_activations_that_work_in_place(kind: Callable[..., nn.Module], backend: Backend, glu: bool) -> None:
    activation = nn.Sequential(kind(inplace=True)).eval()
    for module in (activation, activation[0]):
        torch.manual_seed(0)
        experts = MLPExperts(4, 6, 3, 3, activation=module, glu=glu, backend=backend).double().eval()
        layer = MoE(TokenChoice(4, 3).double(), experts)
        x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
        out = layer(x)
        out.square().sum().backward()
        torch.manual_seed(0)
        experts = MLPExperts(4, 6, 3, 3, activation=kind().eval(), glu=glu, backend="padded").double().eval()
        other = MoE(TokenChoice(4, 3).double(), experts)
        x_other = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
        expected = other(x_other)
        expected.square().sum().backward()
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(x.grad, x_other.grad)
        for one, two in zip(layer.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(one.grad, two.grad)
    assert activation[0].inplace  # the user's own stays


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
def test_activations(name: str, function: Callable[[Tensor], Tensor]) -> None:
    experts = MLPExperts(2, 3, 2, 1, activation=name)
    x = torch.randn(4, 2)
    assert experts.up.bias is not None
    assert experts.down.bias is not None
    hidden = function(x @ experts.up.weight[0] + experts.up.bias[0])
    expected = hidden @ experts.down.weight[0] + experts.down.bias[0]
    torch.testing.assert_close(experts(x, torch.tensor([4], dtype=torch.int32)), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_initialised_as_separate_linears(bias: bool) -> None:
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
    torch.manual_seed(4)
    experts.reset_parameters()
    assert not torch.equal(experts.up.weight, first["up.weight"])
    torch.manual_seed(3)
    experts.reset_parameters()
    assert all(torch.equal(value, first[name]) for name, value in experts.state_dict().items())


def test_dropout_in_training_only() -> None:
    experts = MLPExperts(4, 64, 32, 1, dropout=0.5)
    x, offsets = torch.randn(8, 4), torch.tensor([8], dtype=torch.int32)
    dropped = (experts(x, offsets) == 0).float().mean().item()
    assert 0.3 < dropped < 0.7
    experts.eval()
    assert torch.equal(experts(x, offsets), experts(x, offsets))
    assert bool((experts(x, offsets) != 0).all())
    assert not MLPExperts(4, 6, 3, 1, dropout=1.0)(x, offsets).any()


@each
def test_copy_pickle_state_dict_and_repr(build: Callable[[], Experts]) -> None:
    experts, other, x = build(), build(), torch.randn(5, 4)
    other.load_state_dict(experts.state_dict())
    twins = [other, copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))]
    assert all(torch.equal(twin(x, OFFSETS), experts(x, OFFSETS)) for twin in twins)
    assert "num_experts=3" in repr(experts)


def test_experts_are_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Experts(4, 4, 2)  # type: ignore[abstract]


@pytest.mark.parametrize(
    ("build", "args", "kwargs", "message"),
    [
        (LinearExperts, (0, 4, 2), {}, "in_features: got 0, expected at least 1"),
        (LinearExperts, (4, 0, 2), {}, "out_features: got 0, expected at least 1"),
        (LinearExperts, (4, 4, 0), {}, "num_experts: got 0, expected at least 1"),
        (LinearExperts, (4, 4, 2), {"backend": "fast"}, "backend: got 'fast', expected one of 'auto', 'grouped'"),
        (MLPExperts, (4, 0, 4, 2), {}, "hidden_features: got 0, expected at least 1"),
        (MLPExperts, (4, 8, 4, 2), {"activation": "swish"}, "activation: got 'swish', expected one of 'elu', 'gelu'"),
        (MLPExperts, (4, 8, 4, 2), {"dropout": 1.5}, r"dropout: got 1.5, expected a probability in \[0, 1\]"),
        (MLPExperts, (4, 8, 4, 2), {"backend": "fast"}, "backend: got 'fast', expected one of 'auto', 'grouped'"),
    ],
)
def test_bad_arguments(
    build: Callable[..., Experts], args: tuple[int, ...], kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(*args, **kwargs)


@pytest.mark.parametrize("count", [np.int64(3), np.int32(3)])
def test_counts_may_be_numpys(count: Any) -> None:
    assert LinearExperts(count, count, count).weight.shape == (3, 3, 3)


@pytest.mark.parametrize("count", [True, 3.0, "3"])
def test_counts_are_whole_numbers(count: Any) -> None:
    with pytest.raises(ValueError, match=r"num_experts: got .*, expected a whole number"):
        LinearExperts(4, 3, count)
