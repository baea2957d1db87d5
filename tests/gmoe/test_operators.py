"""Every operator of gmoe gives what its fake kernel says, on each road that the kernel takes.

Compiled code believes the fake kernel. Inductor stops where strides differ; other compilers read
the wrong numbers.

Shapes: P rows sorted by expert, T tokens, E experts, U senders, R receivers, M messages, H heads.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from importlib import import_module
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.profiler import ProfilerActivity, profile

import gmoe
from gmoe.edges import RADIX_RECEIVERS, Edges
from tests.helpers.kernels import ends
from tests.helpers.masked import features, random_graph

WIDTHS = (7, 8)
"""A width that does not fill 16 bytes, and one that does."""
OTHER_WIDTHS = (1, 17)
"""One column, and more than fill 16 bytes."""
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LOW = (torch.bfloat16, torch.float16)

EXPERTS, HEADS = 4, 2
LOADS = (0.2, 0.0, 0.5)
"""Shares of the first experts; the second has no rows."""

Args = tuple[Any, ...]
Size = tuple[int, torch.dtype]


class Road(NamedTuple):
    """A way through a kernel."""

    args: Callable[[int, torch.dtype], Args]
    """The arguments, by width and dtype, of a size that takes this road."""
    takes: str = ""
    """An operator of torch that runs on this road alone; none if the kernel has one road."""
    leaves: str = ""
    """One that runs on the other roads alone."""
    dtypes: tuple[torch.dtype, ...] = FLOATS
    """Those that take this road."""
    patches: Mapping[str, object] = {}
    """What a test replaces to get there: roads of other devices."""


# products -----------------------------------------------------------------------------------------


def rows(number: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(P, I) rows sorted by expert, and (E,) where each expert's rows end."""
    loads = [int(share * number) for share in LOADS]
    offsets = ends([*loads, number - sum(loads)])
    return features(number, width).to(dtype), offsets


def some(_: int) -> int:
    return 50


def none(_: int) -> int:
    return 0


def multiplied(
    number: Callable[[int], int], backend: str, transposed: bool = False
) -> Callable[[int, torch.dtype], Args]:
    def args(width: int, dtype: torch.dtype) -> Args:
        x, offsets = rows(number(width), width, dtype)
        weight = features(EXPERTS, width, width).to(dtype)
        if transposed:  # as in the backward
            weight = features(EXPERTS, width, width).to(dtype).transpose(1, 2)
        return x, weight, offsets, backend

    return args


def multiplied_out(
    number: Callable[[int], int], backend: str
) -> Callable[[int, torch.dtype], Args]:
    def args(width: int, dtype: torch.dtype) -> Args:
        x, offsets = rows(number(width), width, dtype)
        grad = features(number(width), width).to(dtype)
        return x, grad, offsets, backend

    return args


def gathered(width: int, dtype: torch.dtype) -> Args:
    """Rows that a product gathers itself."""
    x, weight, offsets, backend = multiplied(some, "loop")(width, dtype)
    return x[:9], weight, offsets, backend, torch.arange(len(x)) * 2 % 9


def gathered_out(width: int, dtype: torch.dtype) -> Args:
    x, grad, offsets, backend = multiplied_out(some, "loop")(width, dtype)
    return x, grad[:9], offsets, backend, torch.arange(len(x)) * 2 % 9


def products(make: Callable[..., Callable[[int, torch.dtype], Args]]) -> dict[str, Road]:
    """The roads of products of rows and of their gradients."""
    single = (torch.float32,)
    double = (torch.float64,)
    return {
        "grouped": Road(make(some, "grouped"), "_grouped_mm", dtypes=(*single, *LOW)),
        "grouped, no rows": Road(make(none, "grouped"), leaves="_grouped_mm"),
        "loop": Road(make(some, "loop"), "tensor_split", dtypes=double),
        # In torch's own loop, where widths fill 16 bytes.
        "loop, of any width": Road(make(some, "loop"), dtypes=(*single, *LOW)),
    }


# from tokens to tokens ----------------------------------------------------------------------------


def routed(places: bool, bias: bool, parts: int) -> Callable[[int, torch.dtype], Args]:
    """What both operators take: gate, bias, weights, parts, token, offsets, place."""

    def args(width: int, dtype: torch.dtype) -> Args:
        num_rows = 40
        _, offsets = rows(num_rows, 1, dtype)
        token = torch.randperm(num_rows, generator=torch.Generator().manual_seed(0))
        return (
            features(num_rows).to(dtype),
            features(EXPERTS, width).to(dtype) if bias else None,
            [features(EXPERTS, width, width, seed=part).to(dtype) for part in range(parts)],
            [features(num_rows, width, seed=part).to(dtype) for part in range(parts)],
            token,
            offsets,
            token.argsort() if places else None,
        )

    return args


