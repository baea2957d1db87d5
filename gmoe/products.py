"""Tokens to experts and back: where tokens move, and which kernel multiplies them.

Shapes: T tokens, E experts, K experts per token, P (token, expert) pairs sorted by expert, I in, O
out features, N blocks of B rows.

A layer calls :func:`dispatch`, :func:`grouped_linear` on the rows, and :func:`combine`; or all
three in one, :func:`gmoe.routed.routed_linear`, as experts on graphs do. The kernels are operators
of torch (``torch.ops.gmoe``), opaque to ``torch.compile``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from gmoe import portable
from gmoe._autograd import autocasts, operator, unbatched
from gmoe.blocks import AtRows, blocks_of, expert_of_rows
from gmoe.padded import grouped_mm, grouped_outer, has_own_loop, packed
from gmoe.places import ToPairs, ToTokens, uses_places
from gmoe.portable import exported_as
from gmoe.routing import Routing

Kernel: TypeAlias = Literal["grouped", "padded", "loop"]

GROUPED = (9, 10)
"""Major compute capabilities for which ``torch.nn.functional.grouped_mm`` has a kernel."""

NUMBERS = 2**18
"""Inputs that are gathered at once on a CPU, to be multiplied while they are in its caches.

A fourth or four times as many take 5 % longer.
"""


def dispatch(x_TI: Tensor, routing: Routing) -> Tensor:
    """Gather the token of each pair, expert by expert: (P, I)."""
    if uses_places(x_TI, routing):
        return ToPairs.apply(x_TI, routing.token, routing.place)
    return x_TI.index_select(0, routing.token)


def combine(y_PO: Tensor, routing: Routing) -> Tensor:
    r"""Sum the experts' outputs (P, O) over each token's pairs, by weight: (T, O).

    .. math:: y_t = \sum_{e} w_{te} f_e(x_t)

    A token without pairs gets zero.
    """
    weighted_PO = y_PO * routing.weight.to(y_PO.dtype)[:, None]
    if uses_places(y_PO, routing):
        return ToTokens.apply(weighted_PO, routing.token, routing.place, routing.num_tokens)
    zero_TO = weighted_PO.new_zeros(routing.num_tokens, y_PO.size(1))
    return zero_TO.index_add_(0, routing.token, weighted_PO)


def kernel_of(dtype: torch.dtype, capability: tuple[int, int] | None) -> Kernel:
    """The kernel of :func:`grouped_linear`.

    All give the same result and gradients, if the weights are finite:

    - ``"loop"`` on a CPU: one matmul per expert, written in place, or torch's own loop if the
      widths fill 16 bytes and the dtype is not float64. One host sync.
    - ``"grouped"`` on CUDA, if torch has a kernel of its own for ``F.grouped_mm`` (bfloat16 on
      capability 9 and 10 in torch 2.10 to 2.13; elsewhere torch copies the offsets to the host,
      waits for them, and loops). Widths that its alignment rule refuses are padded with zeros.
    - ``"padded"`` elsewhere, other accelerators (``"xpu"``, ``"mps"``) too: one ``bmm`` over blocks
      of rows; the last block of each expert is filled up with zeros. No host sync, whatever the
      dtype; up to five copies of the weights, and up to a quarter more rows, or 16 an expert.

    Args:
        dtype: of rows and weights, after autocast.
        capability: of the CUDA device; (0, 0) on another accelerator; ``None`` on a CPU.
    """
    if capability is None:
        return "loop"
    if dtype == torch.bfloat16 and capability[0] in GROUPED:
        return "grouped"
    return "padded"


@exported_as(portable.kernel)
def kernel_for(x: Tensor) -> Kernel:
    """The kernel that multiplies rows of the dtype and on the device of ``x``."""
    capability: tuple[int, int] | None = None
    if x.is_cuda:
        capability = torch.cuda.get_device_capability(x.device)
    elif x.device.type not in ("cpu", "meta"):
        capability = (0, 0)
    return kernel_of(x.dtype, capability)


def grouped_linear(
    x_PI: Tensor,
    weight_EIO: Tensor,
    bias_EO: Tensor | None,
    offsets_E: Tensor,
    source_P: Tensor | None = None,
) -> Tensor:
    """Apply expert ``e``'s linear layer to the rows ``offsets[e - 1]:offsets[e]``: (P, O).

    Args:
        x_PI: rows sorted by expert.
        weight_EIO: stacked weights.
        bias_EO: stacked biases, or ``None``.
        offsets_E: (E,) int32 cumulative ends, ascending; the last is P. Pass ends, not loads: the
            values are not checked.
        source_P: (P,) the rows of ``x`` that are the rows, if those have to be gathered; a CPU
            keeps no copy of wide ones (default ``None``: ``x`` holds the rows).

    Follows autocast as ``nn.Linear`` does. The device and the dtype choose the kernel, see
    ``gmoe.products.kernel_of``.

    Raises:
        ValueError: ``offsets`` of another number of experts.
    """
    if offsets_E.shape != weight_EIO.shape[:1]:
        legal = f"one end for each of {len(weight_EIO)} experts"
        raise ValueError(f"offsets: got shape {tuple(offsets_E.shape)}, expected {legal}")
    # 1. The rows, where the kernel does not gather them itself.
    if source_P is not None and not _gathers_in_blocks(x_PI):
        x_PI, source_P = x_PI.index_select(0, source_P), None

    # 2. The dtype, which follows autocast as that of nn.Linear does.
    if autocasts(x_PI.device) and x_PI.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x_PI.device.type)
        x_PI = x_PI.to(dtype)
        weight_EIO = weight_EIO.to(dtype)

    # 3. The kernel, and the bias.
    kernel = kernel_for(x_PI)
    if kernel == "padded":
        blocks = blocks_of(offsets_E, expert_of_rows(offsets_E, x_PI.size(0)))
        return blocks.linear(x_PI, weight_EIO, bias_EO)
    y_PO = GroupedLinear.apply(kernel, offsets_E, x_PI, weight_EIO, source_P)
    if bias_EO is None:
        return y_PO
    if kernel == "grouped":  # without host syncs, and a gradient without atomic adds
        expert_P = expert_of_rows(offsets_E, x_PI.size(0))
        return y_PO.add_(AtRows.apply(bias_EO, expert_P).to(y_PO.dtype))
    rows_E = offsets_E.diff(prepend=offsets_E.new_zeros(1))
    # In float32 at least: its gradient is a sum over many rows.
    exact_EO = bias_EO.to(torch.promote_types(bias_EO.dtype, torch.float32))
    bias_PO = exact_EO.repeat_interleave(rows_E, dim=0, output_size=y_PO.size(0))
    return y_PO.add_(bias_PO.to(y_PO.dtype))


def _gathers_in_blocks(x_NI: Tensor) -> bool:
    """True where rows outgrow a CPU's caches, and their blocks may be added up."""
    is_exact = x_NI.dtype.itemsize >= 4 and not autocasts(x_NI.device)
    is_loop = x_NI.device.type == "cpu" and kernel_for(x_NI) == "loop"
    return is_loop and is_exact and x_NI.numel() > NUMBERS


