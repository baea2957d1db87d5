"""Every kernel equals the formula.

Shapes: T tokens, E experts, P pairs sorted by expert, I in, H hidden, O out.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gmoe import grouped_linear
from gmoe.places import ToPairs, ToTokens
from gmoe.products import (
    Backend,
    _kernel_for,
    grouped_outer_product,
    grouped_product,
    kernel_of,
    routed_linear,
)
from gmoe.routing import Routing
from tests.helpers.kernels import Noted, ends, gradients, routings
from tests.helpers.masked import features, routing_of

each_backend = pytest.mark.parametrize("backend", get_args(Backend))


@pytest.mark.parametrize(
    ("loads", "width", "out"),
    [
        ([3, 0, 2, 4], 7, 5),
        ([0, 0, 5, 0], 8, 8),
        ([0, 0, 0, 0], 7, 5),
        ([4, 0, 2], 1433, 7),
        ([1, 3], 1, 1433),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@each_backend
def test_a_row_meets_its_expert(
    backend: Backend, dtype: torch.dtype, loads: list[int], width: int, out: int
) -> None:
    """The reference is float64 on the same rounded numbers.

    ``grouped_mm`` refuses rows that are not a multiple of 16 bytes, and the strides of 0 that the
    gradient of a sum has.
    """
    x, weight, bias = (
        features(sum(loads), width),
        features(len(loads), width, out, seed=1),
        features(len(loads), out),
    )
    leaves = [value.to(dtype).requires_grad_() for value in (x, weight / width**0.5, bias)]
    y = grouped_linear(leaves[0], leaves[1], leaves[2], ends(loads), backend)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expert = torch.arange(len(loads)).repeat_interleave(torch.tensor(loads))
    expected = torch.einsum("pi,pio->po", exact[0], exact[1][expert]) + exact[2][expert]
    tolerance = {torch.float64: 1e-10, torch.float32: 3e-4, torch.bfloat16: 0.15}[dtype]
    ours = [y, *gradients(y, leaves), *torch.autograd.grad(y.sum(), leaves)]
    theirs = [expected, *gradients(expected, exact), *torch.autograd.grad(expected.sum(), exact)]
    assert {value.dtype for value in ours} == {dtype}
    torch.testing.assert_close(
        [value.double() for value in ours], theirs, atol=tolerance, rtol=tolerance / 10
    )


@each_backend
def test_autocast_as_in_linear(backend: Backend) -> None:
    x, weight, bias = torch.randn(4, 7), torch.randn(2, 7, 5), torch.randn(2, 5)
    plain = grouped_linear(x, weight, bias, ends([1, 3]), backend)
    with torch.autocast("cpu", torch.bfloat16):
        low = grouped_linear(x, weight, bias, ends([1, 3]), backend)
        double = grouped_linear(x.double(), weight.double(), bias.double(), ends([1, 3]), backend)
    assert (plain.dtype, low.dtype, double.dtype) == (torch.float32, torch.bfloat16, torch.float64)
    torch.testing.assert_close(low.float(), plain, atol=0.1, rtol=0.05)
    torch.testing.assert_close(double.float(), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_biases_are_summed_in_float32(dtype: torch.dtype) -> None:
    """A sum of ones in bfloat16 stops at 256."""
    weight, bias, rows = (
        torch.zeros(2, 4, 4, dtype=dtype),
        torch.zeros(2, 4, dtype=dtype, requires_grad=True),
        1000,
    )
    with torch.autocast("cpu", torch.bfloat16):
        x, offsets = torch.ones(rows, 4, dtype=dtype), torch.tensor([rows, rows], dtype=torch.int32)
        grouped_linear(x, weight, bias, offsets).sum().backward()
    assert bias.grad is not None
    assert bias.grad.tolist() == [[rows] * 4, [0] * 4]


@pytest.mark.parametrize(
    ("dtype", "width", "out", "is_own"),
    [
        (torch.float32, 8, 4, True),
        (torch.float32, 8, 7, False),  # columns of the weights would be padded
        (torch.float32, 7, 8, False),  # so would those of the rows
        (torch.bfloat16, 16, 8, True),
        (torch.bfloat16, 16, 4, False),
        (torch.float64, 8, 8, False),  # torch's kernel refuses it
    ],
    ids=str,
)
@pytest.mark.parametrize("number", [1, 20_000], ids=str)
def test_torchs_own_loop_takes_rows_that_need_no_padding_however_many(
    dtype: torch.dtype, width: int, out: int, is_own: bool, number: int
) -> None:
    loads = [3 * number, 0, 4 * number, number]
    x, weight = features(sum(loads), width).to(dtype), features(4, width, out).to(dtype)
    grad = features(sum(loads), out).to(dtype)
    for product in (
        lambda: grouped_product(x, weight, ends(loads), "loop"),
        lambda: grouped_product(grad, weight.transpose(1, 2), ends(loads), "loop"),
        lambda: grouped_outer_product(x, grad, ends(loads), "loop"),
    ):
        with Noted() as noted:
            product()
        assert ("_grouped_mm" in noted.names) == is_own
        assert ("mm" in noted.names) == (not is_own)


@each_backend
@pytest.mark.parametrize(
    "weight",
    [
        features(2, 8, 16)[..., ::2],
        features(2, 8, 9)[..., 1:],
        features(2, 1, 8).expand(2, 8, 8),
        features(8, 8, 2).permute(2, 0, 1),
    ],
    ids=["a gap behind each number", "a part of rows", "one row", "experts last"],
)
def test_weights_may_lie_in_any_way(backend: Backend, weight: Tensor) -> None:
    """torch's own loop wants rows or columns side by side, each from a multiple of 16 bytes."""
    x, weight = features(5, 8).float(), weight.float()

    def output_and_gradient(leaf: Tensor) -> list[Tensor]:
        y = grouped_linear(x, leaf, None, ends([3, 2]), backend)
        return [y, *gradients(y, [leaf])]

    found = output_and_gradient(weight.requires_grad_())
    expected = output_and_gradient(weight.detach().contiguous().requires_grad_())
    torch.testing.assert_close(found, expected)


