"""Tokens to experts and back: where tokens move, and which kernel multiplies them.

Shapes: T tokens, E experts, K experts per token, P (token, expert) pairs sorted by expert, I in, O
out features, N blocks of B rows.

A layer calls :func:`dispatch`, :func:`grouped_linear` on the rows, and :func:`combine`; or all
three in one, :func:`gmoe.routed.routed_linear`, as experts on graphs do. The kernels are operators
of torch (``torch.ops.gmoe``), opaque to ``torch.compile``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from gmoe._autograd import autocasts, first_order, operator
from gmoe._checks import check_choice
from gmoe._torch import is_watched
from gmoe.padded import blocks_of, grouped_mm, grouped_outer, padded_mm, padded_outer
from gmoe.places import ToPairs, ToTokens, places_of, uses_places
from gmoe.routing import Routing, expert_at

Backend: TypeAlias = Literal["auto", "grouped", "padded", "loop"]

FEW = {"inputs": 2**14, "products": 2**19, "rows": 2**19}
"""Up to these sizes, :func:`gmoe.routed.routed_linear` runs all experts on all tokens, in one
product.

The sizes are T * I inputs, T * I * O multiply-adds of an expert, and T * E * I numbers in the rows
of the product. The loop takes about 45 us an expert, more than an expert's share of the product.
Measured with 4 to 64 experts of 1 to 64 outputs on one thread: 0.10 to 0.93 of the loop's time
inside these bounds; outside 0.5 to 7 times, more often above 1 than below.
"""

FEW_ROWS = {"inputs": 2**12, "products": 2**16, "rows": 2**19}
"""The same for the loop of :func:`grouped_linear`, which takes about 5 us an expert.

Measured with 8 experts: 0.4 to 0.7 of its time; beyond (30 rows, 64 by 64 weights) 1.1 in a layer.
"""

AT_ONCE = {"inputs": 2**17, "products": 2**16}
"""Up to so many inputs and from so many products on, rows of all experts are moved at once.

