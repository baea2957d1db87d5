"""The mixture of linear layers, from tokens to tokens: one function a road.

Shapes: T tokens, E experts, K experts per token, P (token, expert) pairs sorted by expert, I in, O
out features, F = E O.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gmoe._autograd import autocasts, gradients_of, operator, unbatched
from gmoe._torch import is_watched
from gmoe.blocks import AtRows, expert_of_rows
from gmoe.portable import exported_as
from gmoe.products import GroupedLinear, combine, dispatch, grouped_linear, kernel_for
from gmoe.routing import Routing

AT_ONCE = 2**14
"""Up to so many inputs an expert, P / E * I, :func:`routed_linear` moves the rows of all at once.

More are faster expert by expert, in rows that fit the caches: measured for 4 to 64 experts. Up to
there, one operator for all three steps would take 1 to 8 % less of a whole step.
"""

WIDE = 2**10
"""Compiled code moves rows of fewer columns by itself: measured for 64, 300 and 1,433."""

FEW_NUMBERS = 2**16
"""Up to so many numbers, T E (I + O), :func:`routed_linear` runs all experts on all tokens.

That is on a CPU. One product takes less time than to sort the pairs and move their rows: measured
for 30 to 2,708 tokens of 16 to 300 features and 8 experts, where both take as long at 2**16.2 to
2**16.5. What is not finite does not stay with its expert there: 0 times NaN is NaN.
"""

FEW_NUMBERS_ON_GPU = 2**22
"""The same on a GPU, which multiplies faster than it starts kernels; chosen, not yet measured."""


def routed_linear(
    parts: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias_EO: Tensor | None,
    routing: Routing,
) -> Tensor:
    r"""(T, O) the mixture of E linear layers: gather, grouped product and weighted scatter.

    .. math:: y_t = \sum_e w_{te} (x_t W_e + b_e)

    Few tokens run all experts in one product (``gmoe.routed.FEW_NUMBERS``). Off the CPU, others are
    copied straight into blocks of one expert. On a CPU with many inputs (``gmoe.routed.AT_ONCE``),
    all three steps are one, for one expert after the other, so that neither the rows nor the
    weighted outputs of all pairs are in memory at once. The result follows autocast.

    Args:
        parts: the tokens: one or several tensors (T, I), whose products are added.
        weights: the stacked weights of each part, (E, O, I) as ``nn.Linear`` has them.
        bias_EO: stacked biases, or ``None``.
        routing: the pairs and their weights.
    """
    # 1. The dtype, which follows autocast.
    device = parts[0].device
    dtype = weights[0].dtype
    if autocasts(device) and parts[0].dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
    parts = [part.to(dtype) for part in parts]

    # 2. Few rows: all experts of all tokens in one product.
    width = sum(weight.size(2) for weight in weights) + weights[0].size(1)
    if are_few_numbers(parts[0], routing, width):
        return _by_all_experts(*_side_by_side(parts, weights, dtype), bias_EO, routing)

    # 3. Off the CPU, and where rows are few or a compiler fuses them: in blocks, or one step after
    # the other.
    kernel = kernel_for(parts[0])
    if kernel == "padded":
        return _in_blocks(*_side_by_side(parts, weights, dtype), bias_EO, routing)
    if kernel != "loop" or _are_fused(parts) or _are_few(parts, routing):
        x_TI, weight_EOI = _side_by_side(parts, weights, dtype)
        rows_PI = dispatch(x_TI, routing)
        y_PO = grouped_linear(rows_PI, weight_EOI.mT, bias_EO, routing.offsets)
        return combine(y_PO, routing)

    # 4. Many on a CPU: all three steps in one.
    place_T = routing.place if routing.pairs_each == 1 else None
    return _RoutedLinear.apply(
        routing.token,
        routing.offsets,
        place_T,
        routing.weight.to(dtype),
        bias_EO,
        *(weight_EOI.to(dtype) for weight_EOI in weights),
        *parts,
    )


def _are_fused(parts: Sequence[Tensor]) -> bool:
    """True in compiled code, for rows that are narrow: it moves them with what is around."""
    return torch.compiler.is_compiling() and len(parts) == 1 and parts[0].size(1) < WIDE


def _are_few(parts: Sequence[Tensor], routing: Routing) -> bool:
    """True if the rows of all experts are best moved at once; see :data:`AT_ONCE`."""
    if torch.compiler.is_compiling() and routing.pairs_each is None:
        return False  # their number may follow from the data
    width = sum(part.size(1) for part in parts)
    return routing.token.size(0) * width <= AT_ONCE * routing.num_experts


@exported_as(lambda *_: False)  # how many tokens there are is not known
def are_few_numbers(x_TI: Tensor, routing: Routing, width: int) -> bool:
    """True if all experts of all tokens cost less than moving rows; see :data:`FEW_NUMBERS`.

    Not where a token may have no expert, which then must not meet one; nor in float16, where those
    that it did not choose may overflow. Never while operators are counted: the FLOPs of a layer are
    those of K experts.

    Args:
        x_TI: the tokens.
        routing: their experts.
        width: inputs and outputs of an expert.
    """
    if not routing.pairs_each or x_TI.dtype == torch.float16 or is_watched():
        return False
    few = FEW_NUMBERS if x_TI.device.type == "cpu" else FEW_NUMBERS_ON_GPU
    return x_TI.size(0) * routing.num_experts * width <= few


def _side_by_side(
    parts: Sequence[Tensor], weights: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Several parts and their weights as one."""
    if len(parts) == 1:
        return parts[0], weights[0].to(dtype)
    return torch.cat([*parts], dim=1), torch.cat([*weights], dim=2).to(dtype)