def forward(places: bool, keeps_rows: bool, bias: bool = True, parts: int = 2) -> Any:
    def args(width: int, dtype: torch.dtype) -> Args:
        return *routed(places, bias, parts)(width, dtype), keeps_rows

    return args


def backward(
    places: bool, needs: tuple[bool, bool, bool], bias: bool = True, parts: int = 2
) -> Any:
    def args(width: int, dtype: torch.dtype) -> Args:
        values = routed(places, bias, parts)(width, dtype)
        num_rows = len(values[4])
        grad, y = (features(num_rows, width, seed=seed).to(dtype) for seed in (3, 4))
        needs_gate, needs_bias, needs_weights = needs
        of_parts = [needs_weights] * parts + [True] * parts
        return grad, y, *values, [needs_gate, needs_bias, *of_parts]

    return args


# along edges --------------------------------------------------------------------------------------

U, R, M = 7, 9, 30


def edges_of(number: int = M) -> Edges:
    sender, receiver = random_graph(U, R, number)
    return Edges.sorted(sender, receiver, U, R)


def sums(heads: int, shared: bool, number: int = M, mixed: bool = False, sent: bool = False) -> Any:
    def args(width: int, dtype: torch.dtype) -> Args:
        edges = edges_of(number)
        other = torch.float32 if mixed else dtype
        order = edges.order if sent else None
        weight = features(number, heads).to(other)
        value = features(U, 1 if shared else heads, width).to(dtype)
        return weight, value, edges.ptr, edges.sender, edges.receiver, order

    return args


def values(number: int = M, sent: bool = False) -> Any:
    def args(width: int, dtype: torch.dtype) -> Args:
        edges = edges_of(number)
        order = edges.order if sent else None
        return features(number, width).to(dtype), edges.ptr, edges.receiver, order

    return args


def ends_product(heads: int, shared: bool, number: int = M) -> Any:
    def args(width: int, dtype: torch.dtype) -> Args:
        edges = edges_of(number)
        query = features(R, heads, width).to(dtype)
        key = features(U, 1 if shared else heads, width).to(dtype)
        return query, key, edges.ptr, edges.sender, edges.receiver

    return args


def scores(with_edges: bool, heads: int = HEADS) -> Callable[[int, torch.dtype], Args]:
    def args(width: int, dtype: torch.dtype) -> Args:
        num_pairs, num_messages = 5, 20
        sender = torch.arange(num_messages) * 3 % U
        receiver = torch.arange(num_messages) * num_pairs // num_messages
        _, offsets = rows(num_messages, 1, dtype)
        of_edges: Args = (None, None)
        if with_edges:
            of_edges = features(num_messages, width), features(EXPERTS, width, width)
        floats = (
            features(U, width),
            features(num_pairs, width),
            *of_edges,
            features(EXPERTS, width, heads),
        )
        return *(x if x is None else x.to(dtype) for x in floats), 0.2, sender, receiver, offsets

    return args


def grad_of(args: Any, heads: int = HEADS) -> Callable[[int, torch.dtype], Args]:
    """The arguments of the backward, given those of the scores."""

    def with_grad(width: int, dtype: torch.dtype) -> Args:
        given = args(width, dtype)
        return features(len(given[6]), heads).to(dtype), *given

    return with_grad


# whole numbers: neither width nor dtype -----------------------------------------------------------


def whole(make: Callable[[], Args]) -> Callable[[int, torch.dtype], Args]:
    return lambda *_: make()


def sorting(receivers: int) -> Any:
    return whole(lambda: (*random_graph(U, receivers, M), U, receivers, True))


def finding(known: bool) -> Any:
    def args() -> Args:
        edges, some = edges_of(), torch.tensor([3, 0, 8, 3])
        return edges.ptr, some, int(edges.ptr.diff()[some].sum()) if known else None

    return whole(args)


def finding_rows(number: int | None) -> Any:
    expert = torch.arange(M) * 2 // M + 1
    return whole(lambda: (expert, random_graph(U, R, M)[0], EXPERTS, U, number))


# every road ---------------------------------------------------------------------------------------

SMALL_PRODUCTS = {"gmoe.products.NUMBERS": 30}
GPU_SUMS = {"gmoe.sums.SPARSE_DEVICES": ()}
ALL, EXPERTS_ONLY = (True, True, True), (False, True, True)

