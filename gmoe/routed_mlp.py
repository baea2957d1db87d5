"""A perceptron per expert, from tokens to tokens in one step.

Shapes: T tokens, E experts, P pairs, I in, H hidden, O out features; U = H, or 2 H before a gate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gmoe._autograd import first_order
from gmoe.dispatch import rounded
from gmoe.routing import Routing

DERIVATIVES: dict[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]] = {
    F.gelu: torch.ops.aten.gelu_backward.default,
    F.relu: lambda grad, u: torch.ops.aten.threshold_backward(grad, u, 0),
    F.silu: torch.ops.aten.silu_backward.default,
}
"""Of the usual activations, from the gradient of the output and the input to that of the input; others go by autograd,
whose overhead is felt where there are many experts."""


@torch.compiler.disable  # the sizes depend on the data
def routed_mlp(
    x_TI: Tensor,
    up_EIU: Tensor,
    up_bias_EU: Tensor | None,
    down_EHO: Tensor,
    down_bias_EO: Tensor | None,
    activation: Callable[[Tensor], Tensor],
    routing: Routing,
) -> Tensor:
    r"""(T, O) :math:`y_t = \sum_e w_{te} (\phi(x_t W_e + b_e) V_e + c_e)`, one expert after the other.

    An expert's slice of the hidden layer is small enough to stay in cache, and the only large tensor that is kept for
    the backward pass is the hidden layer before its activation, which is applied again there. The gradient of a weight
    needs no output either: :math:`\bar y_t \cdot (h V_e + c_e) = (\bar y_t V_e^\top) \cdot h + \bar y_t \cdot c_e`.
    Follows autocast. Can be differentiated once. One host sync.

    Args:
        x_TI: tokens.
        up_EIU, up_bias_EU: the first layers, stacked.
        down_EHO, down_bias_EO: the second layers, stacked.
        activation: from (n, U) to (n, H), without parameters and without chance.
        routing: who goes where.
    """
    device = x_TI.device.type
    if torch.is_autocast_enabled(device) and x_TI.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x_TI, up_EIU, down_EHO = x_TI.to(dtype), up_EIU.to(dtype), down_EHO.to(dtype)
        up_bias_EU, down_bias_EO = (None if bias is None else bias.to(dtype) for bias in (up_bias_EU, down_bias_EO))
    routing = rounded(routing, x_TI)
    gate_P = routing.weight.to(x_TI.dtype)
    with torch.autocast(device, enabled=False):
        out: Tensor = _RoutedMLP.apply(routing, activation, x_TI, gate_P, up_EIU, up_bias_EU, down_EHO, down_bias_EO)
    return out


class _RoutedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        routing: Routing,
        activation: Callable[[Tensor], Tensor],
        x_TI: Tensor,
        gate_P: Tensor,
        up_EIU: Tensor,
        up_bias_EU: Tensor | None,
        down_EHO: Tensor,
        down_bias_EO: Tensor | None,
    ) -> Tensor:
        ends = routing.offsets.tolist()
        ctx.slices = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        ctx.activation = activation
        keep = any(ctx.needs_input_grad)
        hidden = []
        out_TO = gate_P.new_zeros(routing.num_tokens, down_EHO.size(2))
        for expert, pairs in enumerate(ctx.slices):
            token = routing.token[pairs]
            u = _linear(x_TI.index_select(0, token), up_EIU[expert], up_bias_EU, expert)
            y = _linear(activation(u), down_EHO[expert], down_bias_EO, expert)
            out_TO.index_add_(0, token, y.mul_(gate_P[pairs, None]))
            if keep:
                hidden.append(u)
        ctx.save_for_backward(routing.token, x_TI, gate_P, up_EIU, up_bias_EU, down_EHO, down_bias_EO, *hidden)
        return out_TO

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        token_P, x_TI, gate_P, up_EIU, up_bias_EU, down_EHO, down_bias_EO, *hidden = ctx.saved_tensors
        grads = [
            torch.empty_like(value) if needed else None
            for value, needed in zip(
                (gate_P, up_EIU, up_bias_EU, down_EHO, down_bias_EO), ctx.needs_input_grad[3:], strict=True
            )
        ]
        grad_gate, grad_up, grad_up_bias, grad_down, grad_down_bias = grads
        grad_x = torch.zeros_like(x_TI) if ctx.needs_input_grad[2] else None
        below = grad_x is not None or grad_up is not None or grad_up_bias is not None
        for expert, pairs in enumerate(ctx.slices):
            token, gate = token_P[pairs], gate_P[pairs, None]
            grad = grad_TO.index_select(0, token)
            derivative = DERIVATIVES.get(ctx.activation)
            u = hidden[expert].detach().requires_grad_(below and derivative is None)
            with torch.set_grad_enabled(u.requires_grad):
                h = ctx.activation(u)
            grad_h = grad @ down_EHO[expert].T
            if grad_gate is not None:
                at_gate = torch.linalg.vecdot(grad_h, h.detach())
                grad_gate[pairs] = at_gate if down_bias_EO is None else at_gate.addmv_(grad, down_bias_EO[expert])
            grad.mul_(gate)
            if grad_down is not None:
                torch.mm(h.detach().T, grad, out=grad_down[expert])
            if grad_down_bias is not None:
                torch.sum(grad, dim=0, out=grad_down_bias[expert])
            if not below:
                continue
            grad_h.mul_(gate)
            if derivative is None:
                h.backward(grad_h)  # not autograd.grad, in which hooks of a FLOP counter cannot run
            grad_u = u.grad if derivative is None else derivative(grad_h, u)
            if grad_up is not None:
                torch.mm(x_TI.index_select(0, token).T, grad_u, out=grad_up[expert])
            if grad_up_bias is not None:
                torch.sum(grad_u, dim=0, out=grad_up_bias[expert])
            if grad_x is not None:
                grad_x.index_add_(0, token, grad_u @ up_EIU[expert].T)
        return None, None, grad_x, *grads


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, expert: int) -> Tensor:
    return x @ weight if bias is None else torch.addmm(bias[expert], x, weight)