def _by_all_experts(
    x_TI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, routing: Routing
) -> Tensor:
    """(T, O) the mixture, from each expert's output for each token: no pair has to be sorted."""
    num_experts, out_features, _ = weight_EOI.shape
    bias_F = None if bias_EO is None else bias_EO.to(x_TI.dtype).flatten()
    y_TF = F.linear(x_TI, weight_EOI.flatten(0, 1), bias_F)
    y_TEO = y_TF.view(-1, num_experts, out_features)
    weight_TE = routing.to_dense().to(y_TEO.dtype)
    return torch.bmm(weight_TE[:, None], y_TEO).squeeze(1)


def _in_blocks(
    x_TI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, routing: Routing
) -> Tensor:
    """(T, O) the mixture, from rows that are copied straight into blocks of one expert."""
    choices, blocks = routing.by_token, routing.blocks
    if choices is None:  # tokens have any number of pairs
        rows_PI = AtRows.apply(x_TI, routing.token)
        return combine(blocks.linear(rows_PI, weight_EOI.mT, bias_EO), routing)
    num_tokens, k = choices.weight_TK.shape
    weight_TK = choices.weight_TK.to(x_TI.dtype)
    slots_PI = x_TI if k == 1 else x_TI[:, None].expand(-1, k, -1).flatten(0, 1)
    y_PO = blocks.linear(slots_PI, weight_EOI.mT, bias_EO)
    if k == 1:
        return y_PO * weight_TK
    return (y_PO.view(num_tokens, k, -1) * weight_TK[:, :, None]).sum(dim=1)


# on a CPU ----------------------------------------------------------------------------------------


def _empty_routed(gate: Tensor, _: Any, weights: Sequence[Tensor], *rest: Any) -> Any:
    parts, token, _, _, keeps_rows = rest
    out_features = weights[0].size(1)
    num_rows = token.size(0) if keeps_rows else 0
    out = gate.new_empty(parts[0].size(0), out_features)
    return out, gate.new_empty(num_rows, out_features)


