"""Sums over messages along edges, and products of their ends.

Shapes: M messages (B of them in a block), U senders, R receivers, H heads, G heads of the senders
(H, or 1 that all heads share), C width.

The kernels are operators of torch (``torch.ops.gmoe``), opaque to ``torch.compile``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gmoe import portable
from gmoe._autograd import operator, unbatched
from gmoe.edges import Edges
from gmoe.portable import exported_as

# Once a process, torch warns that sparse CSR matrices are in beta. Make one here, so that users do
# not get the warning from a layer.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0], [], [], (0, 0), check_invariants=False)

SPARSE_DEVICES = ("cpu",)
"""Devices on which torch's own sums and products along edges beat gathered blocks of messages."""

NUMBERS = 2**21
"""Numbers in a block of messages on a CPU: they fit its caches, and need no fresh pages."""

NUMBERS_ON_GPU = 2**26
"""The same on a GPU: enough to fill it."""


def weighted_sum(weight_MH: Tensor, value_UGC: Tensor, edges: Edges) -> Tensor:
    r"""(R, H, C) the sum of each receiver's messages.

    .. math:: y_{rh} = \sum_{m \to r} w_{mh} v_{u(m) h}

    Args:
        weight_MH: (M, H) the messages' weights.
        value_UGC: (U, H, C) the senders' values, or (U, 1, C) if all heads share them.
        edges: the messages.
    """
    _transpose_where_compiled(edges)
    return _WeightedSum.apply(weight_MH, value_UGC, edges)


def dot(query_RHC: Tensor, key_UGC: Tensor, edges: Edges) -> Tensor:
    r"""(M, H) the dot product of the two ends of each message.

    .. math:: s_{mh} = q_{r(m) h} \cdot k_{u(m) h}

    Args:
        query_RHC: (R, H, C) the receivers' queries.
        key_UGC: (U, H, C) the senders' keys, or (U, 1, C) if all heads share them.
        edges: the messages.
    """
    _transpose_where_compiled(edges)
    return _Dot.apply(query_RHC, key_UGC, edges)


def add_ends(sent_UH: Tensor, received_RH: Tensor, edges: Edges) -> Tensor:
    r"""(M, H) the sum of what the two ends of each message have.

    .. math:: s_{mh} = a_{u(m) h} + b_{r(m) h}

    The gradients are sums in the order of the messages: those of plain
    indexing sort their index first, on all threads.

    Args:
        sent_UH: (U, H) of the senders.
        received_RH: (R, H) of the receivers.
        edges: the messages.
    """
    _transpose_where_compiled(edges)
    return _AddEnds.apply(sent_UH, received_RH, edges)


def to_messages(value_R: Tensor, ptr: Tensor, receiver: Tensor) -> Tensor:
    """(M, ...) what the receiver of each message has.

    The gradient is a sum in the order of the messages, see
    :func:`add_ends`.

    Args:
        value_R: (R, ...) of the receivers.
        ptr: (R + 1,) where the messages of each receiver start.
        receiver: (M,) in 0..R-1, ascending.
    """
    return _ToMessages.apply(value_R, ptr, receiver)


def sum_to_receivers(value_MH: Tensor, ptr: Tensor, receiver: Tensor) -> Tensor:
    """(R, H) the sum of each receiver's messages; :func:`to_messages` sends it back.

    Args:
        value_MH: (M, H) of the messages.
        ptr: (R + 1,) where the messages of each receiver start.
        receiver: (M,) in 0..R-1, ascending.
    """
    return _SumValues.apply(value_MH, ptr, receiver, None)


def softmax(score_MH: Tensor, edges: Edges) -> Tensor:
    r"""(M, H) the softmax over each receiver's messages.

    PyG's takes twice as many operators, and three times in the
    backward.

    Args:
        score_MH: (M, H) the scores, in float32 at least.
        edges: the messages.
    """
    return _Softmax.apply(score_MH, edges.ptr, edges.receiver)