The sizes are those of :data:`FEW`; each token has one pair. Measured with 8 experts on one thread:
0.4 to 0.75 of the time of the loop or of one product. Fewer products take less time in one
product; more inputs are faster expert by expert, in rows that fit the caches.
"""

GROUPED = (9, 10)
"""Major compute capabilities for which ``torch.nn.functional.grouped_mm`` has a kernel."""


def is_few(num_rows: int, shape_EIO: Sequence[int], bounds: Mapping[str, int] = FEW) -> bool:
    """True if one product of all experts is faster than a loop over them; see :data:`FEW`."""
    num_experts, in_features, out_features = shape_EIO
    inputs = num_rows * in_features
    return (
        inputs <= bounds["inputs"]
        and inputs * out_features <= bounds["products"]
        and inputs * num_experts <= bounds["rows"]
    )


def _has_own_loop(x_PI: Tensor) -> bool:
    """True if torch's own loop over experts takes the rows, and is faster than Python's.

    Measured with 8 experts of 64 by 64 on 30 rows: 0.5 of the time; no gain with 2**18 inputs.
    """
    takes = x_PI.dtype == torch.float32 and x_PI.device.type == "cpu"
    return takes and 0 < x_PI.numel() <= AT_ONCE["inputs"] and not is_watched()


def dispatch(x_TI: Tensor, routing: Routing) -> Tensor:
    """Gather the token of each pair, expert by expert: (P, I)."""
    if uses_places(x_TI, routing):
        return ToPairs.apply(x_TI, routing.token, places_of(routing.slot))
    return x_TI.index_select(0, routing.token)


def combine(y_PO: Tensor, routing: Routing) -> Tensor:
    r"""Sum the experts' outputs (P, O) over each token's pairs, by weight: (T, O).

    .. math:: y_t = \sum_{e} w_{te} f_e(x_t)

    A token without pairs gets zero.
    """
    weighted_PO = y_PO * routing.weight.to(y_PO.dtype)[:, None]
    if uses_places(y_PO, routing):
        return ToTokens.apply(
            weighted_PO, routing.token, places_of(routing.slot), routing.num_tokens
        )
    zero_TO = weighted_PO.new_zeros(routing.num_tokens, y_PO.size(1))
    return zero_TO.index_add_(0, routing.token, weighted_PO)


def kernel_of(
    dtype: torch.dtype, capability: tuple[int, int] | None
) -> Literal["grouped", "padded", "loop"]:
    """The backend of :func:`grouped_linear` that ``"auto"`` stands for.

    ``"loop"`` on a CPU. On CUDA, a backend without host syncs: ``"grouped"`` if torch has a kernel
    of its own (bfloat16 on capability 9 and 10 in torch 2.10 to 2.13; elsewhere torch copies the
    offsets to the host, waits for them, and loops), else ``"padded"``.

    Args:
        dtype: of rows and weights, after autocast.
        capability: of the CUDA device; ``None`` on another device.
    """
    if capability is None:
        return "loop"
    if dtype == torch.bfloat16 and capability[0] in GROUPED:
        return "grouped"
    return "padded"


def grouped_linear(
    x_PI: Tensor,
    weight_EIO: Tensor,
    bias_EO: Tensor | None,
    offsets_E: Tensor,
    backend: Backend = "auto",
) -> Tensor:
    """Apply expert ``e``'s linear layer to the rows ``offsets[e - 1]:offsets[e]``: (P, O).

    Args:
        x_PI: rows sorted by expert.
        weight_EIO: stacked weights.
        bias_EO: stacked biases, or ``None``.
        offsets_E: (E,) int32 cumulative ends, ascending; the last is P. A load is no cumulative
            sum: nobody looks at the values.
        backend: all give the same result and gradients, if the weights are finite.

            - ``"loop"``: one matmul per expert, written in place; of few rows (``FEW_ROWS``),
              one matmul of all experts. One host sync.
            - ``"padded"``: one ``bmm`` over blocks of rows; the last block of each expert is filled
              up with zeros. No host sync, whatever the dtype and device; up to five copies of the
              weights, and up to a quarter more rows.
            - ``"grouped"``: ``torch.nn.functional.grouped_mm``; no host sync if torch has a kernel
              for it (bfloat16 on recent CUDA devices), else a loop of torch's own. float64, which
              it refuses, runs as ``"loop"``; widths that its alignment rule refuses are padded with
              zeros.
            - ``"auto"`` (default): ``"loop"`` on the CPU; on CUDA, a backend without host syncs,
              see ``gmoe.dispatch.kernel_of``.

    Follows autocast as ``nn.Linear`` does. Can be differentiated once.

    Raises:
        ValueError: an unknown backend; ``offsets`` of another number of experts.
    """
    if backend not in get_args(Backend):  # asked here, too, to save a call for each layer
        check_choice("backend", backend, Backend)
    if offsets_E.shape != weight_EIO.shape[:1]:
        legal = f"one end for each of {len(weight_EIO)} experts"
        raise ValueError(f"offsets: got shape {tuple(offsets_E.shape)}, expected {legal}")
    # 1. The dtype, which follows autocast as that of nn.Linear does.
    if autocasts(x_PI.device) and x_PI.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x_PI.device.type)
        x_PI = x_PI.to(dtype)
        weight_EIO = weight_EIO.to(dtype)

    # 2. The kernel.
    if torch.compiler.is_exporting():
        backend = "padded"  # the one whose operators other runtimes know, on any device
    elif backend == "auto" and x_PI.is_cuda and is_watched():
        backend = "grouped"  # its FLOPs are those of the rows, without the zeros of padded blocks
    elif backend == "auto":
        capability = torch.cuda.get_device_capability(x_PI.device) if x_PI.is_cuda else None
        backend = kernel_of(x_PI.dtype, capability)
    if backend == "grouped" and x_PI.dtype == torch.float64:
        backend = "loop"
    y_PO = _GroupedLinear.apply(backend, offsets_E, x_PI, weight_EIO)

    # 3. The bias. Beside a kernel without host syncs, its gradient needs no atomic adds; beside
    # the loop, and where FLOPs are counted, it is made of plain operators.
    if bias_EO is None:
        return y_PO
    if backend != "loop" and not is_watched():
        return y_PO.add_(_ExpertBias.apply(bias_EO, offsets_E, x_PI.size(0), y_PO.dtype))
    rows_E = offsets_E.diff(prepend=offsets_E.new_zeros(1))
    # In float32 at least: its gradient is a sum over many rows.
    exact_EO = bias_EO.to(torch.promote_types(bias_EO.dtype, torch.float32))
    bias_PO = exact_EO.repeat_interleave(rows_E, dim=0, output_size=len(x_PI))
    return y_PO.add_(bias_PO.to(y_PO.dtype))


def in_blocks(
    block_PI: Tensor, row_P: Tensor, expert_P: Tensor, num_rows: int, num_experts: int
) -> Tensor:
    """(num_rows, E * I) rows of a block for each expert: those given, and zeros elsewhere.

    To multiply all blocks by a gate of zero would not do: zero times a NaN is NaN.
    """
    zeros = block_PI.new_zeros(num_rows * num_experts, block_PI.size(1))
    filled = zeros.index_copy(0, row_P * num_experts + expert_P, block_PI)
    return filled.view(num_rows, num_experts * block_PI.size(1))


# rows sorted by expert ----------------------------------------------------------------------------


def _one_block_each(x_PI: Tensor, offsets_E: Tensor) -> Tensor:
    """(P, E * I) each row in the block of its expert, and zeros elsewhere."""
    row_P = torch.arange(len(x_PI), device=x_PI.device)
    expert_P = torch.searchsorted(offsets_E, row_P, right=True)
    return in_blocks(x_PI, row_P, expert_P, len(x_PI), len(offsets_E))


@operator(fake=lambda x, weight, *_: x.new_empty(x.size(0), weight.size(2)))
def grouped_product(x: Tensor, weight: Tensor, offsets: Tensor, backend: str) -> Tensor:
    """(P, O) rows (P, I) times the weight (E, I, O) of their expert."""
    if backend == "padded":
        return padded_mm(x, weight, offsets)
    if backend == "grouped" and len(x):
        return grouped_mm(x, weight, offsets)
    if is_few(len(x), weight.shape, FEW_ROWS) and not is_watched():
        return _one_block_each(x, offsets) @ weight.flatten(0, 1)
    if _has_own_loop(x):
        return grouped_mm(x, weight, offsets)
    y_PO = x.new_empty(len(x), weight.size(2))
    ends = offsets[:-1].tolist()  # one host sync
    by_expert = zip(x.tensor_split(ends), weight, y_PO.tensor_split(ends), strict=True)
    for rows, weight_IO, y in by_expert:
        torch.mm(rows, weight_IO, out=y)
    return y_PO


@operator(fake=lambda x, grad, offsets, *_: x.new_empty(len(offsets), x.size(1), grad.size(1)))
def grouped_outer_product(x: Tensor, grad: Tensor, offsets: Tensor, backend: str) -> Tensor:
    """(E, I, O) the gradient of the weights, from rows (P, I) and gradients (P, O)."""
    if backend == "padded":
        return padded_outer(x, grad, offsets)
    if backend == "grouped" and len(x):
        return grouped_outer(x, grad, offsets)
    grad_EIO = x.new_empty(len(offsets), x.size(1), grad.size(1))
    if is_few(len(x), grad_EIO.shape, FEW_ROWS) and not is_watched():
        torch.mm(_one_block_each(x, offsets).T, grad, out=grad_EIO.flatten(0, 1))
        return grad_EIO
    if _has_own_loop(x):
        return grouped_outer(x, grad, offsets)
    ends = offsets[:-1].tolist()  # one host sync
    by_expert = zip(x.tensor_split(ends), grad.tensor_split(ends), grad_EIO, strict=True)
    for rows, grad_rows, grad_IO in by_expert:
        torch.mm(rows.T, grad_rows, out=grad_IO)  # zero if the expert has no rows
    return grad_EIO


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, offsets: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        ctx.backend = backend
        ctx.save_for_backward(x, weight, offsets)
        return grouped_product(x, weight, offsets, backend)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, offsets = ctx.saved_tensors
        *_, needs_x, needs_weight = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_x = None
        grad_weight = None
        if needs_x:
            grad_x = grouped_product(grad, weight.transpose(1, 2), offsets, ctx.backend)
        if needs_weight:
            grad_weight = grouped_outer_product(x, grad, offsets, ctx.backend)
        return None, None, grad_x, grad_weight


class _ExpertBias(torch.autograd.Function):
    """(P, O) the bias of each row's expert.

    Its gradient is summed in float32 at least, without atomic adds.
    """

    @staticmethod
    def forward(
        ctx: Any, bias_EO: Tensor, offsets_E: Tensor, num_rows: int, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(offsets_E)
        ctx.bias_dtype = bias_EO.dtype
        row_P = torch.arange(num_rows, device=offsets_E.device)
        expert_P = expert_at(offsets_E.long(), row_P)
        return bias_EO.to(dtype).index_select(0, expert_P)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_PO: Tensor) -> Any:
        (offsets_E,) = ctx.saved_tensors
        blocks = blocks_of(offsets_E, len(grad_PO))
        exact = torch.promote_types(grad_PO.dtype, torch.float32)
        grad_NO = blocks.filled(grad_PO).sum(dim=1, dtype=exact)
        return blocks.sum_by_expert(grad_NO, len(offsets_E)).to(ctx.bias_dtype), None, None, None
