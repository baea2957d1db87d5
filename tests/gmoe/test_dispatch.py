"""Every kernel equals the formula.

Shapes: T tokens, E experts, P pairs sorted by expert, I in, H hidden, O out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gmoe import grouped_linear
from gmoe.dispatch import (
    AT_ONCE,
    FEW,
    FEW_ROWS,
    Backend,
    _grouped_linear,
    _grouped_linear_weight,
    _is_between,
    is_few,
    kernel_of,
    routed_linear,
)
from gmoe.places import ToPairs, ToTokens, places_of
from gmoe.routing import Routing
from tests.gmoe.conv.masked import features, routing_of

each_backend = pytest.mark.parametrize("backend", get_args(Backend))


def ends(loads: Sequence[int]) -> Tensor:
    return torch.tensor(loads).cumsum(0).to(torch.int32)


def gradients(y: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    cotangent = features(*y.shape, seed=9).to(y.dtype)
    found = torch.autograd.grad(
        y, leaves, cotangent, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return list(found)


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


@each_backend
def test_strided_rows(backend: Backend) -> None:
    x, weight = torch.randn(7, 4).T, torch.randn(2, 5, 7).transpose(1, 2)
    expected = grouped_linear(x.contiguous(), weight.contiguous(), None, ends([1, 3]), "loop")
    torch.testing.assert_close(grouped_linear(x, weight, None, ends([1, 3]), backend), expected)


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
    shapes = [(experts, sum(widths), 3), (experts, 3), *((tokens, width) for width in widths)]
    values = [
        features(*shape, seed=seed + i).requires_grad_(i != frozen)
        for i, shape in enumerate(shapes)
    ]
    before = [value.detach().clone() for value in values]
    weight, bias_EO, *parts = values
    ours = routed_linear(parts, weight, bias_EO if bias else None, routing_of(gate), backend)
    of_each = torch.einsum("ti,eio->teo", torch.cat(parts, dim=1), weight) + bias * bias_EO
    theirs = torch.einsum("te,teo->to", gate, of_each)
    # where a weight is no pair's, the formula's gradient is not zero
    leaves = [value for value in [*values, *([gate] if share == 1 else [])] if value.requires_grad]
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)
    torch.testing.assert_close(
        gradients(ours, leaves), gradients(theirs, leaves), atol=1e-10, rtol=0
    )
    torch.testing.assert_close(values, before, atol=0, rtol=0)


def test_routed_linear_is_of_the_type_of_its_weights() -> None:
    x, weight, routing = (
        features(5, 5).bfloat16(),
        features(2, 5, 3).float(),
        routing_of(torch.ones(5, 2)),
    )
    assert routed_linear([x], weight, None, routing).dtype == torch.float32


@pytest.mark.parametrize("backend", ["loop", "padded"])
def test_operators_keep_torchs_rules(backend: Backend) -> None:
    """Schema, fake kernel, tracing: what ``torch.compile`` needs."""
    offsets, weight = ends([1, 0, 9, 2]), features(4, 3, 5)
    rows, y = features(12, 3), features(12, 5)
    parts, token, gate, bias = (
        [features(20, 1), features(20, 2)],
        torch.arange(12),
        features(12),
        features(4, 5),
    )
    values = (weight, bias, gate, parts, token, offsets)
    needs = [True, False, True, True, True]
    one_each = ([part[:12] for part in parts], token, offsets, token.flip(0))
    calls: dict[str, list[tuple[Any, ...]]] = {
        "grouped_linear": [(rows, weight, offsets, backend)],
        "grouped_linear_weight": [(rows, y, offsets, backend)],
        "routed_linear": [
            (*values, None, True),
            (weight, bias, gate, *one_each, True),
            (weight, bias, gate, *one_each, False),
        ],
        "routed_linear_backward": [
            (features(20, 5), y, *values, None, needs),
            (features(12, 5), y, weight, bias, gate, *one_each, needs),
        ],
    }
    for name, inputs in calls.items():
        for args in inputs:
            torch.library.opcheck(getattr(torch.ops.gmoe, name).default, args)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", range(6))
def test_rows_that_move_at_once_give_what_the_loop_gives(
    dtype: torch.dtype, bias: bool, frozen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an expert without rows and of widths that do not fill 16 bytes, too."""
    generator = torch.Generator().manual_seed(0)
    chosen, weights = torch.randint(3, (40, 1), generator=generator), features(40, 1).to(dtype)
    routing = Routing.from_choices(chosen, weights, num_experts=4)
    shapes = [(40, 5), (40, 2), (4, 7, 5), (4, 5), (40,)]
    leaves = [
        features(*shape, seed=i).to(dtype).requires_grad_(i != frozen)
        for i, shape in enumerate(shapes)
    ]
    *parts, weight, bias_EO, gate = leaves
    routing = replace(routing, weight=gate)
    found = []
    for products in (0, 2**30):
        monkeypatch.setitem(AT_ONCE, "products", products)
        y = routed_linear(parts, weight, bias_EO if bias else None, routing)
        assert ("AtOnce" in str(y.grad_fn)) == (products == 0)
        found.append([y, *gradients(y, [leaf for leaf in leaves if leaf.requires_grad])])
        monkeypatch.setitem(FEW, "rows", -1)
    near = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(*found, atol=near, rtol=near)