ROADS: dict[str, dict[str, Road]] = {
    "grouped_product": {
        **products(multiplied),
        "loop, transposed": Road(multiplied(some, "loop", transposed=True)),
        "gathered": Road(gathered, "index_select", patches=SMALL_PRODUCTS),
    },
    "grouped_outer_product": {
        **products(multiplied_out),
        "gathered": Road(gathered_out, "index_select", patches=SMALL_PRODUCTS),
    },
    "routed_linear": {
        "added": Road(forward(False, True), "addmm_"),
        "added, rows forgotten": Road(forward(False, False), "addmm_"),
        "fetched": Road(forward(True, True), "addmm_", "index_add_"),
        "fetched, rows forgotten": Road(forward(True, False), leaves="index_add_"),
        "one part without a bias": Road(forward(True, True, False, 1), "mm"),
    },
    "routed_linear_backward": {
        "added": Road(backward(False, ALL), "sum"),
        "fetched": Road(backward(True, ALL), leaves="index_add_"),
        "gates without gradients": Road(backward(True, EXPERTS_ONLY), leaves="linalg_vecdot"),
        "one part without a bias": Road(backward(True, (True, False, True), False, 1), "mm"),
    },
    "sum_messages": {
        "one head": Road(sums(1, False), "embedding_bag", "stack"),
        "two heads": Road(sums(2, False), "stack"),
        "shared by heads": Road(sums(2, True), "stack"),
        "sent": Road(sums(2, False, sent=True), "embedding_bag"),
        "two dtypes": Road(sums(1, False, mixed=True), "embedding_bag", dtypes=LOW),
        "no messages": Road(sums(1, False, 0), leaves="embedding_bag"),
        "GPU, one head": Road(sums(1, False), "index_add_", patches=GPU_SUMS),
        "GPU, two heads": Road(sums(2, True), "index_add_", patches=GPU_SUMS),
    },
    "sum_values": {
        "received": Road(values(), "embedding_bag"),
        "sent": Road(values(sent=True), "embedding_bag"),
        "no messages": Road(values(0), "index_add_"),
        "GPU": Road(values(sent=True), "index_add_", patches=GPU_SUMS),
    },
    "multiply_ends": {
        "one head": Road(ends_product(1, False), "sparse_sampled_addmm"),
        "two heads": Road(ends_product(2, False), "sparse_sampled_addmm"),
        "shared by heads": Road(ends_product(2, True), "sparse_sampled_addmm"),
        "more messages than cells": Road(ends_product(2, True, 90), leaves="sparse_sampled_addmm"),
        "GPU": Road(ends_product(2, False), leaves="sparse_sampled_addmm", patches=GPU_SUMS),
    },
    "score_additively": {
        "no edge features": Road(scores(False), leaves="bmm"),
        "edge features": Road(scores(True), leaves="bmm"),
        "one head": Road(scores(True, 1), leaves="bmm"),
    },
    "score_additively_backward": {
        "no edge features": Road(grad_of(scores(False)), leaves="bmm"),
        "edge features": Road(grad_of(scores(True)), leaves="bmm"),
        "one head": Road(grad_of(scores(True, 1), 1), leaves="bmm"),
    },
    "sort_edges": {
        "by NumPy": Road(sorting(RADIX_RECEIVERS), leaves="argsort"),
        "by torch": Road(sorting(RADIX_RECEIVERS + 1), "argsort"),
    },
    "find_messages": {
        "a known number": Road(finding(True)),
        "any number": Road(finding(False)),
    },
    "find_rows": {
        "a known number": Road(finding_rows(M), leaves="nonzero"),
        "any number": Road(finding_rows(None), "nonzero"),
    },
    "outside_backward": {"all": Road(lambda width, dtype: (features(3, width).to(dtype),))},
}
"""By operator and the name of the road."""

WHOLE = {"sort_edges", "find_messages", "find_rows"}
"""Operators of whole numbers, without a width."""
SIZED = {"grouped_product", "grouped_outer_product"}
"""Operators whose road depends on the sizes or the dtype."""


def registered() -> set[str]:
    """The operators that torch knows once all of gmoe is imported."""
    for module in pkgutil.walk_packages(gmoe.__path__, "gmoe."):
        import_module(module.name)
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix("gmoe::") for name in names if name.startswith("gmoe::")}


each_road = pytest.mark.parametrize(
    ("name", "road"),
    [
        pytest.param(name, road, id=f"{name}, {label}")
        for name, roads in ROADS.items()
        for label, road in roads.items()
    ],
)


def one_size(road: Road) -> Size:
    """The width and the dtype that stand for all."""
    return 7, torch.float32 if torch.float32 in road.dtypes else road.dtypes[0]


