"""Every road of the mixture of linear layers equals the formula.

Shapes: T tokens, E experts, P pairs sorted by expert, I in, O out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gmoe.products import Kernel
from gmoe.routed import routed_linear
from gmoe.routing import Routing
from tests.helpers.kernels import (
    Noted,
    check_second_and_third_gradients,
    gradients,
    kernel_is,
    routings,
)
from tests.helpers.masked import features, routing_of

each_kernel = pytest.mark.parametrize("kernel", get_args(Kernel))


@each_kernel
@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(0, 9),
    experts=st.integers(1, 4),
    widths=st.lists(st.integers(1, 8), min_size=1, max_size=3),
    bias=st.booleans(),
    share=st.sampled_from([0.0, 0.4, 1.0]),
    frozen=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_routed_linear_is_the_mixture(
    kernel: Kernel,
    tokens: int,
    experts: int,
    widths: list[int],
    bias: bool,
    share: float,
    frozen: int,
    seed: int,
) -> None:
    """Outputs, and gradients of all but a frozen input; the caller's tensors stay as they are."""
    chosen = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)) < share
    gate = (features(tokens, experts, seed=seed + 9) * chosen).requires_grad_(frozen < 5)
    shapes: list[tuple[int, ...]] = [(experts, 3)]
    shapes += [(tokens, width) for width in widths]
    shapes += [(experts, 3, width) for width in widths]
    values = [
        features(*shape, seed=seed + i).requires_grad_(i != frozen)
        for i, shape in enumerate(shapes)
    ]
    before = [value.detach().clone() for value in values]
    bias_EO, *rest = values
    parts, weights = rest[: len(widths)], rest[len(widths) :]
    with kernel_is(kernel):
        ours = routed_linear(parts, weights, bias_EO if bias else None, routing_of(gate))
    weight = torch.cat(weights, dim=2)
    of_each = torch.einsum("ti,eoi->teo", torch.cat(parts, dim=1), weight) + bias * bias_EO
    theirs = torch.einsum("te,teo->to", gate, of_each)
    # where a weight is no pair's, the formula's gradient is not zero
    leaves = [value for value in [*values, *([gate] if share == 1 else [])] if value.requires_grad]
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)
    torch.testing.assert_close(
        gradients(ours, leaves), gradients(theirs, leaves), atol=1e-10, rtol=0
    )
    torch.testing.assert_close(values, before, atol=0, rtol=0)


ROADS: dict[str, tuple[Kernel, int, int]] = {
    "all experts": ("loop", 2**16, 2**14),
    "at once": ("loop", 0, 2**14),
    "by expert": ("loop", 0, -1),
    "in blocks": ("padded", 0, -1),
    "by torch": ("grouped", 0, -1),
}
"""By name: the kernel, and the bounds of all experts at once and of all rows at once."""

each_road = pytest.mark.parametrize("road", ROADS)