def test_rows_that_move_at_once_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own loop does not: in compiled code, the product is an operator."""
    monkeypatch.setitem(AT_ONCE, "products", 0)
    monkeypatch.setitem(FEW_ROWS, "rows", -1)
    (one_each, *_) = routings()
    routing = replace(one_each, weight=one_each.weight.float())
    leaves = [torch.randn(*shape, requires_grad=True) for shape in ((9, 8), (4, 8, 4), (4, 4))]

    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return routed_linear([x], weight, bias, routing)

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found, expected = ([y, *gradients(y, leaves)] for y in (compiled(*leaves), layer(*leaves)))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_tokens_of_one_pair_fetch_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """They get the same bits as tokens to which rows are added, and nothing is added to them."""
    monkeypatch.setitem(FEW, "rows", -1)
    (one_each, *_) = routings()
    shapes = [(9, 5), (9, 2), (4, 7, 5), (4, 5)]
    leaves = [features(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    x, neighbors, experts, bias = leaves
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
    ("tokens", "shape", "few"),
    [
        (30, (8, 16, 16), True),
        (30, (64, 64, 64), True),
        (1_000, (8, 16, 16), True),
        (2_708, (8, 64, 64), False),
        (8_192, (8, 64, 1), False),  # few outputs: writing the rows is the work
        (1_000, (256, 512, 1), False),  # nor a gigabyte of rows
        (200, (1024, 64, 1), False),
    ],
    ids=str,
)
def test_few_tokens_take_one_product(tokens: int, shape: tuple[int, int, int], few: bool) -> None:
    assert is_few(tokens, shape) == few


@pytest.mark.parametrize("loads", [[3, 0, 4, 1], [0, 0, 0, 8], [0, 0, 0, 0]], ids=str)
def test_one_product_of_few_rows_gives_what_the_loop_gives(
    loads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, grad, weight = features(sum(loads), 5), features(sum(loads), 3), features(4, 5, 3)
    multiply = torch.mm
    in_place: list[Tensor] = []

    def counted(*factors: Tensor, out: Tensor) -> Tensor:
        in_place.append(out)
        return multiply(*factors, out=out)

    monkeypatch.setattr(torch, "mm", counted)

    def results() -> list[Tensor]:
        in_place.clear()
        return [
            _grouped_linear(rows, weight, ends(loads), "loop"),
            _grouped_linear(grad, weight.transpose(1, 2), ends(loads), "loop"),
            _grouped_linear_weight(rows, grad, ends(loads), "loop"),
        ]

    found = results()
    assert len(in_place) == 1
    monkeypatch.setitem(FEW_ROWS, "rows", -1)
    expected = results()
    assert len(in_place) == 3 * len(loads)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


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
    ],
    ids=str,
)
def test_on_cuda_auto_is_what_waits_for_nothing(
    capability: tuple[int, int] | None, dtype: torch.dtype, kernel: str
) -> None:
    assert kernel_of(dtype, capability) == kernel


@settings(max_examples=60, deadline=None)
def routings() -> list[Routing]:
    """Of tokens that have K pairs each, and of tokens that have any number."""
    generator = torch.Generator().manual_seed(0)
    chosen = [torch.rand(9, 4, generator=generator).topk(k).indices for k in (1, 3, 0)]
    weights = [torch.rand(9, k, generator=generator, dtype=torch.float64) for k in (1, 3, 0)]
    by_token = [
        Routing.from_choices(*pair, num_experts=4) for pair in zip(chosen, weights, strict=True)
    ]
    none = Routing.from_choices(chosen[0][:0], weights[0][:0], num_experts=4)
    return [*by_token, none, routing_of(features(9, 4) * (features(9, 4, seed=1) > 0))]


class Noted(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func).split(".")[1])
        return func(*args, **(kwargs or {}))


def test_no_sum_on_cuda_is_by_atomic_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    """``index_add`` on CUDA adds in any order: each run would give other last digits."""
    monkeypatch.setattr(import_module("gmoe.dispatch"), "is_watched", lambda: False)
    x, weight, bias = (
        torch.randn(*shape, requires_grad=True) for shape in ((9, 5), (4, 5, 5), (4, 5))
    )
    for routing in routings():
        with Noted() as noted:
            rows = ToPairs.apply(x[: routing.num_tokens], routing.token, places_of(routing.slot))
            y = grouped_linear(rows, weight, bias, routing.offsets, "padded")
            ToTokens.apply(
                y, routing.token, places_of(routing.slot), routing.num_tokens
            ).sum().backward()
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
        rows = ToPairs.apply(x, routing.token, places_of(routing.slot))
        y = grouped_linear(rows, weight, bias, routing.offsets, "padded")
        return ToTokens.apply(y, routing.token, places_of(routing.slot), routing.num_tokens)

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    outputs = [run(*leaves) for run in (compiled, layer)]
    found, expected = ([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))] for y in outputs)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("tokens", "shape", "few"),
    [
        (2**14, (1, 1, 1), True),  # inputs
        (2**14 + 1, (1, 1, 1), False),
        (2**10, (1, 1, 2**9), True),  # products
        (2**10, (1, 1, 2**9 + 1), False),
        (2**10, (2**9, 1, 1), True),  # rows
        (2**10, (2**9 + 1, 1, 1), False),
    ],
)
def test_each_bound_of_one_product_is_the_last_number_that_takes_it(
    tokens: int, shape: tuple[int, int, int], few: bool
) -> None:
    assert is_few(tokens, shape) == few


@pytest.mark.parametrize(
    ("tokens", "shape", "between"),
    [
        (2**17, (8, 1, 1), True),  # inputs
        (2**17 + 1, (8, 1, 1), False),
        (2**8, (8, 2**4, 2**4), True),  # products
        (2**8, (8, 2**4, 2**4 - 1), False),
    ],
)
def test_rows_move_at_once_from_the_first_bound_to_the_last(
    tokens: int, shape: tuple[int, int, int], between: bool
) -> None:
    assert _is_between(tokens, shape) == between