# without a host sync ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "dtype", "kernel"),
    [
        (None, torch.float32, "loop"),  # no CUDA device
        (None, torch.bfloat16, "loop"),
        ((9, 0), torch.bfloat16, "grouped"),
        ((10, 3), torch.bfloat16, "grouped"),
        ((9, 0), torch.float32, "padded"),  # for these torch reads the offsets
        ((9, 0), torch.float16, "padded"),
        ((9, 0), torch.float64, "padded"),
        ((8, 0), torch.bfloat16, "padded"),
        ((8, 9), torch.float32, "padded"),
        ((12, 0), torch.bfloat16, "padded"),
        ((0, 0), torch.bfloat16, "padded"),  # another accelerator
    ],
    ids=str,
)
def test_on_cuda_auto_is_what_waits_for_nothing(
    capability: tuple[int, int] | None, dtype: torch.dtype, kernel: str
) -> None:
    assert kernel_of(dtype, capability) == kernel


@pytest.mark.parametrize(
    ("device", "kernel"),
    [("cpu", "loop"), ("meta", "loop"), ("xpu", "padded"), ("mps", "padded")],
)
def test_off_the_cpu_auto_does_not_wait(device: str, kernel: str) -> None:
    like: Any = SimpleNamespace(device=torch.device(device), is_cuda=False, dtype=torch.float32)
    assert _kernel_for(like, "auto") == kernel


def test_no_sum_on_cuda_is_by_atomic_adds() -> None:
    """``index_add`` on CUDA adds in any order: each run would give other last digits."""
    x, weight, bias = (
        torch.randn(*shape, requires_grad=True) for shape in ((9, 5), (4, 5, 5), (4, 5))
    )
    for routing in routings():
        with Noted() as noted:
            rows = ToPairs.apply(x[: routing.num_tokens], routing.token, routing.place)
            y = grouped_linear(rows, weight, bias, routing.offsets, "padded")
            ToTokens.apply(y, routing.token, routing.place, routing.num_tokens).sum().backward()
        assert "bmm" in noted.names
        assert not noted.names & {
            "index_add",
            "index_add_",
            "scatter_add",
            "scatter_add_",
            "_local_scalar_dense",
        }


@pytest.mark.parametrize("routing", routings()[1::3], ids=["K=3", "any number"])
def test_what_runs_on_cuda_compiles_as_one_graph(routing: Routing) -> None:
    leaves = [features(*shape).requires_grad_() for shape in ((9, 3), (4, 3, 5), (4, 5))]

    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = ToPairs.apply(x, routing.token, routing.place)
        y = grouped_linear(rows, weight, bias, routing.offsets, "padded")
        return ToTokens.apply(y, routing.token, routing.place, routing.num_tokens)

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    outputs = [run(*leaves) for run in (compiled, layer)]
    found, expected = ([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))] for y in outputs)
    torch.testing.assert_close(found, expected)


def test_an_unknown_backend_is_refused() -> None:
    backend: Any = "fast"
    with pytest.raises(
        ValueError, match=r"^offsets: got shape \(2,\), expected one end for each of 3"
    ):
        grouped_linear(torch.ones(4, 5), torch.ones(3, 5, 2), None, torch.tensor([2, 4]))
    with pytest.raises(ValueError, match=r"^backend: got 'fast', expected one of 'auto'"):
        grouped_linear(torch.ones(1, 2), torch.ones(1, 2, 2), None, ends([1]), backend)


# from tokens to tokens ----------------------------------------------------------------------------


@each_backend
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
    backend: Backend,
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
    ours = routed_linear(parts, weights, bias_EO if bias else None, routing_of(gate), backend)
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


