"""MoE beside its router and experts; that it equals the definition: in ``routers/test_base.py``.

Shapes: T tokens, D width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gmoe import (
    ExpertChoice,
    LinearExperts,
    MLPExperts,
    MoE,
    SoftMoE,
    SoftSlots,
    TokenChoice,
)
from gmoe.routers import build_router

D, E = 5, 3


@pytest.mark.parametrize("layer", [MoE, SoftMoE])
def test_what_is_no_experts_is_refused(layer: Any) -> None:
    slots: Any = SoftSlots if layer is SoftMoE else ExpertChoice
    with pytest.raises(ValueError, match=r"^experts: got ModuleList, expected gmoe\.Experts"):
        layer(slots(D, num_experts=E), nn.ModuleList([nn.Linear(D, 4)] * E))


def test_a_routing_is_replayed_without_asking_the_router() -> None:
    layer = MoE(ExpertChoice(D, num_experts=E), LinearExperts(D, 4, num_experts=E))
    x, other = torch.randn(2, 6, D), torch.randn(2, 6, D)
    y, routing = layer(x, return_routing=True)
    layer.router.forward = None
    replayed, given = layer(x, routing=routing, return_routing=True)
    assert torch.equal(replayed, y)
    assert given is routing
    expected = layer.experts(other.flatten(0, 1), routing).view(2, 6, 4)
    assert torch.equal(layer(other, routing=routing), expected)


def test_a_routing_of_other_tokens_or_experts_is_refused() -> None:
    layer = MoE(TokenChoice(D, num_experts=E), LinearExperts(D, 4, num_experts=E))
    x = torch.randn(6, D)
    for routing, got in (
        (layer.router(x[:5]), "5 tokens, 3 experts"),
        (TokenChoice(D, num_experts=4)(x), "6 tokens, 4 experts"),
        (torch.ones(6, E), "tensor"),
        (SoftSlots(D, num_experts=E, slots=2)(x), "SoftRouting"),
    ):
        with pytest.raises(
            ValueError, match=rf"^routing: got (?s:.*){got}(?s:.*), expected a Routing of 6 tokens"
        ):
            layer(x, routing=routing)


@pytest.mark.parametrize(
    ("build", "argument"),
    [
        (lambda: MoE(TokenChoice(D, num_experts=E), LinearExperts(D, 4, num_experts=4)), "experts"),
        (lambda: MoE(TokenChoice(D, num_experts=E), LinearExperts(6, 4, num_experts=E)), "experts"),
        (lambda: MoE(SoftSlots(D, num_experts=E), LinearExperts(D, 4, num_experts=E)), "router"),
        (
            lambda: MoE("random", LinearExperts(D, 4, num_experts=E)),  # type: ignore[arg-type]
            "router: got 'random', expected an instance",
        ),
        (
            lambda: SoftMoE(SoftSlots(D, num_experts=E), LinearExperts(D, 4, num_experts=4)),
            "experts",
        ),
        (
            lambda: SoftMoE(
                TokenChoice(D, num_experts=E),  # type: ignore[arg-type]
                LinearExperts(D, 4, num_experts=E),
            ),
            "router",
        ),
    ],
)
def test_router_and_experts_must_fit(build: Callable[[], nn.Module], argument: str) -> None:
    with pytest.raises(ValueError, match=argument):
        build()


@pytest.mark.parametrize(
    "router", ["token_choice", "expert_choice", "attention_vote", "multi_centroid", "random"]
)
def test_a_dense_start_is_the_shared_expert_and_learns_from_the_second_step(router: str) -> None:
    torch.manual_seed(0)
    shared = nn.Linear(8, 6).double()
    layer = MoE(
        build_router(router, 8, num_experts=4, k=1),
        MLPExperts(8, 7, 6, num_experts=4, zero_init=True),
        shared,
    ).double()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.randn(3, 20, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), shared(x), rtol=0, atol=1e-10)
    layer.reset_parameters()
    torch.testing.assert_close(layer(x), shared(x), rtol=0, atol=1e-10)
    for _ in range(2):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
    learned = {name: p.grad for name, p in layer.named_parameters()}
    assert all(grad is not None and grad.any() for grad in learned.values()), learned


def test_a_reset_reaches_the_linear_layers_of_a_shared_mlp() -> None:
    shared = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3))
    layer = MoE(TokenChoice(4, num_experts=2), MLPExperts(4, 6, 3, num_experts=2), shared)
    for parameter in layer.parameters():
        nn.init.constant_(parameter, torch.nan)
    layer.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in layer.parameters())


def test_a_layer_without_a_router_takes_the_decisions_of_its_calls() -> None:
    experts = MLPExperts(4, 6, 3, num_experts=2)
    router = TokenChoice(4, num_experts=2)
    x = torch.randn(5, 4)
    routing = router(x)
    layer = MoE(None, experts)
    assert torch.equal(layer(x, routing=routing), MoE(router, experts)(x, routing=routing))
    with pytest.raises(ValueError, match=r"^routing: got None, expected a Routing"):
        layer(x)
    with pytest.raises(ValueError, match=r"^routing: got .*, expected a Routing of 4 tokens"):
        layer(x[:4], routing=routing)
