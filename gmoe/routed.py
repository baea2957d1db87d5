"""From tokens to tokens in one call: a mixture of linear layers, by the fastest of three ways.

Shapes: T tokens, E experts, P (token, expert) pairs sorted by expert, I in, O out features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gmoe._autograd import autocasts, first_order, operator, refuse_second_order
from gmoe._torch import is_watched
from gmoe.dispatch import (
    AT_ONCE,
    Backend,
    combine,
    dispatch,
    grouped_linear,
    grouped_outer_product,
    grouped_product,
    in_blocks,
    is_few,
)
from gmoe.places import has_one_pair_each, places_of
from gmoe.routing import Routing, expert_of_pairs


def _is_best_at_once(num_tokens: int, shape_EIO: Sequence[int]) -> bool:
    """True if the rows of all experts are best moved at once; see :data:`AT_ONCE`."""
    _, in_features, out_features = shape_EIO
    inputs = num_tokens * in_features
    return inputs <= AT_ONCE["inputs"] and inputs * out_features >= AT_ONCE["products"]


def routed_linear(
    parts: Sequence[Tensor],
    weight_EIO: Tensor,
    bias_EO: Tensor | None,
    routing: Routing,
    backend: Backend = "auto",
) -> Tensor:
    r"""(T, O) the mixture of E linear layers: gather, grouped product and weighted scatter.

    .. math:: y_t = \sum_e w_{te} (x_t W_e + b_e)

    On a CPU, the loop backend takes all three steps for one expert after the other: neither the
    rows nor the weighted outputs of all pairs are in memory at once. Of fewer tokens, ``"auto"``
    moves the rows of all experts at once (``gmoe.dispatch.AT_ONCE``); of few tokens
    (``gmoe.dispatch.FEW``), it runs all experts on all of them in one product. Either is faster
    there. FLOPs are counted
    (``gmoe.count_flops``) on the loop, which computes a token's own experts only. The result
    follows autocast.

    Args:
        parts: the tokens: one or several tensors (T, .) whose columns stand side by side.
        weight_EIO: stacked weights.
        bias_EO: stacked biases, or ``None``.
        routing: the pairs and their weights.
        backend: see :func:`grouped_linear`.
    """
    # 1. Where the kernel is not the loop: one step after the other.
    device = parts[0].device.type
    is_no_loop = device == "cuda" or torch.compiler.is_exporting()
    if is_no_loop or backend not in ("auto", "loop"):
        x_TI = parts[0] if len(parts) == 1 else torch.cat([*parts], dim=1)
        x_PI = dispatch(x_TI, routing)
        y_PO = grouped_linear(x_PI, weight_EIO, bias_EO, routing.offsets, backend)
        return combine(y_PO, routing)

    # 2. The dtype, which follows autocast.
    dtype = weight_EIO.dtype
    if autocasts(parts[0].device) and parts[0].dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    parts = [part.to(dtype) for part in parts]
    weight_EIO = weight_EIO.to(dtype)
    gate_P = routing.weight.to(dtype)

    # 3. The rows of all experts at once, all experts in one product, or one after the other.
    is_free = backend == "auto" and not is_watched()
    has_one_each = has_one_pair_each(routing)
    is_at_once = (
        is_free
        and has_one_each
        and device == "cpu"
        and _is_best_at_once(routing.num_tokens, weight_EIO.shape)
    )
    if is_free and not is_at_once and is_few(routing.num_tokens, weight_EIO.shape):
        if bias_EO is not None:
            bias_EO = bias_EO.to(dtype)
        return _in_one_product(parts, weight_EIO, bias_EO, gate_P, routing)
    kernel: Any = _RoutedAtOnce if is_at_once else _RoutedLinear
    place_T = places_of(routing.slot) if has_one_each else None
    return kernel.apply(
        routing.token, routing.offsets, place_T, gate_P, weight_EIO, bias_EO, *parts
    )


def _in_one_product(
    parts: Sequence[Tensor],
    weight_EIO: Tensor,
    bias_EO: Tensor | None,
    gate_P: Tensor,
    routing: Routing,
) -> Tensor:
    """(T, O) all experts on all tokens: one product of rows (T, E * I) with all weights.

    A token's row has E blocks: that of an expert holds the token times its gate, or zeros if the
    token does not go to the expert.
    """
    if bias_EO is not None:  # as the weight of a column of ones
        parts = [*parts, parts[0].new_ones(len(parts[0]), 1)]
        weight_EIO = torch.cat([weight_EIO, bias_EO[:, None]], dim=1)
    x_TI = torch.cat([*parts], dim=1)
    block_PI = gate_P[:, None] * x_TI.index_select(0, routing.token)
    rows_TX = in_blocks(block_PI, routing.token, routing.expert, len(x_TI), len(weight_EIO))
    y_TO = rows_TX @ weight_EIO.flatten(0, 1)
    if y_TO.requires_grad and not torch.compiler.is_compiling():  # compiled code refuses it itself
        y_TO.register_hook(refuse_second_order)
    return y_TO


# from tokens to tokens, one expert after the other ------------------------------------------------


def _empty_routed(
    weight: Tensor, _: Any, __: Any, parts: Sequence[Tensor], token: Tensor, *rest: Any
) -> Any:
    keeps_rows = rest[-1]
    num_rows = token.size(0) if keeps_rows else 0
    out_features = weight.size(2)
    out = weight.new_empty(parts[0].size(0), out_features)
    return out, weight.new_empty(num_rows, out_features)


@operator(fake=_empty_routed)
def _routed_linear(
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    parts: Sequence[Tensor],
    token: Tensor,
    offsets: Tensor,
    place: Tensor | None,
    keeps_rows: bool,
) -> tuple[Tensor, Tensor]:
    """(T, O) the sums, and (P, O) the experts' outputs before they are weighted.

    The latter has no rows unless ``keeps_rows``. ``place`` (T,) is the place of each token's pair,
    where each token has one: its row is fetched from there. To add rows to their tokens takes two
    to three times as long, and zeros to add to.
    """
    adds_rows = place is None
    sum_TO = weight.new_zeros(len(parts[0]) if adds_rows else 0, weight.size(2))
    y_PO = weight.new_empty(len(token) if keeps_rows or not adds_rows else 0, weight.size(2))
    ends = offsets[:-1].tolist()  # one host sync
    by_expert = zip(
        token.tensor_split(ends),
        gate[:, None].tensor_split(ends),
        y_PO.tensor_split(ends) if len(y_PO) else [None] * len(weight),
        _by_part(weight, parts),
        strict=True,
    )
    for expert, (tokens, gates, rows, weights) in enumerate(by_expert):
        # x W is the sum over the parts of x, each times its rows of W.
        y = torch.mm(parts[0].index_select(0, tokens), weights[0], out=rows)
        for x, weight_IO in zip(parts[1:], weights[1:], strict=True):
            y.addmm_(x.index_select(0, tokens), weight_IO)
        if bias is not None:
            y += bias[expert]
        if adds_rows:
            sum_TO.index_add_(0, tokens, y * gates)
    out_TO = sum_TO
    if place is not None:
        out_TO = y_PO.index_select(0, place).mul_(gate.index_select(0, place)[:, None])
    return out_TO, y_PO if keeps_rows else y_PO.new_empty(0, y_PO.size(1))


def _empty_gradients(
    _: Any, __: Any, weight: Tensor, bias: Any, gate: Tensor, parts: Sequence[Tensor], *rest: Any
) -> list[Tensor]:
    values = (gate, weight, bias, *parts)
    needs = rest[-1]
    return [
        value.new_empty(value.shape) for value, needed in zip(values, needs, strict=True) if needed
    ]


@operator(fake=_empty_gradients)
def _routed_linear_backward(
    grad: Tensor,
    y_PO: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    parts: Sequence[Tensor],
    token: Tensor,
    offsets: Tensor,
    place: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients of gate, weight, bias and parts, of those that need one."""
    values: tuple[Any, ...] = (gate, weight, bias)
    grad_gate, grad_weight, grad_bias = (
        value.new_empty(value.shape) if needed else None
        for value, needed in zip(values, needs[:3], strict=True)
    )
    # A row for each token, to which those of its pairs are added; or, where each token has one
    # pair, a row for each pair.
    new = Tensor.new_zeros if place is None else Tensor.new_empty
    grad_parts = [
        new(part, part.shape) if needed else None
        for part, needed in zip(parts, needs[3:], strict=True)
    ]
    ends = offsets[:-1].tolist()  # one host sync
    # If the gate needs no gradient, nothing is written to the gate's place in the loop.
    by_expert = zip(
        token.tensor_split(ends),
        gate[:, None].tensor_split(ends),
        y_PO.tensor_split(ends),
        (gate if grad_gate is None else grad_gate).tensor_split(ends),
        strict=True,
    )
    weights = _by_part(weight, parts)
    grad_weights = weights if grad_weight is None else _by_part(grad_weight, parts)
    grad_rows = [None if rows is None else rows.tensor_split(ends) for rows in grad_parts]
    for expert, (tokens, gates, y, grad_gates) in enumerate(by_expert):
        grad_y = grad.index_select(0, tokens)
        if grad_gate is not None:
            torch.linalg.vecdot(grad_y, y, out=grad_gates)
        grad_y.mul_(gates)
        if grad_bias is not None:
            torch.sum(grad_y, dim=0, out=grad_bias[expert])
        for part, x in enumerate(parts):
            if grad_weight is not None:
                torch.mm(x.index_select(0, tokens).T, grad_y, out=grad_weights[expert][part])
            grad_x, rows = grad_parts[part], grad_rows[part]
            if grad_x is None or rows is None:
                continue
            weight_OI = weights[expert][part].T
            if place is None:
                grad_x.index_add_(0, tokens, grad_y @ weight_OI)
            else:
                torch.mm(grad_y, weight_OI, out=rows[expert])
    if place is not None:
        grad_parts = [None if rows is None else rows.index_select(0, place) for rows in grad_parts]
    found = (grad_gate, grad_weight, grad_bias, *grad_parts)
    return [grad for grad in found if grad is not None]