def sizes(name: str, road: Road) -> list[Size]:
    """The widths of a road in every dtype, and the other widths in one."""
    if name in WHOLE:
        return [one_size(road)]
    _, dtype = one_size(road)
    return [*product(WIDTHS, road.dtypes), *product(OTHER_WIDTHS, [dtype])]


def patched(road: Road, monkeypatch: pytest.MonkeyPatch) -> None:
    for place, value in road.patches.items():
        monkeypatch.setattr(place, value)


def operator(name: str) -> Any:
    return getattr(torch.ops.gmoe, name).default


def outputs(found: object) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)  # type: ignore[call-overload]


def faked(name: str, args: Args) -> list[Tensor]:
    """What the fake kernel gives."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = torch.utils._pytree.tree_map_only(
        Tensor, lambda x: mode.from_tensor(x, static_shapes=True), args
    )
    with mode:
        return outputs(operator(name)(*fakes))


def test_every_operator_has_cases() -> None:
    """But for those that tests of the decorator register, in this process perhaps."""
    of_tests = {name for name in registered() if name.endswith("_for_a_test")}
    assert registered() - of_tests == set(ROADS)


def assert_lies_as(ours: Tensor, fake: Tensor, size: Size) -> None:
    """A tensor has dtype, device, strides and shape of the fake one."""
    assert ours.is_contiguous(), size
    of_ours = (ours.dtype, ours.device, ours.stride())
    assert of_ours == (fake.dtype, fake.device, fake.stride()), size
    assert ours.dim() == fake.dim(), size
    for number, expected in zip(ours.shape, fake.shape, strict=True):
        # A symbol stands for a number that follows the data.
        assert not isinstance(expected, int) or number == expected, size


@each_road
def test_what_an_operator_returns_lies_as_its_fake_says(
    name: str, road: Road, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the widths and dtypes that it takes."""
    patched(road, monkeypatch)
    for size in sizes(name, road):
        args = road.args(*size)
        found, expected = outputs(operator(name)(*args)), faked(name, args)
        assert len(found) == len(expected), size
        for ours, fake in zip(found, expected, strict=True):
            assert_lies_as(ours, fake, size)


def transposed(x: Tensor) -> Tensor:
    """The same numbers, the last dimension first in memory."""
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def spread(x: Tensor) -> Tensor:
    """The same numbers, with a gap behind each; gmoe makes offsets (int32) itself, without gaps."""
    return x if x.dtype == torch.int32 else torch.stack([x, x], dim=-1)[..., 0]


def repeated(x: Tensor) -> Tensor:
    """The first row everywhere, in one place: as the gradient of a sum lies."""
    return x[:1].expand_as(x) if x.is_floating_point() else x


@each_road
def test_what_an_operator_returns_does_not_lie_as_its_inputs(
    name: str, road: Road, monkeypatch: pytest.MonkeyPatch
) -> None:
    patched(road, monkeypatch)
    for layout in (transposed, spread, repeated):
        args = torch.utils._pytree.tree_map_only(Tensor, layout, road.args(*one_size(road)))
        found = outputs(operator(name)(*args))
        strides = [x.stride() for x in faked(name, args)]
        assert [x.stride() for x in found] == strides, layout.__name__
        assert [x.is_contiguous() for x in found] == [True] * len(found), layout.__name__
        plain = torch.utils._pytree.tree_map_only(Tensor, Tensor.contiguous, args)
        torch.testing.assert_close(found, outputs(operator(name)(*plain)), atol=1e-3, rtol=1e-3)


@each_road
def test_a_size_takes_its_road(name: str, road: Road, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each size is asked where sizes tell the roads apart."""
    patched(road, monkeypatch)
    for size in product(WIDTHS, road.dtypes) if name in SIZED else [one_size(road)]:
        args = road.args(*size)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            operator(name)(*args)
        ran = {event.key.removeprefix("aten::") for event in profiled.key_averages()}
        assert not road.takes or road.takes in ran, size
        assert not road.leaves or road.leaves not in ran, size


@each_road
def test_operators_keep_torchs_rules(
    name: str, road: Road, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schema and fake kernel are what the kernel does."""
    patched(road, monkeypatch)
    rules = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator(name), road.args(*one_size(road)), test_utils=rules)


@pytest.mark.parametrize("name", ROADS)
def test_operators_are_traced(name: str) -> None:
    """Forward and backward, of sizes that are symbols."""
    road, *_ = ROADS[name].values()
    args = road.args(*one_size(road))
    torch.library.opcheck(operator(name), args, test_utils="test_aot_dispatch_dynamic")