def take(road: str, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Set the bounds of a road of ``routed_linear``, and give its kernel."""
    kernel, few, at_once = ROADS[road]
    monkeypatch.setattr("gmoe.routed.FEW_NUMBERS", few)
    monkeypatch.setattr("gmoe.routed.AT_ONCE", at_once)
    return kernel


@each_road
@pytest.mark.parametrize(("k", "has_bias"), [(1, True), (2, False)])
def test_second_and_third_gradients_are_those_of_the_mixture(
    road: str, k: int, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An expert without tokens has zero."""
    kernel = take(road, monkeypatch)
    expert_TK = (torch.arange(6)[:, None] + torch.arange(k)) % 3
    leaves = [features(6, k), features(6, 2), features(6, 1), features(4, 3, 2), features(4, 3, 1)]
    if has_bias:
        leaves.append(features(4, 3))
    for leaf in leaves:
        leaf.requires_grad_()

    def run(*leaves: Tensor) -> Any:
        gate, x, y, of_x, of_y = leaves[:5]
        bias = leaves[5] if has_bias else None
        routing = Routing.from_choices(expert_TK, gate.sigmoid(), num_experts=4)
        weights = [of_x.sin(), of_y]
        with kernel_is(kernel):
            return routed_linear([x.sin(), y], weights, bias, routing).square()

    check_second_and_third_gradients(run, leaves)


@each_road
@pytest.mark.parametrize(
    ("dtype", "k", "has_bias", "frozen"),
    [
        # Each tensor in turn that needs no gradient, and none of them.
        *((torch.float64, 2, True, frozen) for frozen in range(7)),
        (torch.float64, 1, False, 6),
        (torch.float32, 1, True, 6),
        (torch.float32, 3, False, 5),
    ],
    ids=str,
)
def test_each_road_gives_the_masked_mixture_of_two_parts(
    road: str,
    dtype: torch.dtype,
    k: int,
    has_bias: bool,
    frozen: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last expert has no token: its gradients are zero, not missing.

    The second part does not fill 16 bytes.
    """
    kernel = take(road, monkeypatch)
    expert_TK = torch.rand(40, 3, generator=torch.Generator().manual_seed(0)).topk(k).indices
    shapes = [(40, k), (40, 8), (40, 3), (4, 8, 8), (4, 8, 3), (4, 8)]
    leaves = [
        features(*shape, seed=i).to(dtype).requires_grad_(i != frozen)
        for i, shape in enumerate(shapes)
    ]
    weight_TK, x, y, *weights, bias_EO = leaves
    bias = bias_EO if has_bias else None
    used = [leaf for leaf in leaves if leaf.requires_grad and (has_bias or leaf is not bias_EO)]
    routing = Routing.from_choices(expert_TK, weight_TK, num_experts=4)
    with kernel_is(kernel):
        found = routed_linear([x, y], weights, bias, routing)
    of_each = torch.einsum("ti,eoi->teo", torch.cat([x, y], dim=1), torch.cat(weights, dim=2))
    gate_TE = torch.zeros(40, 4, dtype=dtype).scatter(1, expert_TK, weight_TK)
    expected = torch.einsum("te,teo->to", gate_TE, of_each + has_bias * bias_EO)
    near = 1e-12 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(
        [found, *gradients(found, used)],
        [expected, *gradients(expected, used)],
        atol=near,
        rtol=near,
    )


def test_rows_move_at_once_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """By expert, the second part of an expert's input is added to the first."""
    monkeypatch.setattr("gmoe.routed.FEW_NUMBERS", 0)
    chosen = torch.arange(120).view(40, 3) % 4
    routing = Routing.from_choices(chosen, features(40, 3), num_experts=4)
    parts, weights = [features(40, 5), features(40, 2)], [features(4, 5, 5), features(4, 5, 2)]
    of_expert = 40 * 3 * 7 // 4  # inputs of an expert's rows, on average
    for most in (of_expert, of_expert - 1):
        monkeypatch.setattr("gmoe.routed.AT_ONCE", most)
        with Noted() as noted:
            routed_linear(parts, weights, None, routing)
        assert ("addmm_" in noted.names) == (most < of_expert)


def test_few_numbers_run_all_experts_and_sort_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the bound, and not above it; nor where a token may have no expert, nor in float16."""
    x, weight = features(8, 3).float(), features(4, 5, 3).float()
    choices = torch.arange(8)[:, None] % 4, torch.ones(8, 1)

    def sorts(few: int, x: Tensor, routing: Routing) -> bool:
        monkeypatch.setattr("gmoe.routed.FEW_NUMBERS", few)
        routed_linear([x], [weight.to(x.dtype)], None, routing)
        return "token" in vars(routing)

    bound = 8 * 4 * (3 + 5)
    assert not sorts(bound, x, Routing.from_choices(*choices, num_experts=4))
    assert sorts(bound - 1, x, Routing.from_choices(*choices, num_experts=4))
    assert sorts(bound, x.half(), Routing.from_choices(*choices, num_experts=4))
    x[0] = torch.nan
    alone = routing_of(features(8, 4).float() * (torch.arange(8) > 0)[:, None])
    assert not routed_linear([x], [weight], None, alone)[0].any()


def test_routed_linear_is_of_the_type_of_its_weights() -> None:
    x, weight, routing = (
        features(5, 5).bfloat16(),
        features(2, 3, 5).float(),
        routing_of(torch.ones(5, 2)),
    )
    assert routed_linear([x], [weight], None, routing).dtype == torch.float32


@pytest.mark.parametrize("most", [2**14, -1], ids=["at once", "expert by expert"])
@pytest.mark.parametrize("which", [0, 1, 4], ids=["K=1", "K=3", "any number"])
def test_a_mixture_in_one_call_compiles(
    which: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own loop does not: in compiled code, the mixture is an operator."""
    monkeypatch.setattr("gmoe.routed.AT_ONCE", most)
    monkeypatch.setattr("gmoe.routed.FEW_NUMBERS", 0)
    routing = routings()[which]
    routing = replace(routing, weight=routing.weight.float())
    leaves = [torch.randn(*shape, requires_grad=True) for shape in ((9, 8), (4, 4, 8), (4, 4))]

    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return routed_linear([x], [weight], bias, routing)

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    outputs = [run(*leaves) for run in (compiled, layer)]
    found, expected = ([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))] for y in outputs)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("most", [2**14, -1], ids=["at once", "expert by expert"])
def test_tokens_of_one_pair_fetch_their_rows(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They get the same bits as tokens to which rows are added, and nothing is added to them."""
    monkeypatch.setattr("gmoe.routed.AT_ONCE", most)
    (one_each, *_) = routings()
    shapes = [(9, 5), (9, 2), (4, 5, 5), (4, 5, 2)]
    leaves = [features(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    x, neighbors, *experts = leaves
    bias = features(4, 5)  # whose gradient would be a sum over rows
    weight = features(9).requires_grad_()
    found = []
    for slot in (one_each.slot, None):
        routing = replace(one_each, weight=weight, slot=slot)
        with Noted() as noted:
            y = routed_linear([x, neighbors], experts, bias, routing)
            found.append([y, *gradients(y, [*leaves, weight])])
        assert ("index_add_" in noted.names) == (slot is None)
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