def blocks(start: int, end: int, width: int, device: torch.device) -> Iterator[slice]:
    """Cut the messages ``start:end`` into blocks, to be worked on one after the other.

    Args:
        start: the first message.
        end: the message after the last.
        width: numbers that each message takes.
        device: where they lie.
    """
    numbers = NUMBERS if device.type == "cpu" else NUMBERS_ON_GPU
    step = max(numbers // max(width, 1), 1)
    for first in range(start, end, step):
        yield slice(first, min(first + step, end))


@exported_as(lambda _: None)  # an exported model has no backward
def _transpose_where_compiled(edges: Edges) -> None:
    """Compiled code: make ``edges.transpose`` in the forward, since a backward could not keep it.

    The compiler drops the sort again where no gradient needs it.
    """
    if torch.is_grad_enabled() and torch.compiler.is_compiling():
        _ = edges.transpose


class _WeightedSum(torch.autograd.Function):
    """Its gradients are a :class:`_Dot` and a sum along the edges that are sent back."""

    @staticmethod
    def forward(ctx: Any, weight_MH: Tensor, value_UGC: Tensor, edges: Edges) -> Tensor:
        ctx.save_for_backward(weight_MH, value_UGC)
        ctx.edges = edges
        return _sum_messages(weight_MH, value_UGC, edges.ptr, edges.sender, edges.receiver, None)

    @staticmethod
    @unbatched
    def backward(ctx: Any, grad_RHC: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weight_MH, value_UGC = ctx.saved_tensors
        grad_weight = None
        grad_value = None
        if ctx.needs_input_grad[0]:
            grad_weight = _Dot.apply(grad_RHC, value_UGC, ctx.edges)
        if ctx.needs_input_grad[1]:
            grad_value = _sum_sent(weight_MH, grad_RHC, ctx.edges).sum_to_size(value_UGC.shape)
        return grad_weight, grad_value, None


class _Dot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_RHC: Tensor, key_UGC: Tensor, edges: Edges) -> Tensor:
        ctx.save_for_backward(query_RHC, key_UGC)
        ctx.edges = edges
        return _multiply_ends(query_RHC, key_UGC, edges.ptr, edges.sender, edges.receiver)

    @staticmethod
    @unbatched
    def backward(ctx: Any, grad_MH: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        query_RHC, key_UGC = ctx.saved_tensors
        grad_query = None
        grad_key = None
        if ctx.needs_input_grad[0]:
            grad_query = _WeightedSum.apply(grad_MH, key_UGC, ctx.edges)
        if ctx.needs_input_grad[1]:
            grad_key = _sum_sent(grad_MH, query_RHC, ctx.edges).sum_to_size(key_UGC.shape)
        return grad_query, grad_key, None


class _AddEnds(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sent_UH: Tensor, received_RH: Tensor, edges: Edges) -> Tensor:
        ctx.edges = edges
        sent_MH = sent_UH.index_select(0, edges.sender)
        return sent_MH + received_RH.index_select(0, edges.receiver)

    @staticmethod
    @unbatched
    def backward(ctx: Any, grad_MH: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        edges = ctx.edges
        grad_sent = None
        grad_received = None
        if ctx.needs_input_grad[0]:
            back = edges.transpose
            grad_sent = _SumValues.apply(grad_MH, back.ptr, back.receiver, back.order)
        if ctx.needs_input_grad[1]:
            grad_received = _SumValues.apply(grad_MH, edges.ptr, edges.receiver, None)
        return grad_sent, grad_received, None


class _ToMessages(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value_R: Tensor, ptr: Tensor, receiver: Tensor) -> Tensor:
        ctx.save_for_backward(ptr, receiver)
        return value_R.index_select(0, receiver)

    @staticmethod
    @unbatched
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Tensor, None, None]:
        sum_R = _SumValues.apply(grad_M.flatten(1), *ctx.saved_tensors, None)
        return sum_R.unflatten(1, grad_M.shape[1:]), None, None


class _SumValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value_MH: Tensor, ptr: Tensor, receiver: Tensor, order: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(ptr, receiver, order)
        return _sum_values(value_MH, ptr, receiver, order)

    @staticmethod
    @unbatched
    def backward(ctx: Any, grad_RH: Tensor) -> tuple[Tensor, None, None, None]:
        ptr, receiver, order = ctx.saved_tensors
        grad_MH = _ToMessages.apply(grad_RH, ptr, receiver)
        if order is not None:
            grad_MH = torch.empty_like(grad_MH).index_copy(0, order, grad_MH)
        return grad_MH, None, None, None


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, score_MH: Tensor, ptr: Tensor, receiver: Tensor) -> Tensor:
        largest_RH = _largest(score_MH, ptr, receiver)
        exp_MH = (score_MH - largest_RH.index_select(0, receiver)).exp_()
        sum_RH = _sum_values(exp_MH, ptr, receiver, None)
        alpha_MH = exp_MH / sum_RH.index_select(0, receiver)
        ctx.save_for_backward(alpha_MH, ptr, receiver)
        return alpha_MH

    @staticmethod
    @unbatched
    def backward(ctx: Any, grad_MH: Tensor) -> tuple[Tensor, None, None]:
        alpha_MH, ptr, receiver = ctx.saved_tensors
        product_MH = grad_MH * alpha_MH
        mean_RH = _SumValues.apply(product_MH, ptr, receiver, None)
        return product_MH - alpha_MH * _ToMessages.apply(mean_RH, ptr, receiver), None, None


@exported_as(portable.largest)
def _largest(score_MH: Tensor, ptr: Tensor, _: Tensor) -> Tensor:
    """(R, H) the largest of each receiver's messages."""
    return torch.segment_reduce(score_MH, "max", offsets=ptr)


def _sum_sent(weight_MH: Tensor, value_RHC: Tensor, edges: Edges) -> Tensor:
    """(U, H, C) the weighted sum, over each sender's messages, of their receivers' values."""
    back = edges.transpose
    if torch.is_grad_enabled():  # in a backward pass that is differentiated itself
        return _WeightedSum.apply(weight_MH.index_select(0, back.order), value_RHC, back)
    return _sum_messages(weight_MH, value_RHC, back.ptr, back.sender, back.receiver, back.order)


# the kernels --------------------------------------------------------------------------------------


def _empty_sums(weight_MH: Tensor, value_UGC: Tensor, ptr: Tensor, *_: Any) -> Tensor:
    dtype = torch.promote_types(weight_MH.dtype, value_UGC.dtype)
    shape = (ptr.size(0) - 1, weight_MH.size(1), value_UGC.size(2))
    return value_UGC.new_empty(shape, dtype=dtype)


@operator(fake=_empty_sums, portable=portable.sum_messages)
def _sum_messages(
    weight_MH: Tensor,
    value_UGC: Tensor,
    ptr: Tensor,
    sender: Tensor,
    receiver: Tensor,
    order: Tensor | None,
) -> Tensor:
    """(R, H, C) the sums, in float32 at least; no row for each message is kept.

    If an order is given, message ``m`` has the weights ``order[m]``.
    """
    dtype = torch.promote_types(weight_MH.dtype, value_UGC.dtype)
    exact = torch.promote_types(dtype, torch.float32)
    weight_MH, value_UGC = weight_MH.to(exact), value_UGC.to(exact)
    if value_UGC.device.type not in SPARSE_DEVICES or not weight_MH.numel():
        return _sum_all_heads(weight_MH, value_UGC, ptr, sender, receiver, order).to(dtype)
    weights = weight_MH.T.contiguous()
    values = value_UGC.expand(-1, weight_MH.size(1), -1).unbind(1)
    sums: list[Tensor] = []
    for weight_M, value_UC in zip(weights, values, strict=True):
        if order is not None:  # head by head: rows of one number are slow to gather
            weight_M = weight_M.index_select(0, order)
        # The messages of a receiver are a bag. A sparse product gives the same float32 numbers in
        # two to three times the time.
        sum_RC, *_ = torch.embedding_bag(
            value_UC.contiguous(),
            sender,
            ptr,
            mode=0,  # sum
            per_sample_weights=weight_M,
            include_last_offset=True,
        )
        sums.append(sum_RC)
    if len(sums) == 1:
        # .data: autograd lets nobody write to a view in place.
        return sums[0][:, None].data.to(dtype)
    return torch.stack(sums, dim=1).to(dtype)


def _sum_all_heads(
    weight_MH: Tensor,
    value_UGC: Tensor,
    ptr: Tensor,
    sender: Tensor,
    receiver: Tensor,
    order: Tensor | None,
) -> Tensor:
    """(R, H, C) the sums off the CPU, of all heads at once, block by block."""
    if order is not None:
        weight_MH = weight_MH.index_select(0, order)
    num_messages, num_heads = weight_MH.shape
    width = value_UGC.size(2)
    sum_RHC = value_UGC.new_zeros(ptr.numel() - 1, num_heads, width)
    for block in blocks(0, num_messages, num_heads * width, value_UGC.device):
        value_BHC = value_UGC.index_select(0, sender[block]) * weight_MH[block, :, None]
        sum_RHC.index_add_(0, receiver[block], value_BHC)
    return sum_RHC


def _empty_sums_of_values(value_MH: Tensor, ptr: Tensor, *_: Any) -> Tensor:
    return value_MH.new_empty(ptr.size(0) - 1, value_MH.size(1))


@operator(fake=_empty_sums_of_values, portable=portable.sum_values)
def _sum_values(value_MH: Tensor, ptr: Tensor, receiver: Tensor, order: Tensor | None) -> Tensor:
    """(R, H) the sum of each receiver's messages, one after the other, in float32 at least.

    If an order is given, message ``m`` has the values ``order[m]``.
    """
    if value_MH.device.type not in SPARSE_DEVICES or not len(receiver):
        return portable.sum_values(value_MH, ptr, receiver, order)
    dtype = value_MH.dtype
    value_MH = value_MH.to(torch.promote_types(dtype, torch.float32))
    if order is None:
        order = torch.arange(len(receiver), device=receiver.device)
    # mode 0: sum
    sum_RH, *_ = torch.embedding_bag(
        value_MH.contiguous(), order, ptr, mode=0, include_last_offset=True
    )
    return sum_RH.to(dtype)


def _empty_products(
    query_RHC: Tensor, key_UGC: Tensor, _: Tensor, sender: Tensor, *__: Any
) -> Tensor:
    dtype = torch.promote_types(query_RHC.dtype, key_UGC.dtype)
    return query_RHC.new_empty(sender.size(0), query_RHC.size(1), dtype=dtype)


@operator(fake=_empty_products, portable=portable.multiply_ends)
def _multiply_ends(
    query_RHC: Tensor, key_UGC: Tensor, ptr: Tensor, sender: Tensor, receiver: Tensor
) -> Tensor:
    """(M, H) the dot product of the two ends of each message, computed in float32 at least."""
    dtype = torch.promote_types(query_RHC.dtype, key_UGC.dtype)
    exact = torch.promote_types(dtype, torch.float32)
    size = (ptr.numel() - 1, key_UGC.size(0))
    num_messages = sender.numel()
    query_RHC, key_UGC = query_RHC.to(exact), key_UGC.to(exact)
    num_heads, width = query_RHC.shape[1:]
    # torch cuts a matrix down to as many entries as it has cells.
    fits_matrix = num_messages <= size[0] * size[1]
    if query_RHC.device.type not in SPARSE_DEVICES or not fits_matrix:
        product_MH = query_RHC.new_empty(num_messages, num_heads)
        for block in blocks(0, num_messages, num_heads * width, query_RHC.device):
            query_BHC = query_RHC.index_select(0, receiver[block])
            key_BGC = key_UGC.index_select(0, sender[block])
            torch.sum(query_BHC * key_BGC, dim=-1, out=product_MH[block])
        return product_MH.to(dtype)
    products: list[Tensor] = []
    keys = key_UGC.expand(-1, num_heads, -1).unbind(1)
    for query_RC, key_UC in zip(query_RHC.unbind(1), keys, strict=True):
        zeros_M = query_RC.new_zeros(num_messages)
        matrix = torch.sparse_csr_tensor(ptr, sender, zeros_M, size, check_invariants=False)
        torch.sparse.sampled_addmm(matrix, query_RC.contiguous(), key_UC.contiguous().T, out=matrix)
        products.append(matrix.values())
    return torch.stack(products, dim=1).to(dtype)
