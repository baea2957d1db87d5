"""A linear layer per expert, from tokens to tokens in one step. Shapes: T tokens, E experts, P pairs, I in, O out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gmoe._autograd import first_order
from gmoe.dispatch import Backend, dispatch, grouped_linear, resolve_backend, rounded
from gmoe.routing import Routing


def routed_linear(
    parts: Sequence[Tensor],
    weight_EIO: Tensor,
    bias_EO: Tensor | None,
    routing: Routing,
    backend: Backend = "auto",
) -> Tensor:
    r"""(T, O) :math:`y_t = \sum_e w_{te} (x_t W_e + b_e)`: gather, grouped product and weighted scatter.

    With the loop backend all in one step, one expert after the other, without a (P, I) or (P, O) tensor. Neither is
    needed for the gradients: that of a weight is :math:`\bar y_t \cdot (x_t W_e + b_e) = (\bar y_t W_e^\top) \cdot
    x_t + \bar y_t \cdot b_e`. Follows autocast. Can be differentiated once.

    Args:
        parts: x in parts, each (T, I_i), whose widths add up to I: with the loop backend they are not joined.
        weight_EIO: stacked weights.
        bias_EO: stacked biases, or ``None``.
        routing: who goes where.
        backend: see :func:`gmoe.dispatch.grouped_linear`.
    """
    if resolve_backend(backend, parts[0]) == "loop":
        return _in_one_step(parts, weight_EIO, bias_EO, routing)
    x_TI = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=-1)
    return dispatch(x_TI, routing, lambda x, offsets: grouped_linear(x, weight_EIO, bias_EO, offsets, backend))


@torch.compiler.disable  # the sizes depend on the data
def _in_one_step(parts: Sequence[Tensor], weight_EIO: Tensor, bias_EO: Tensor | None, routing: Routing) -> Tensor:
    device = parts[0].device.type
    if torch.is_autocast_enabled(device) and parts[0].dtype != torch.float64:
        weight_EIO = weight_EIO.to(torch.get_autocast_dtype(device))
    dtype = weight_EIO.dtype
    parts = [part.to(dtype) for part in parts]
    bias_EO = None if bias_EO is None else bias_EO.to(dtype)
    routing = rounded(routing, parts[0])
    with torch.autocast(device, enabled=False):
        out: Tensor = _RoutedLinear.apply(routing, routing.weight.to(dtype), weight_EIO, bias_EO, *parts)
    return out


class _RoutedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, routing: Routing, gate_P: Tensor, weight_EIO: Tensor, bias_EO: Tensor | None, *parts: Tensor
    ) -> Tensor:
        ends = routing.offsets.tolist()
        ctx.slices = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        ctx.widths = [part.size(1) for part in parts]
        ctx.save_for_backward(routing.token, gate_P, weight_EIO, bias_EO, *parts)
        out_TO = gate_P.new_zeros(routing.num_tokens, weight_EIO.size(2))
        for expert, pairs in enumerate(ctx.slices):
            token = routing.token[pairs]
            y = gate_P.new_zeros(len(token), weight_EIO.size(2)) if bias_EO is None else bias_EO[expert]
            for part, weight in zip(parts, weight_EIO[expert].split(ctx.widths), strict=True):
                y = torch.addmm(y, part.index_select(0, token), weight)
            out_TO.index_add_(0, token, y.mul_(gate_P[pairs, None]))
        return out_TO

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        token_P, gate_P, weight_EIO, bias_EO, *parts = ctx.saved_tensors
        _, needs_gate, needs_weight, needs_bias, *needs_parts = ctx.needs_input_grad
        grad_gate = torch.empty_like(gate_P) if needs_gate else None
        grad_weight = torch.empty_like(weight_EIO) if needs_weight else None
        grad_bias = torch.empty_like(bias_EO) if needs_bias else None
        grad_parts = [
            torch.zeros_like(part) if needed else None for part, needed in zip(parts, needs_parts, strict=True)
        ]
        for expert, pairs in enumerate(ctx.slices):
            token, gate = token_P[pairs], gate_P[pairs, None]
            grad = grad_TO.index_select(0, token)
            if grad_gate is not None:
                at_gate = grad_gate[pairs].zero_() if bias_EO is None else torch.mv(grad, bias_EO[expert])
            scaled = grad * gate
            if grad_bias is not None:
                torch.sum(scaled, dim=0, out=grad_bias[expert])
            first = 0
            for part, grad_part in zip(parts, grad_parts, strict=True):
                columns = slice(first, first + part.size(1))
                first = columns.stop
                x = part.index_select(0, token)
                if grad_weight is not None:
                    torch.mm(x.T, scaled, out=grad_weight[expert, columns])
                if grad_gate is None and grad_part is None:
                    continue
                back = grad @ weight_EIO[expert, columns].T
                if grad_gate is not None:
                    at_gate = at_gate + x.mul_(back).sum(dim=1)
                if grad_part is not None:
                    grad_part.index_add_(0, token, back.mul_(gate))
            if grad_gate is not None:
                grad_gate[pairs] = at_gate
        return None, grad_gate, grad_weight, grad_bias, *grad_parts