# rows sorted by expert ----------------------------------------------------------------------------


def _by_expert(
    x: Tensor, others: Tensor, offsets: Tensor, source: Tensor | None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Rows of one expert, that expert, and other rows at the same places.

    All rows of each expert; but where they are gathered, as many as :data:`NUMBERS` allows.
    """
    ends = offsets[:-1].tolist()  # one host sync
    given = x if source is None else source
    step = max(NUMBERS // max(x.size(1), 1), 1)
    experts = zip(given.tensor_split(ends), others.tensor_split(ends), strict=True)
    for expert, (of_expert, others_of_expert) in enumerate(experts):
        if source is None:
            yield expert, of_expert, others_of_expert
            continue
        blocks = zip(of_expert.split(step), others_of_expert.split(step), strict=True)
        yield from ((expert, x.index_select(0, block), other) for block, other in blocks)


def _empty_products(
    x: Tensor, weight: Tensor, _: Tensor, __: str, source: Tensor | None = None
) -> Tensor:
    return x.new_empty((x if source is None else source).size(0), weight.size(2))


@operator(fake=_empty_products)
def grouped_product(
    x: Tensor, weight: Tensor, offsets: Tensor, kernel: str, source: Tensor | None = None
) -> Tensor:
    """(P, O) rows (P, I) times the weight (E, I, O) of their expert.

    If sources (P,) are given, those of ``x`` are the rows, in the loop.
    """
    if kernel == "grouped" and len(x):
        return grouped_mm(x, weight, offsets)
    if source is None and has_own_loop(x, weight.size(2)):
        return F.grouped_mm(x.contiguous(), packed(weight), offs=offsets.int())
    y_PO = x.new_empty(len(x if source is None else source), weight.size(2))
    for expert, rows, y in _by_expert(x, y_PO, offsets, source):
        torch.mm(rows, weight[expert], out=y)
    return y_PO


def _empty_outer_products(x: Tensor, y: Tensor, offsets: Tensor, *_: Any) -> Tensor:
    return x.new_empty(offsets.size(0), x.size(1), y.size(1))


@operator(fake=_empty_outer_products)
def grouped_outer_product(
    x: Tensor, y: Tensor, offsets: Tensor, kernel: str, source: Tensor | None = None
) -> Tensor:
    """(E, I, O) the sums over each expert's rows (P, I) and (P, O) of their outer products.

    If sources (P,) are given, those of ``y`` are the second rows, in the loop.
    """
    if kernel == "grouped" and len(x):
        return grouped_outer(x, y, offsets)
    if source is None and has_own_loop(x, y.size(1)):
        return F.grouped_mm(x.contiguous().T, y.contiguous(), offs=offsets.int())
    sum_EIO = x.new_zeros(len(offsets), x.size(1), y.size(1))
    for expert, y_rows, x_rows in _by_expert(y, x, offsets, source):
        sum_EIO[expert].addmm_(x_rows.T, y_rows)
    return sum_EIO


def _to_sources(grad_P: Tensor, like: Tensor, source: Tensor | None) -> Tensor:
    """The gradient of what rows were gathered from, if they were."""
    if source is None:
        return grad_P
    return grad_P.new_zeros(like.shape).index_add_(0, source, grad_P)


class GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernel: str,
        offsets: Tensor,
        x: Tensor,
        weight: Tensor,
        source: Tensor | None = None,
    ) -> Tensor:
        ctx.kernel = kernel
        ctx.save_for_backward(x, weight, offsets, source)
        return grouped_product(x, weight, offsets, kernel, source)

    @staticmethod
    @unbatched
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, offsets, source = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[2:4]
        grad = grad.contiguous()
        grad_x = None
        grad_weight = None
        if needs_x:
            grad_P = GroupedLinear.apply(ctx.kernel, offsets, grad, weight.mT)
            grad_x = _to_sources(grad_P, x, source)
        if needs_weight:
            # In memory as nn.Linear has it, (E, O, I): a stacked layer's gradient is not copied.
            grad_weight = GroupedOuter.apply(ctx.kernel, offsets, grad, x, source).mT
        return None, None, grad_x, grad_weight, None


class GroupedOuter(torch.autograd.Function):
    """(E, I, O) the sums over each expert's rows of their outer products.

    It and :class:`GroupedLinear` are each other's gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        kernel: str,
        offsets: Tensor,
        x: Tensor,
        y: Tensor,
        source: Tensor | None = None,
    ) -> Tensor:
        ctx.kernel = kernel
        ctx.save_for_backward(x, y, offsets, source)
        return grouped_outer_product(x, y, offsets, kernel, source)

    @staticmethod
    @unbatched
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, y, offsets, source = ctx.saved_tensors
        needs_x, needs_y = ctx.needs_input_grad[2:4]
        grad_x = None
        grad_y = None
        if needs_x:
            grad_x = GroupedLinear.apply(ctx.kernel, offsets, y, grad.mT, source)
        if needs_y:
            grad_P = GroupedLinear.apply(ctx.kernel, offsets, x, grad)
            grad_y = _to_sources(grad_P, y, source)
        return None, None, grad_x, grad_y, None