class _RoutedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, token: Tensor, offsets: Tensor, place: Tensor | None, *values: Any
    ) -> Tensor:
        gate, weight, bias, *parts = values
        # The gate's gradient needs the experts' outputs before they are weighted.
        needs_gate = ctx.needs_input_grad[3]
        out_TO, y_PO = _routed_linear(weight, bias, gate, parts, token, offsets, place, needs_gate)
        ctx.save_for_backward(token, offsets, place, y_PO, *values)
        return out_TO

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> Any:
        token, offsets, place, y_PO, gate, weight, bias, *parts = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:]
        grads = iter(
            _routed_linear_backward(
                grad, y_PO, weight, bias, gate, parts, token, offsets, place, needs
            )
        )
        return None, None, None, *(next(grads) if needed else None for needed in needs)


# from tokens of one pair each to tokens, all experts at once --------------------------------------


class _RoutedAtOnce(torch.autograd.Function):
    """What :class:`_RoutedLinear` computes, by a few operators on the rows of all experts."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        # Not by name: without gradients, the compiler takes the context away from a method that has
        # as many parameters as it gets arguments.
        token, offsets, place, gate, weight, bias, *parts = inputs
        x_TI = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        x_PI = x_TI.index_select(0, token)
        y_PO = grouped_product(x_PI, weight, offsets, "loop")
        expert_P = expert_of_pairs(offsets, token)
        if bias is not None:
            y_PO = y_PO + bias.index_select(0, expert_P).to(y_PO.dtype)
        ctx.widths = [part.size(1) for part in parts]
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(token, offsets, place, expert_P, gate, weight, x_PI, y_PO)
        return (y_PO * gate[:, None]).index_select(0, place)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> Any:
        token, offsets, place, expert_P, gate, weight, x_PI, y_PO = ctx.saved_tensors
        *_, needs_gate, needs_weight, needs_bias = ctx.needs_input_grad[:6]
        needs_parts = any(ctx.needs_input_grad[6:])
        grad_PO = grad.index_select(0, token)
        grad_gate = torch.linalg.vecdot(grad_PO, y_PO) if needs_gate else None
        grad_PO = grad_PO * gate[:, None]
        grad_weight = (
            grouped_outer_product(x_PI, grad_PO, offsets, "loop") if needs_weight else None
        )
        grad_bias = None
        if needs_bias:
            exact_PO = grad_PO.to(torch.promote_types(grad_PO.dtype, torch.float32))
            zeros_EO = exact_PO.new_zeros(weight.size(0), weight.size(2))
            grad_bias = zeros_EO.index_add_(0, expert_P, exact_PO).to(ctx.bias_dtype)
        grad_parts: Any = [None] * len(ctx.widths)
        if needs_parts:
            grad_PI = grouped_product(grad_PO, weight.transpose(1, 2), offsets, "loop")
            grad_parts = grad_PI.index_select(0, place).split(ctx.widths, dim=1)
        return None, None, None, grad_gate, grad_weight, grad_bias, *grad_parts


def _by_part(weight_EIO: Tensor, parts: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """For each expert, the weight of each part of the input."""
    widths = [part.size(1) for part in parts]
    return list(zip(*(part.unbind() for part in weight_EIO.split(widths, dim=1)), strict=True))
