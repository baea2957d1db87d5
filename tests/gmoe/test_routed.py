"""A mixture of linear layers in one call equals the formula, whichever way is the fastest.

Shapes: T tokens, E experts, P pairs sorted by expert, I in, O out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gmoe.dispatch import AT_ONCE, FEW, FEW_ROWS, Backend, is_few
from gmoe.routed import _is_best_at_once, routed_linear
from gmoe.routing import Routing
from tests.gmoe.conv.masked import features, routing_of
from tests.gmoe.kernels import Noted, gradients, routings

each_backend = pytest.mark.parametrize("backend", get_args(Backend))


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


@each_backend
@pytest.mark.parametrize("at_once", [False, True])
def test_gradients_of_gradients_are_refused_in_every_way(
    backend: Backend, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gmoe.routed._is_best_at_once", lambda *_: at_once)
    weight = features(4, 5, 3).requires_grad_()
    routing = Routing.from_choices(torch.arange(8)[:, None] % 4, features(8, 1), num_experts=4)
    out = routed_linear([features(8, 5)], weight, None, routing, backend)
    with pytest.raises(RuntimeError, match=r"^create_graph: got True"):
        torch.autograd.grad(out.square().sum(), weight, create_graph=True)


def test_routed_linear_is_of_the_type_of_its_weights() -> None:
    x, weight, routing = (
        features(5, 5).bfloat16(),
        features(2, 5, 3).float(),
        routing_of(torch.ones(5, 2)),
    )
    assert routed_linear([x], weight, None, routing).dtype == torch.float32


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
    torch.testing.assert_close(found, expected)


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
    assert _is_best_at_once(tokens, shape) == between