ROADS: dict[str, tuple[Backend, int, int]] = {
    "all experts": ("auto", 2**16, 2**14),
    "at once": ("auto", 0, 2**14),
    "by expert": ("loop", 0, -1),
    "in blocks": ("padded", 0, -1),
    "by torch": ("grouped", 0, -1),
}
"""By name: the backend, and the bounds of all experts at once and of all rows at once."""

each_road = pytest.mark.parametrize("road", ROADS)


def take(road: str, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Take a road of ``routed_linear``, by its backend and bounds."""
    backend, few, at_once = ROADS[road]
    monkeypatch.setattr("gmoe.products.FEW_NUMBERS", few)
    monkeypatch.setattr("gmoe.products.AT_ONCE", at_once)
    return backend


@each_road
@pytest.mark.parametrize(("k", "has_bias"), [(1, True), (2, False)])
def test_second_and_third_gradients_are_those_of_the_mixture(
    road: str, k: int, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An expert without tokens has zero."""
    backend = take(road, monkeypatch)
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
        return routed_linear([x.sin(), y], weights, bias, routing, backend).square()

    def differentiate(*leaves: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(*leaves).sum(), leaves, create_graph=True)

    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(differentiate, leaves, fast_mode=True)


@each_road
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_each_road_gives_the_masked_mixture_of_two_parts(
    road: str, k: int, has_bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last expert has no token: its gradients are zero, not missing."""
    backend = take(road, monkeypatch)
    expert_TK = torch.rand(40, 3, generator=torch.Generator().manual_seed(0)).topk(k).indices
    shapes = [(40, k), (40, 8), (40, 4), (4, 8, 8), (4, 8, 4), (4, 8)]
    leaves = [features(*shape, seed=i).to(dtype).requires_grad_() for i, shape in enumerate(shapes)]
    weight_TK, x, y, *weights, bias_EO = leaves
    used = leaves if has_bias else leaves[:-1]
    routing = Routing.from_choices(expert_TK, weight_TK, num_experts=4)
    found = routed_linear([x, y], weights, bias_EO if has_bias else None, routing, backend)
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


def test_few_numbers_run_all_experts_and_sort_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the bound, and not above it; nor where a token may have no expert, nor in float16."""
    x, weight = features(8, 3).float(), features(4, 5, 3).float()
    choices = torch.arange(8)[:, None] % 4, torch.ones(8, 1)

    def sorts(few: int, x: Tensor, routing: Routing) -> bool:
        monkeypatch.setattr("gmoe.products.FEW_NUMBERS", few)
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


@pytest.mark.parametrize(
    ("dtype", "bias", "frozen", "k"),
    [
        # Each input in turn that needs no gradient, and none of them.
        *((torch.float64, True, frozen, 3) for frozen in range(7)),
        (torch.float64, False, 6, 1),
        (torch.float32, True, 6, 1),
        (torch.float32, False, 5, 3),
    ],
    ids=str,
)
def test_rows_that_move_at_once_give_what_the_loop_gives(
    dtype: torch.dtype, bias: bool, frozen: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an expert without rows and of widths that do not fill 16 bytes, too."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(40, 3, generator=generator).topk(k).indices
    routing = Routing.from_choices(chosen, features(40, k).to(dtype), num_experts=4)
    shapes = [(40, 5), (40, 2), (4, 5, 5), (4, 5, 2), (4, 5), (40 * k,)]
    leaves = [
        features(*shape, seed=i).to(dtype).requires_grad_(i != frozen)
        for i, shape in enumerate(shapes)
    ]
    parts, weights = leaves[:2], leaves[2:4]
    bias_EO, gate = leaves[4:]
    routing = replace(routing, weight=gate)
    found = []
    of_expert = 40 * k * 7 // 4  # inputs of an expert's rows, on average
    for most in (of_expert, of_expert - 1):
        monkeypatch.setattr("gmoe.products.AT_ONCE", most)
        with Noted() as noted:
            y = routed_linear(parts, weights, bias_EO if bias else None, routing)
            found.append([y, *gradients(y, [leaf for leaf in leaves if leaf.requires_grad])])
        assert ("addmm_" in noted.names) == (
            most < of_expert
        )  # the second part of an expert's input
    near = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(*found, atol=near, rtol=near)


@pytest.mark.parametrize("most", [2**14, -1], ids=["at once", "expert by expert"])
@pytest.mark.parametrize("which", [0, 1, 4], ids=["K=1", "K=3", "any number"])
def test_a_mixture_in_one_call_compiles(
    which: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own loop does not: in compiled code, the mixture is an operator."""
    monkeypatch.setattr("gmoe.products.AT_ONCE", most)
    monkeypatch.setattr("gmoe.products.FEW_NUMBERS", 0)
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
    monkeypatch.setattr("gmoe.products.AT_ONCE", most)
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
