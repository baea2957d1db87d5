"""A portable form gives what the function gives in whose place an exported model has it."""

from __future__ import annotations

from collections.abc import Callable
from inspect import getmembers, isfunction
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from gmoe import blocks, edges, portable, products, sums
from gmoe._autograd import operator
from gmoe.portable import exported_as, refuse_in_export
from gmoe.routers import base, groups

EDGES, SENDERS, RECEIVERS, HEADS, WIDTH, EXPERTS = 40, 12, 9, 3, 5, 4

Both = tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]
"""A function, its portable form, and what both are called with."""


def drawn() -> edges.Edges:
    torch.manual_seed(0)
    sender, receiver = torch.randint(SENDERS, (EDGES,)), torch.randint(RECEIVERS, (EDGES,))
    return edges.Edges.sorted(sender, receiver, SENDERS, RECEIVERS)


def sorting() -> Both:
    torch.manual_seed(0)
    ends = torch.randint(SENDERS, (EDGES,)), torch.randint(RECEIVERS, (EDGES,))
    return edges._sort_edges, portable.sort_edges, (*ends, SENDERS, RECEIVERS, True)


def sums_of_messages(heads: int, dtype: torch.dtype, is_ordered: bool) -> Both:
    graph = drawn()
    order = torch.randperm(EDGES) if is_ordered else None
    weight_MH = torch.randn(EDGES, HEADS).to(dtype)
    value_UGC = torch.randn(SENDERS, heads, WIDTH).to(dtype)
    args = weight_MH, value_UGC, graph.ptr, graph.sender, graph.receiver, order
    return sums._sum_messages, portable.sum_messages, args


def sums_of_values(dtype: torch.dtype, is_ordered: bool) -> Both:
    graph = drawn()
    order = torch.randperm(EDGES) if is_ordered else None
    args = torch.randn(EDGES, HEADS).to(dtype), graph.ptr, graph.receiver, order
    return sums._sum_values, portable.sum_values, args


def products_of_ends(heads: int, dtype: torch.dtype) -> Both:
    graph = drawn()
    query_RHC = torch.randn(RECEIVERS, HEADS, WIDTH).to(dtype)
    key_UGC = torch.randn(SENDERS, heads, WIDTH).to(dtype)
    args = query_RHC, key_UGC, graph.ptr, graph.sender, graph.receiver
    return sums._multiply_ends, portable.multiply_ends, args


def the_largest() -> Both:
    graph = drawn()
    assert graph.ptr.diff().all()  # of no messages, the two disagree, and nobody asks
    args = torch.randn(EDGES, HEADS), graph.ptr, graph.receiver
    return sums._largest, portable.largest, args


def true_cells() -> Both:
    torch.manual_seed(0)
    mask_ET = torch.stack([torch.randperm(WIDTH) < 2 for _ in range(EXPERTS)])
    return groups._true_columns, portable.true_columns, (mask_ET, 2 * EXPERTS)


def filled_blocks() -> Both:
    place_P = torch.tensor([0, 1, 4, 5, 9])
    return blocks._filled, portable.filled_blocks, (torch.randn(5, WIDTH), place_P, 3, 4)


def rows_of_blocks() -> Both:
    place_P = torch.tensor([0, 1, 4, 5, 9])
    return blocks._rows, portable.rows_of_blocks, (torch.randn(3, 4, WIDTH), place_P)


ASCENDING = torch.tensor([0, 0, 2, 5, 5])
TIED = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0], [4.0, 1.0, 4.0, 4.0]])
HALF = torch.bfloat16

EQUAL: dict[str, Callable[[], Both]] = {
    "search": lambda: (blocks.search, portable.search, (ASCENDING, torch.arange(7))),
    "stable_sort": lambda: (blocks.stable_sort, portable.stable_sort, (ASCENDING.flip(0),)),
    **{
        f"top_k, K={k}": lambda k=k: (  # type: ignore[misc]
            base.best_experts,
            portable.top_k,
            (TIED, k),
        )
        for k in (1, 2, 4)
    },
    "true_columns": true_cells,
    "filled_blocks": filled_blocks,
    "rows_of_blocks": rows_of_blocks,
    **{
        f"positions, {number}": lambda number=number: (  # type: ignore[misc]
            edges._positions,
            portable.positions,
            (torch.tensor([0, 2, 0, 3, 0]), number),
        )
        for number in (5, None)
    },
    "sort_edges": sorting,
    "largest": the_largest,
    "sum_messages": lambda: sums_of_messages(HEADS, torch.float32, is_ordered=False),
    "sum_messages, one head": lambda: sums_of_messages(1, torch.float32, is_ordered=False),
    "sum_messages, in an order": lambda: sums_of_messages(HEADS, torch.float32, is_ordered=True),
    "sum_messages, half": lambda: sums_of_messages(HEADS, HALF, is_ordered=False),
    "sum_values": lambda: sums_of_values(torch.float32, is_ordered=False),
    "sum_values, in an order": lambda: sums_of_values(torch.float32, is_ordered=True),
    "sum_values, half": lambda: sums_of_values(HALF, is_ordered=False),
    "multiply_ends": lambda: products_of_ends(HEADS, torch.float32),
    "multiply_ends, one head": lambda: products_of_ends(1, torch.float32),
    "multiply_ends, half": lambda: products_of_ends(HEADS, HALF),
}
"""By the name of the form."""

