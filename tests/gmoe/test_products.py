"""Every kernel equals the formula.

Shapes: T tokens, E experts, P pairs sorted by expert, I in, H hidden, O out.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from gmoe import grouped_linear
from gmoe.places import ToPairs, ToTokens
from gmoe.products import (
    Kernel,
    _gathers_in_blocks,
    grouped_outer_product,
    grouped_product,
    kernel_for,
    kernel_of,
)
from gmoe.routing import Routing
from tests.helpers.kernels import Noted, ends, gradients, kernel_is, routings
from tests.helpers.masked import features

each_kernel = pytest.mark.parametrize("kernel", get_args(Kernel))


@pytest.mark.parametrize(
    ("loads", "width", "out"),
    [
        ([3, 0, 2, 4], 7, 5),
        ([0, 0, 5, 0], 8, 8),
        ([0, 0, 0, 0], 7, 5),
        ([4, 0, 2], 1433, 7),
        ([3, 3, 3], 7, 5),
        ([1, 3], 1, 1433),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@each_kernel
def test_a_row_meets_its_expert(
    kernel: Kernel, dtype: torch.dtype, loads: list[int], width: int, out: int
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
    with kernel_is(kernel):
        y = grouped_linear(leaves[0], leaves[1], leaves[2], ends(loads))
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


@each_kernel
def test_autocast_as_in_linear(kernel: Kernel) -> None:
    x, weight, bias = torch.randn(4, 7), torch.randn(2, 7, 5), torch.randn(2, 5)
    offsets = ends([1, 3])
    with kernel_is(kernel):
        plain = grouped_linear(x, weight, bias, offsets)
        with torch.autocast("cpu", torch.bfloat16):
            low = grouped_linear(x, weight, bias, offsets)
            double = grouped_linear(x.double(), weight.double(), bias.double(), offsets)
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
        assert bool({"mm", "addmm_"} & noted.names) == (not is_own)


SOURCES = torch.tensor([0, 3, 4, 8, 1, 0, 2, 3, 5, 6, 7, 8])
"""Of a row each, distinct for each of four experts; the third has none."""
SOURCE_LOADS = [4, 1, 0, 7]


@pytest.mark.parametrize("numbers", [1, 15, 44, 45], ids=["a row", "three rows", "most", "all"])
@pytest.mark.parametrize("frozen", [0, 1, None])
def test_rows_may_be_gathered_in_blocks(
    numbers: int, frozen: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gmoe.products.NUMBERS", numbers)
    given = [features(9, 5), features(4, 5, 3, seed=1), features(4, 3, seed=2)]
    leaves = [leaf.requires_grad_(number != frozen) for number, leaf in enumerate(given)]
    x, weight, bias = leaves
    found = grouped_linear(x, weight, bias, ends(SOURCE_LOADS), source_P=SOURCES)
    expert = torch.arange(4).repeat_interleave(torch.tensor(SOURCE_LOADS))
    expected = torch.einsum("pi,pio->po", x[SOURCES], weight[expert]) + bias[expert]
    used = [leaf for leaf in leaves if leaf.requires_grad]
    torch.testing.assert_close(
        [found, *gradients(found, used)], [expected, *gradients(expected, used)]
    )


@pytest.mark.parametrize("numbers", [15, 45], ids=["three rows", "all"])
def test_products_of_gathered_rows_have_second_gradients(
    numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gmoe.products.NUMBERS", numbers)
    x, weight = features(9, 5).requires_grad_(), features(4, 5, 3, seed=1).requires_grad_()

    def run(x: Tensor, weight: Tensor) -> Tensor:
        y = grouped_linear(x.sin(), weight.sin(), None, ends(SOURCE_LOADS), source_P=SOURCES)
        return y.square()

    assert torch.autograd.gradcheck(run, (x, weight), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, weight), fast_mode=True)


@pytest.mark.parametrize(
    ("dtype", "kernel", "numbers", "in_blocks"),
    [
        (torch.float32, "loop", 44, True),
        (torch.float64, "loop", 44, True),
        (torch.float32, "loop", 45, False),  # they fit the caches
        (torch.bfloat16, "loop", 0, False),  # sums of blocks would be rounded
        (torch.float32, "padded", 0, False),
        (torch.float32, "grouped", 0, False),
    ],
)
def test_only_wide_rows_of_a_cpu_are_gathered_in_blocks(
    dtype: torch.dtype,
    kernel: Kernel,
    numbers: int,
    in_blocks: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gmoe.products.NUMBERS", numbers)
    x = features(9, 5).to(dtype)
    with kernel_is(kernel):
        assert _gathers_in_blocks(x) == in_blocks
        assert not _gathers_in_blocks(x.to("meta"))
        with torch.autocast("cpu", torch.bfloat16):
            assert not _gathers_in_blocks(x)


@each_kernel
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
def test_weights_may_lie_in_any_way(kernel: Kernel, weight: Tensor) -> None:
    """torch's own loop wants rows or columns side by side, each from a multiple of 16 bytes."""
    x, weight = features(5, 8).float(), weight.float()

    def output_and_gradient(leaf: Tensor) -> list[Tensor]:
        with kernel_is(kernel):
            y = grouped_linear(x, leaf, None, ends([3, 2]))
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
def test_on_cuda_the_kernel_waits_for_nothing(
    capability: tuple[int, int] | None, dtype: torch.dtype, kernel: str
) -> None:
    assert kernel_of(dtype, capability) == kernel


@pytest.mark.parametrize(
    ("device", "kernel"),
    [("cpu", "loop"), ("meta", "loop"), ("xpu", "padded"), ("mps", "padded")],
)
def test_off_the_cpu_the_kernel_does_not_wait(device: str, kernel: str) -> None:
    like: Any = SimpleNamespace(device=torch.device(device), is_cuda=False, dtype=torch.float32)
    assert kernel_for(like) == kernel


def test_no_sum_on_cuda_is_by_atomic_adds() -> None:
    """``index_add`` on CUDA adds in any order: each run would give other last digits."""
    x, weight, bias = (
        torch.randn(*shape, requires_grad=True) for shape in ((9, 5), (4, 5, 5), (4, 5))
    )
    for routing in routings():
        with Noted() as noted, kernel_is("padded"):
            rows = ToPairs.apply(x[: routing.num_tokens], routing.token, routing.place)
            y = grouped_linear(rows, weight, bias, routing.offsets)
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
        y = grouped_linear(rows, weight, bias, routing.offsets)
        return ToTokens.apply(y, routing.token, routing.place, routing.num_tokens)

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with kernel_is("padded"):
        outputs = [run(*leaves) for run in (compiled, layer)]
    found, expected = ([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))] for y in outputs)
    torch.testing.assert_close(found, expected)


def test_ends_of_other_experts_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^offsets: got shape \(2,\), expected one end for each of 3"
    ):
        grouped_linear(torch.ones(4, 5), torch.ones(3, 5, 2), None, torch.tensor([2, 4]))
