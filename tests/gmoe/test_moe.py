"""MoE equals the definition, whatever router and experts. Shapes: T tokens, D width, E experts, K a token."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from gmoe import (
    AttentionVote,
    ExpertChoice,
    LinearExperts,
    MLPExperts,
    MoE,
    MultiCentroid,
    RandomRouter,
    Router,
    SoftMoE,
    SoftSlots,
    TokenChoice,
)
from tests.gmoe.reference import CASES, DTYPE, Case, assert_same_as_naive, graph_edges, group_lists

D, E = 5, 3


def test_equals_naive() -> None:
    """Ragged groups, of numbers with gaps; every router and input: in ``routers/test_router.py``."""
    torch.manual_seed(0)
    layer = MoE(ExpertChoice(D, E, normalize="tokens", capacity_factor=0.5), MLPExperts(D, 7, 4, E, glu=True)).to(DTYPE)
    assert_same_as_naive(layer, torch.randn(11, D, dtype=DTYPE), torch.tensor([5, 0, 5, 9, 0, 0, 5, 9, 9, 9, 2]))


def test_a_shared_expert_is_added() -> None:
    shared = nn.Linear(D, 4)
    layer, x = MoE(ExpertChoice(D, E), LinearExperts(D, 4, E), shared), torch.randn(2, 6, D)
    torch.testing.assert_close(layer(x), MoE(layer.router, layer.experts)(x) + shared(x))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_router_in_a_bfloat16_model(case: Case) -> None:
    torch.manual_seed(0)
    layer = MoE(case.build(D, E, 2, num_tokens=8), LinearExperts(D, 4, E)).bfloat16()
    x = torch.randn(8, D, dtype=torch.bfloat16)
    y, routing = layer(x, None, graph_edges(group_lists(x, None)), return_routing=True)
    (y.sum() + routing.aux_loss).backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("shape", [(7, D), (2, 3, 7, D), (1, D), (0, 7, D), (3, 0, D)], ids=str)
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    layer, x = MoE(ExpertChoice(D, E, k=2), MLPExperts(D, 7, 4, E)), torch.randn(shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], 4)
    groups = [layer(group) for group in x.view(math.prod(shape[:-2]), *shape[-2:])]
    torch.testing.assert_close(y.flatten(0, -2), torch.cat([y.new_zeros(0, 4), *groups]))


def test_costs_and_parameters() -> None:
    layer = MoE(ExpertChoice(D, E, k=2, capacity_factor=0.5), LinearExperts(D, 4, E))
    assert layer.experts_per_token == 1.0
    assert list(layer.routed_parameters()) == list(layer.experts.parameters())


def test_reset_parameters() -> None:
    layer = MoE(TokenChoice(D, E, balance="bias"), LinearExperts(D, 4, E), nn.Linear(D, 4))
    for _ in range(2):
        layer(torch.randn(7, D))
    before = copy.deepcopy(layer.state_dict())
    layer.reset_parameters()
    assert not any(torch.equal(value, before[name]) for name, value in layer.named_parameters())
    assert not any(value.any() for value in layer.buffers())


@pytest.mark.parametrize(
    ("build", "argument"),
    [
        (lambda: MoE(TokenChoice(D, E), LinearExperts(D, 4, 4)), "experts"),
        (lambda: MoE(TokenChoice(D, E), LinearExperts(6, 4, E)), "experts"),
        (lambda: MoE(SoftSlots(D, E), LinearExperts(D, 4, E)), "router"),
        (lambda: SoftMoE(SoftSlots(D, E), LinearExperts(D, 4, 4)), "experts"),
        (lambda: SoftMoE(TokenChoice(D, E), LinearExperts(D, 4, E)), "router"),  # type: ignore[arg-type]
    ],
)
def test_router_and_experts_must_fit(build: Callable[[], nn.Module], argument: str) -> None:
    with pytest.raises(ValueError, match=argument):
        build()


@pytest.mark.parametrize("router", [TokenChoice, ExpertChoice, AttentionVote, MultiCentroid, RandomRouter])
def test_a_dense_start_is_the_shared_expert_and_learns_from_the_second_step(router: type[Router]) -> None:
    torch.manual_seed(0)
    shared = nn.Linear(8, 6).double()
    layer = MoE(router(8, 4), MLPExperts(8, 7, 6, 4, zero_init=True), shared).double()
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