@operator(fake=_empty_routed)
def _routed_linear(
    gate: Tensor,
    bias: Tensor | None,
    weights: Sequence[Tensor],
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
    width = weights[0].size(1)
    sum_TO = gate.new_zeros(len(parts[0]) if adds_rows else 0, width)
    # Rows that nothing keeps unless they are asked for.
    y_PO = gate.new_empty(len(token) if keeps_rows or not adds_rows else 0, width)
    ends = offsets[:-1].tolist()  # one host sync
    by_expert = zip(
        token.tensor_split(ends),
        gate[:, None].tensor_split(ends),
        y_PO.tensor_split(ends) if len(y_PO) else [None] * len(offsets),
        zip(*weights, strict=True),
        strict=True,
    )
    for expert, (tokens, gates, rows, of_parts) in enumerate(by_expert):
        y = torch.mm(parts[0].index_select(0, tokens), of_parts[0].T, out=rows)
        for x, weight_OI in zip(parts[1:], of_parts[1:], strict=True):
            y.addmm_(x.index_select(0, tokens), weight_OI.T)
        if bias is not None:
            y += bias[expert]
        if adds_rows:
            sum_TO.index_add_(0, tokens, y * gates)
    out_TO = sum_TO
    if place is not None:
        out_TO = y_PO.index_select(0, place).mul_(gate.index_select(0, place)[:, None])
    return out_TO, y_PO if keeps_rows else y_PO.new_empty(0, width)


def _empty_gradients(
    _: Any, __: Any, gate: Tensor, bias: Any, weights: Sequence[Tensor], *rest: Any
) -> list[Tensor]:
    parts, *_, needs = rest
    values = (gate, bias, *weights, *parts)
    return [
        value.new_empty(value.shape) for value, needed in zip(values, needs, strict=True) if needed
    ]


@operator(fake=_empty_gradients)
def _routed_linear_backward(
    grad: Tensor,
    y_PO: Tensor,
    gate: Tensor,
    bias: Tensor | None,
    weights: Sequence[Tensor],
    parts: Sequence[Tensor],
    token: Tensor,
    offsets: Tensor,
    place: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients of gate, bias, weights and parts, of those that need one.

    One expert after the other, whose rows are all that is in memory.
    """
    needs_gate, needs_bias, *needs_each = needs
    needs_weights, needs_parts = needs_each[: len(parts)], needs_each[len(parts) :]
    grad_gate = gate.new_empty(gate.shape) if needs_gate else None
    grad_bias = bias.new_empty(bias.shape) if bias is not None and needs_bias else None
    grad_weights = [
        weight.new_empty(weight.shape) if needed else None
        for weight, needed in zip(weights, needs_weights, strict=True)
    ]
    # A row for each token, to which those of its pairs are added; or, where each token has one
    # pair, a row for each pair.
    new = Tensor.new_zeros if place is None else Tensor.new_empty
    grad_parts = [
        new(part, part.shape) if needed else None
        for part, needed in zip(parts, needs_parts, strict=True)
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
    grad_rows = [None if rows is None else rows.tensor_split(ends) for rows in grad_parts]
    for expert, (tokens, gates, y, grad_gates) in enumerate(by_expert):
        grad_y = grad.index_select(0, tokens)
        if grad_gate is not None:
            torch.linalg.vecdot(grad_y, y, out=grad_gates)
        grad_y.mul_(gates)
        if grad_bias is not None:
            torch.sum(grad_y, dim=0, out=grad_bias[expert])
        for part, x in enumerate(parts):
            grad_weight, grad_x, rows = grad_weights[part], grad_parts[part], grad_rows[part]
            if grad_weight is not None:
                torch.mm(grad_y.T, x.index_select(0, tokens), out=grad_weight[expert])
            if grad_x is None or rows is None:
                continue
            weight_OI = weights[part][expert]
            if place is None:
                grad_x.index_add_(0, tokens, grad_y @ weight_OI)
            else:
                torch.mm(grad_y, weight_OI, out=rows[expert])
    if place is not None:
        grad_parts = [None if rows is None else rows.index_select(0, place) for rows in grad_parts]
    found = [grad_gate, grad_bias, *grad_weights, *grad_parts]
    return [grad for grad in found if grad is not None]


class _RoutedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, token: Tensor, offsets: Tensor, place: Tensor | None, *values: Any
    ) -> Tensor:
        gate, bias, weights, parts = _sorted(values)
        # The gate's gradient needs the experts' outputs before they are weighted.
        needs_gate = ctx.needs_input_grad[3]
        out_TO, y_PO = _routed_linear(gate, bias, weights, parts, token, offsets, place, needs_gate)
        ctx.save_for_backward(token, offsets, place, y_PO, *values)
        return out_TO

    @staticmethod
    @unbatched
    def backward(ctx: Any, grad: Tensor) -> Any:
        token, offsets, place, y_PO, *values = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():  # this pass is differentiated itself

            def plain(*views: Tensor) -> Tensor:
                return _linear_by_steps(token, offsets, *views)

            return None, None, None, *gradients_of(plain, values, needs, grad)
        grads = iter(
            _routed_linear_backward(grad, y_PO, *_sorted(values), token, offsets, place, needs)
        )
        return None, None, None, *(next(grads) if needed else None for needed in needs)


def _linear_by_steps(token: Tensor, offsets: Tensor, *values: Any) -> Tensor:
    """What :class:`_RoutedLinear` computes, of functions that can be differentiated twice."""
    gate, bias, weights, parts = _sorted(values)
    products = [
        GroupedLinear.apply("loop", offsets, part.index_select(0, token), weight.mT)
        for part, weight in zip(parts, weights, strict=True)
    ]
    y_PO: Tensor = sum(products[1:], start=products[0])
    if bias is not None:
        y_PO = y_PO + bias.index_select(0, expert_of_rows(offsets, token.numel()))
    zeros_TO = y_PO.new_zeros(len(parts[0]), y_PO.size(1))
    return zeros_TO.index_add(0, token, y_PO * gate[:, None])


def _sorted(values: Sequence[Any]) -> tuple[Tensor, Tensor | None, list[Tensor], list[Tensor]]:
    """Gate, bias, the weights, and as many parts."""
    gate, bias, *rest = values
    return gate, bias, rest[: len(rest) // 2], rest[len(rest) // 2 :]
