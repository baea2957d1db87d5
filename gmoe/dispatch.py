"""Tokens to experts and back. Shapes: T tokens, E experts, P pairs sorted by expert, I in, O out features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from gmoe._autograd import first_order
from gmoe._checks import check_choice
from gmoe.routing import Routing

Backend: TypeAlias = Literal["auto", "grouped", "padded", "loop"]


def dispatch(x_TI: Tensor, routing: Routing, experts: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    r"""Gather the tokens, run the experts on their own, and add up: :math:`y_t = \sum_{e} w_{te} f_e(x_t)`.

    Args:
        x_TI: (T, I) tokens.
        routing: who goes where.
        experts: called as ``experts(x_PI, offsets_E)`` on pairs sorted by expert, returns (P, O).

    Returns:
        (T, O); zero where a token has no expert.
    """
    y_PO = experts(x_TI.index_select(0, routing.token), routing.offsets)
    return combine(y_PO, routing)


def combine(y_PO: Tensor, routing: Routing) -> Tensor:
    """(T, O) the weighted sum of the experts' outputs over each token's pairs."""
    weighted_PO = y_PO * routing.weight.to(y_PO.dtype)[:, None]
    return weighted_PO.new_zeros(routing.num_tokens, y_PO.size(1)).index_add(0, routing.token, weighted_PO)


def grouped_linear(
    x_PI: Tensor, weight_EIO: Tensor, bias_EO: Tensor | None, offsets_E: Tensor, backend: Backend = "auto"
) -> Tensor:
    """(P, O) a linear layer whose weight depends on the row: rows ``offsets[e - 1]:offsets[e]`` meet expert ``e``'s.

    Args:
        x_PI: rows sorted by expert.
        weight_EIO: stacked weights.
        bias_EO: stacked biases, or ``None``.
        offsets_E: (E,) int32 cumulative ends; the last is P.
        backend: all give the same result and gradients.

            - ``"loop"``: one matmul per expert, written in place. One host sync.
            - ``"padded"``: one ``bmm`` over all experts, padded to the largest load. One host sync.
            - ``"grouped"``: ``torch.nn.functional.grouped_mm``; no host sync where torch has a kernel for it (bfloat16
              on recent CUDA devices), a loop of torch's own elsewhere. float64, which it refuses, runs as ``"loop"``;
              widths that its alignment rule refuses are padded with zeros.
            - ``"auto"`` (default): ``"grouped"`` on CUDA, else ``"loop"``.

    Follows autocast as ``nn.Linear`` does. Can be differentiated once.

    Raises:
        ValueError: an unknown backend.
    """
    check_choice("backend", backend, get_args(Backend))
    device = x_PI.device.type
    if torch.is_autocast_enabled(device) and x_PI.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x_PI, weight_EIO = x_PI.to(dtype), weight_EIO.to(dtype)
        bias_EO = None if bias_EO is None else bias_EO.to(dtype)
    return _run(x_PI, weight_EIO, bias_EO, offsets_E, resolve_backend(backend, x_PI))


def rounded(routing: Routing, x: Tensor) -> Routing:
    """The routing with loads rounded up, by pairs of weight zero, to few values; its pairs are no longer distinct.

    In bfloat16 on the CPU, oneDNN compiles a kernel for each size that it has not kept, which takes longer than the
    product itself (1,000 rows, 96 to 192). Loads of tokens that choose are new in each step. Rounding adds at most a
    16th of the rows. Elsewhere, and where all loads are the same, the routing is returned as it is.
    """
    pairs, num_experts = routing.token.numel(), routing.num_experts
    multiple = 1 << max(pairs // (16 * num_experts), 1).bit_length() - 1
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or multiple == 1:
        return routing
    load_E = routing.load
    if bool((load_E == load_E[0]).all()):
        return routing
    rounded_E = (load_E + multiple - 1) // multiple * multiple
    expert_R = torch.arange(num_experts).repeat_interleave(rounded_E)
    slot_R = torch.arange(expert_R.numel()) - (rounded_E.cumsum(0) - rounded_E)[expert_R]
    real_R = slot_R < load_E[expert_R]
    source_R = (routing.offsets.long() - load_E)[expert_R] + slot_R * real_R  # else the expert's first pair
    weight_R = torch.where(real_R, routing.weight.index_select(0, source_R), 0.0)
    token_R, offsets_E = routing.token.index_select(0, source_R), rounded_E.cumsum(0).to(torch.int32)
    return replace(routing, token=token_R, offsets=offsets_E, weight=weight_R)


def resolve_backend(backend: Backend, x: Tensor) -> Literal["grouped", "padded", "loop"]:
    """What ``"auto"`` stands for on this device, and what stands in for ``"grouped"`` where that has no kernel."""
    if backend == "auto":
        backend = "grouped" if x.device.type == "cuda" else "loop"
    return "loop" if backend == "grouped" and x.dtype == torch.float64 else backend


@torch.compiler.disable  # the sizes depend on the data; and torch.compile refuses grouped_mm in float32
def _run(x_PI: Tensor, weight_EIO: Tensor, bias_EO: Tensor | None, offsets_E: Tensor, backend: Backend) -> Tensor:
    with torch.autocast(x_PI.device.type, enabled=False):
        if backend == "loop":
            y_PO: Tensor = _Loop.apply(x_PI, weight_EIO, bias_EO, offsets_E)
            return y_PO
        multiply = _padded_mm if backend == "padded" else _GroupedMM.apply
        y_PO = multiply(x_PI, weight_EIO, offsets_E)
        if bias_EO is None:
            return y_PO
        return y_PO + bias_EO.repeat_interleave(_load(offsets_E), dim=0, output_size=x_PI.size(0))


def _load(offsets_E: Tensor) -> Tensor:
    return offsets_E.diff(prepend=offsets_E.new_zeros(1)).long()


class _Loop(torch.autograd.Function):
    """One matmul per expert. Each writes its slice of the result: no (P, O) copy, no stacking of gradients."""

    @staticmethod
    def forward(ctx: Any, x_PI: Tensor, weight_EIO: Tensor, bias_EO: Tensor | None, offsets_E: Tensor) -> Tensor:
        ends = offsets_E.tolist()
        ctx.save_for_backward(x_PI, weight_EIO)
        ctx.slices = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        ctx.has_bias = bias_EO is not None
        y_PO = x_PI.new_empty(x_PI.size(0), weight_EIO.size(2))
        for expert, rows in enumerate(ctx.slices):
            if bias_EO is None:
                torch.mm(x_PI[rows], weight_EIO[expert], out=y_PO[rows])
            else:
                torch.addmm(bias_EO[expert], x_PI[rows], weight_EIO[expert], out=y_PO[rows])
        return y_PO

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_PO: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x_PI, weight_EIO = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_PO = grad_PO.contiguous()
        grad_x = torch.empty_like(x_PI) if needs_x else None
        grad_weight = torch.empty_like(weight_EIO) if needs_weight else None
        grad_bias = weight_EIO.new_empty(weight_EIO.size(0), weight_EIO.size(2)) if needs_bias else None
        for expert, rows in enumerate(ctx.slices):
            if grad_x is not None:
                torch.mm(grad_PO[rows], weight_EIO[expert].T, out=grad_x[rows])
            if grad_weight is not None:  # zero where the expert has no rows
                torch.mm(x_PI[rows].T, grad_PO[rows], out=grad_weight[expert])
            if grad_bias is not None:
                torch.sum(grad_PO[rows], dim=0, out=grad_bias[expert])
        return grad_x, grad_weight, grad_bias, None


def _padded_mm(x_PI: Tensor, weight_EIO: Tensor, offsets_E: Tensor) -> Tensor:
    """All experts in one ``bmm``, each padded to the largest load."""
    load_E = _load(offsets_E)
    num_experts, capacity = load_E.numel(), int(load_E.max()) if x_PI.size(0) else 0
    start_P = (offsets_E.long() - load_E).repeat_interleave(load_E)
    expert_P = torch.arange(num_experts, device=x_PI.device).repeat_interleave(load_E)
    slot_P = expert_P * capacity + torch.arange(x_PI.size(0), device=x_PI.device) - start_P
    x_ECI = x_PI.new_zeros(num_experts * capacity, x_PI.size(1)).index_copy(0, slot_P, x_PI)
    y_ECO = torch.bmm(x_ECI.view(num_experts, capacity, x_PI.size(1)), weight_EIO)
    return y_ECO.flatten(0, 1).index_select(0, slot_P)


class _GroupedMM(torch.autograd.Function):
    """``grouped_mm`` behind what it refuses: unaligned widths and expanded gradients."""

    @staticmethod
    def forward(ctx: Any, x_PI: Tensor, weight_EIO: Tensor, offsets_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_PI, weight_EIO, offsets_E)
        return _grouped(x_PI, weight_EIO, offsets_E)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_PO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_PI, weight_EIO, offsets_E = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        grad_x = _grouped(grad_PO, weight_EIO.transpose(1, 2), offsets_E) if needs_x else None
        grad_weight = None
        if needs_weight:
            a_IP, b_PO = _aligned(x_PI).T, _aligned(grad_PO)
            if x_PI.size(0) == 0:
                grad_weight = torch.zeros_like(weight_EIO)
            else:
                full_EIO = F.grouped_mm(a_IP, b_PO, offs=offsets_E)
                grad_weight = full_EIO[:, : weight_EIO.size(1), : weight_EIO.size(2)]
                # an empty group's product is zero, whether or not the kernel writes it
                grad_weight = torch.where((_load(offsets_E) > 0)[:, None, None], grad_weight, 0.0)
        return grad_x, grad_weight, None


def _grouped(x_PI: Tensor, weight_EIO: Tensor, offsets_E: Tensor) -> Tensor:
    if x_PI.size(0) == 0:
        return x_PI.new_zeros(0, weight_EIO.size(2))
    x_PI = _aligned(x_PI)
    step = 16 // x_PI.element_size()
    missing_in, missing_out = -weight_EIO.size(1) % step, -weight_EIO.size(2) % step
    aligned_EIO = F.pad(weight_EIO, (0, missing_out, 0, missing_in)) if missing_in or missing_out else weight_EIO
    return F.grouped_mm(x_PI, aligned_EIO, offs=offsets_E)[:, : weight_EIO.size(2)].contiguous()


def _aligned(x_PI: Tensor) -> Tensor:
    """Rows that start at multiples of 16 bytes, zeros behind the true width."""
    missing = -x_PI.size(1) % (16 // x_PI.element_size())
    return F.pad(x_PI, (0, missing)) if missing else x_PI.contiguous()
