"""A perceptron an expert in one step equals gather, grouped products and scatter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gmoe import MLPExperts, MoE, TokenChoice, dispatch
from gmoe.dispatch import Backend
from gmoe.routed_mlp import routed_mlp
from tests.gmoe.conv.masked import features, routing_of


def gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(y, leaves, features(*y.shape, seed=9), retain_graph=True))


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 9),
    experts=st.integers(1, 4),
    activation=st.sampled_from(["gelu", "relu", "silu", "identity"]),
    glu=st.booleans(),
    bias=st.booleans(),
    share=st.sampled_from([0.0, 0.4, 1.0]),
    seed=st.integers(0, 99),
)
def test_equals_the_three_steps(
    tokens: int, experts: int, activation: str, glu: bool, bias: bool, share: float, seed: int
) -> None:
    torch.manual_seed(seed)
    mlp = MLPExperts(3, 5, 2, experts, activation=activation, glu=glu, bias=bias, backend="loop").double()
    x = features(tokens, 3, seed=seed).requires_grad_()
    chosen = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)) < share
    gate = (features(tokens, experts, seed=seed + 9) * chosen).requires_grad_()
    routing, leaves = routing_of(gate), [x, gate, *mlp.parameters()]
    ours, theirs = mlp.mix(x, routing), dispatch(x, routing, mlp)
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)
    for own, other in zip(gradients(ours, leaves), gradients(theirs, leaves), strict=True):
        torch.testing.assert_close(own, other, atol=1e-10, rtol=0)


@pytest.mark.parametrize("frozen", range(6))
def test_gradients_are_only_made_where_they_are_needed(frozen: int) -> None:
    torch.manual_seed(0)
    mlp, x, gate = MLPExperts(3, 5, 2, 4).double(), features(6, 3), features(6, 4, seed=1)
    leaves = [x, gate, *mlp.parameters()]
    for index, leaf in enumerate(leaves):
        leaf.requires_grad_(index != frozen)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    ours, theirs = mlp.mix(x, routing_of(gate)), dispatch(x, routing_of(gate), mlp)
    for own, other in zip(gradients(ours, wanted), gradients(theirs, wanted), strict=True):
        torch.testing.assert_close(own, other)


def runs_in_one_step(mlp: MLPExperts, monkeypatch: pytest.MonkeyPatch) -> bool:
    called = []

    def spy(*args: Any) -> Tensor:
        called.append(True)
        return routed_mlp(*args)

    monkeypatch.setattr("gmoe.experts.routed_mlp", spy)
    mlp.mix(torch.randn(5, 3), routing_of(torch.ones(5, 4)))
    monkeypatch.undo()
    return bool(called)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"activation": nn.GELU(approximate="tanh")}, True),
        ({"backend": "padded"}, False),
        ({"backend": "grouped"}, False),
        ({"dropout": 0.5}, False),
        ({"activation": nn.PReLU()}, False),  # its parameter would get no gradient
        ({"activation": nn.RReLU()}, False),  # it would draw anew in the backward pass
    ],
)
def test_only_what_can_be_applied_twice(
    options: dict[str, Any], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlp = MLPExperts(3, 5, 2, 4, **options)
    assert runs_in_one_step(mlp, monkeypatch) == expected
    if "dropout" in options:
        assert runs_in_one_step(mlp.eval(), monkeypatch)


@pytest.mark.parametrize("where", ["", "up"])
def test_hooks_are_called(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mlp, seen = MLPExperts(3, 5, 2, 4), list[int]()
    mlp.get_submodule(where).register_forward_hook(lambda _, args, __: seen.append(args[0].size(0)))
    assert not runs_in_one_step(mlp, monkeypatch)
    assert seen == [20]


def test_a_forward_of_ones_own_is_called() -> None:
    class Doubled(MLPExperts):
        def forward(self, x_PI: Tensor, offsets_E: Tensor) -> Tensor:
            return 2 * super().forward(x_PI, offsets_E)

    torch.manual_seed(0)
    plain, doubled = MLPExperts(3, 5, 2, 4), Doubled(3, 5, 2, 4)
    doubled.load_state_dict(plain.state_dict())
    x, routing = torch.randn(5, 3), routing_of(torch.ones(5, 4))
    torch.testing.assert_close(doubled.mix(x, routing), 2 * plain.mix(x, routing))


@pytest.mark.parametrize("backend", ["loop", "padded"])
def test_autocast(backend: Backend) -> None:
    torch.manual_seed(0)
    layer = MoE(TokenChoice(8, 3, k=2), MLPExperts(8, 16, 8, 3, backend=backend))
    x = torch.randn(2, 5, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), atol=0.02, rtol=0.05)
    y.float().square().sum().backward()
    assert {leaf.grad.dtype for leaf in (x, *layer.parameters()) if leaf.grad is not None} == {torch.float32}


def test_only_the_hidden_layer_is_kept() -> None:
    """No (P, I) or (P, O) tensor and only one of (P, H), in slices."""
    mlp, routing = MLPExperts(3, 50, 7, 4), routing_of(torch.ones(11, 4))
    kept: list[torch.Size] = []

    def pack(saved: Tensor) -> Tensor:
        kept.append(saved.shape)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        mlp.mix(torch.randn(11, 3, requires_grad=True), routing)
    assert [shape for shape in kept if shape[0] == 11 and len(shape) == 2] == [(11, 3), *[(11, 50)] * 4]


def test_types_that_do_not_match_are_refused() -> None:
    with pytest.raises(RuntimeError, match="dtype"):
        MLPExperts(3, 5, 2, 4).bfloat16().mix(torch.randn(5, 3), routing_of(torch.ones(5, 4)))