CHOICES: dict[str, tuple[Callable[..., Any], tuple[Any, ...], Any, Any]] = {
    "kernel": (products.kernel_for, (torch.empty(0),), "loop", "padded"),
}
"""Functions that choose something else in an export: what they give, and what there."""


@pytest.mark.parametrize("for_onnx", [False, True])
@pytest.mark.parametrize("name", EQUAL)
def test_a_form_gives_what_the_function_gives(
    name: str, for_onnx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: for_onnx)
    function, form, args = EQUAL[name]()
    torch.testing.assert_close(form(*args), function(*args))


@pytest.mark.parametrize("for_onnx", [False, True])
def test_sums_are_bags_of_rows_where_the_runtime_has_them(
    for_onnx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: for_onnx)
    _, form, args = sums_of_messages(HEADS, torch.float32, is_ordered=False)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        form(*args)
    ran = {event.key for event in seen.key_averages()}
    assert ("aten::embedding_bag" in ran) != for_onnx


def test_a_search_gives_the_dtype_that_is_asked_for() -> None:
    for search in (blocks.search, portable.search):
        assert search(ASCENDING, ASCENDING, out_int32=True).dtype == torch.int32


@pytest.mark.parametrize("name", CHOICES)
def test_an_export_chooses_what_other_runtimes_know(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, args, usual, exported = CHOICES[name]
    assert function(*args) == usual
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert function(*args) == exported == getattr(portable, name)(*args)


def test_each_form_is_tested_here() -> None:
    others = {"exported_as", "refuse_in_export", "cast", "counts"}
    others |= {"larger_size", "with_spare"}
    mine = {
        name
        for name, function in getmembers(portable, isfunction)
        if function.__module__ == portable.__name__
    }
    tested = {name.split(",")[0] for name in EQUAL} | CHOICES.keys()
    assert mine == tested | others


def test_sizes_that_are_not_known_stay_open() -> None:
    class Sizes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            larger = portable.larger_size(16, x.size(0))
            return x.new_ones(portable.with_spare(larger, 1))

    assert (portable.larger_size(16, 3), portable.with_spare(3, 1)) == (16, 4)
    rows = torch.export.Dim("rows", min=1, max=64)
    run = torch.export.export(Sizes(), (torch.zeros(20),), dynamic_shapes=({0: rows},)).module()
    assert [len(run(torch.zeros(number))) for number in (1, 20, 64)] == [18, 22, 66]


# who asks -----------------------------------------------------------------------------------------


@exported_as(lambda x, scale=1: x + 10 * scale)
def shifted(x: Tensor, scale: int = 1) -> Tensor:
    """Add one."""
    return x + scale


def test_a_function_has_its_form_in_an_export_alone() -> None:
    class Shift(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return shifted(x, scale=2)

    x = torch.zeros(3)
    assert Shift()(x).tolist() == [2] * 3
    for is_strict in (False, True):
        run = torch.export.export(Shift(), (x,), strict=is_strict).module()
        assert run(x).tolist() == [20] * 3
    assert (shifted.__name__, shifted.__doc__) == ("shifted", "Add one.")


@operator(fake=torch.empty_like, portable=lambda x: x + 10)
def shifted_for_a_test(x: Tensor) -> Tensor:
    return x + 1


@operator(fake=torch.empty_like)
def doubled_for_a_test(x: Tensor) -> Tensor:
    return x * 2


def test_an_operator_has_its_form_in_an_export_or_is_its_own() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return shifted_for_a_test(x), doubled_for_a_test(x)

    x = torch.ones(3)
    assert [y[0].item() for y in Two()(x)] == [2, 2]
    exported = torch.export.export(Two(), (x,))
    assert [y[0].item() for y in exported.module()(x)] == [11, 2]
    called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert called == {"aten.add.Tensor", "aten.mul.Tensor"}


def test_what_has_no_form_is_refused_in_an_export_alone() -> None:
    class Refused(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            refuse_in_export("this", "that")
            return x

    x = torch.zeros(3)
    assert Refused()(x) is x
    with pytest.raises(ValueError, match=r"^torch\.export: got this, expected that$"):
        torch.export.export(Refused(), (x,))
