"""A linear layer an expert in one step equals gather, grouped product and scatter; a router's view is kept once."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gmoe import MoEConv, dispatch, grouped_linear
from gmoe.conv.seen import joined
from gmoe.routed_linear import routed_linear
from tests.gmoe.conv.masked import features, random_graph, routing_of


def gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(y, leaves, features(*y.shape, seed=9), retain_graph=True))


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 9),
    experts=st.integers(1, 4),
    widths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    bias=st.booleans(),
    share=st.sampled_from([0.0, 0.4, 1.0]),
    seed=st.integers(0, 99),
)
def test_equals_the_three_steps(
    tokens: int, experts: int, widths: list[int], bias: bool, share: float, seed: int
) -> None:
    parts = [features(tokens, width, seed=seed + i).requires_grad_() for i, width in enumerate(widths)]
    weight = features(experts, sum(widths), 3, seed=seed + 7).requires_grad_()
    bias_EO = features(experts, 3, seed=seed + 8).requires_grad_() if bias else None
    chosen = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)) < share
    gate = (features(tokens, experts, seed=seed + 9) * chosen).requires_grad_()
    leaves = [*parts, weight, gate, *([bias_EO] if bias_EO is not None else [])]
    routing = routing_of(gate)
    ours = routed_linear(parts, weight, bias_EO, routing)
    theirs = dispatch(
        torch.cat(parts, dim=1), routing, lambda x, offsets: grouped_linear(x, weight, bias_EO, offsets, "padded")
    )
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)
    for own, other in zip(gradients(ours, leaves), gradients(theirs, leaves), strict=True):
        torch.testing.assert_close(own, other, atol=1e-10, rtol=0)


@pytest.mark.parametrize("frozen", range(4))
def test_gradients_are_only_made_where_they_are_needed(frozen: int) -> None:
    parts, weight, bias = [features(5, 2)], features(3, 2, 4, seed=1), features(3, 4, seed=2)
    gate = features(5, 3, seed=3)
    leaves = [parts[0], weight, bias, gate]
    wanted = [leaf.requires_grad_() for i, leaf in enumerate(leaves) if i != frozen]
    y = routed_linear(parts, weight, bias, routing_of(gate))
    expected = torch.einsum("te,teo->to", gate, torch.einsum("ti,eio->teo", parts[0], weight) + bias)
    torch.testing.assert_close(y, expected)
    for own, other in zip(gradients(y, wanted), gradients(expected, wanted), strict=True):
        torch.testing.assert_close(own, other)


def test_follows_autocast_and_takes_mixed_parts() -> None:
    gate = torch.ones(5, 2)
    weight = features(2, 5, 3).float().requires_grad_()
    parts = [features(5, 2).float(), features(5, 3).bfloat16()]
    with torch.autocast("cpu", torch.bfloat16):
        y = routed_linear(parts, weight, None, routing_of(gate))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert routed_linear(parts, weight, None, routing_of(gate)).dtype == torch.float32


def test_what_the_router_sees_is_not_kept_twice() -> None:
    columns = [features(6, 3).requires_grad_() * 2, features(6, 2, seed=1).requires_grad_() * 2]
    weight = features(5, 4, seed=2).requires_grad_()
    plain = gradients(torch.cat(columns, dim=1).sigmoid() @ weight, [*columns, weight])
    with joined(columns) as view:
        y = torch.cat(columns, dim=1).sigmoid() @ weight + 0 * (view @ weight)
        z = view @ weight
        seen = weakref.ref(view)
    del view
    gc.collect()
    assert seen() is None
    torch.testing.assert_close(gradients(y, [*columns, weight]), plain)
    expected = gradients(torch.cat(columns, dim=1) @ weight, [*columns, weight])
    torch.testing.assert_close(gradients(z, [*columns, weight]), expected)


def test_a_change_in_place_is_noticed() -> None:
    columns = [features(6, 3), features(6, 2, seed=1)]
    weight = features(5, 4, seed=2).requires_grad_()
    with joined(columns) as view:
        y = view @ weight
    columns[0].add_(1)
    with pytest.raises(RuntimeError, match="x: changed in place after a router saw it"):
        y.sum().backward()


@pytest.mark.parametrize("router_input", ["input", "both"])
def test_a_router_that_changes_before_the_backward_pass_is_noticed(router_input: Any) -> None:
    conv = MoEConv("gcn", 4, 4, num_experts=3, k=2, router_input=router_input).double()
    x = features(9, 4).requires_grad_()
    loss = conv(x, random_graph(9, 9, 30)).square().sum()
    assert conv.router is not None
    with torch.no_grad():
        conv.router.get_parameter("gate.weight").mul_(2)  # as an optimizer does
    with pytest.raises(RuntimeError, match=r"in.?place"):
        loss.backward()


@pytest.mark.parametrize("conv", ["gcn", "gat", "gatv2", "mlp"])
def test_second_order_gradients_are_refused(conv: str) -> None:
    layer = MoEConv(conv, 4, 4, num_experts=3).double()
    x = features(9, 4).requires_grad_()
    with pytest.raises(RuntimeError, match="create_graph: got True, expected False"):
        torch.autograd.grad(layer(x, random_graph(9, 9, 30)).sum(), x, create_graph=True)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("router", ["token_choice", "expert_choice", "multi_centroid", "attention_vote"])
def test_nothing_is_left_of_a_step(router: Any, backward: bool) -> None:
    """Hooks on saved tensors can make the graph keep itself alive, where no garbage collector sees it."""
    conv = MoEConv("gcn", 4, 4, num_experts=3, router=router, router_input=("both", "degree")).double()
    x = features(9, 4).requires_grad_()
    y = conv(x, random_graph(9, 9, 30))
    if backward:
        y.sum().backward()
    kept = weakref.ref(x)
    del x, y
    gc.collect()
    assert kept() is None
