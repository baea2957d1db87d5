"""Additive scores of attention, as GATv2 has them, block by block.

Shapes: I in, O out features, H heads, F edge features, E experts, P (token, expert) pairs, M
messages (an edge and an expert of its destination), U rows (a source and an expert that needs it),
B messages in a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gmoe._autograd import autocasts, gradients_of, operator, unbatched
from gmoe.conv.messages import AllMessages, Messages
from gmoe.portable import exported_as
from gmoe.products import grouped_linear
from gmoe.sums import blocks


def additive_scores(
    source_UO: Tensor,
    target_PO: Tensor,
    edge_MF: Tensor | None,
    edge_EFO: Tensor | None,
    att_EOH: Tensor,
    negative_slope: float,
    messages: Messages,
) -> Tensor:
    r"""(M, H) the scores :math:`a^\top \mathrm{leaky}(s_{u(m)} + t_{p(m)} + e_m U)`.

    Computed by blocks of messages, so that no row for each message is kept, unless they are few.

    Args:
        source_UO: transformed rows of the senders.
        target_PO: transformed rows of the pairs.
        edge_MF: edge features, or ``None``.
        edge_EFO: their linear layer, or ``None``.
        att_EOH: the experts' attention vectors.
        negative_slope: of the leaky ReLU.
        messages: from the rows to the pairs.
    """
    edges = messages.from_rows
    if _keeps_rows(messages):
        parts, times = _Parts(source_UO, target_PO, edge_MF, edge_EFO, att_EOH), messages.times
        return _score_by_messages(parts, negative_slope, edges.sender, edges.receiver, times)
    return _AdditiveScores.apply(
        source_UO,
        target_PO,
        edge_MF,
        edge_EFO,
        att_EOH,
        negative_slope,
        edges.sender,
        edges.receiver,
        messages.message_offsets,
    )


@exported_as(lambda _: True)  # how many messages there are is not known
def _keeps_rows(messages: Messages) -> bool:
    """True if there may be a row for each message: there are few, or blocks would make a GPU wait.

    PyG's conv keeps such rows, too.
    """
    return isinstance(messages, AllMessages) or messages.graph.edge_index.device.type != "cpu"


class _Parts(NamedTuple):
    """What scores are made of, and what is differentiated; see :func:`additive_scores`."""

    source_UO: Tensor
    target_PO: Tensor
    edge_MF: Any  # a tensor, as the next one, or both are None
    edge_EFO: Any
    att_EOH: Tensor

    def each(self, function: Callable[[Tensor], Tensor]) -> _Parts:
        """What a function makes of each part that is there."""
        made: list[Any] = [None if part is None else function(part) for part in self]
        return _Parts(*made)


class _AdditiveScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        parts, (negative_slope, sender, receiver, offsets) = inputs[:5], inputs[5:]
        ctx.negative_slope = negative_slope
        ctx.save_for_backward(*parts, sender, receiver, offsets)
        return _score_additively(*inputs)

    @staticmethod
    @unbatched
    def backward(ctx: Any, grad_MH: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        parts = _Parts(*saved[:5])
        sender, receiver, offsets = saved[5:]
        slope = ctx.negative_slope
        grads: Sequence[Tensor | None]
        if torch.is_grad_enabled():  # this pass is differentiated itself

            def plain(*views: Any) -> Tensor:
                def times(x_MI: Tensor, weight_EIO: Tensor) -> Tensor:
                    return grouped_linear(x_MI, weight_EIO, None, offsets)

                return _score_by_messages(_Parts(*views), slope, sender, receiver, times)

            grads = gradients_of(plain, parts, ctx.needs_input_grad[:5], grad_MH)
        else:
            found = iter(
                _score_additively_backward(grad_MH, *parts, slope, sender, receiver, offsets)
            )
            grads = [None if part is None else next(found) for part in parts]
        return *grads, None, None, None, None


def _score_by_messages(
    parts: _Parts,
    negative_slope: float,
    sender: Tensor,
    receiver: Tensor,
    times: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """(M, H) what :func:`_score_additively` gives, by functions that can be differentiated twice.

    Keeps a row for each message. In float32 at least, with autocast off, as the kernel computes.
    ``times`` multiplies messages by the weight of their expert.
    """
    dtype = parts.att_EOH.dtype
    source_UO, target_PO, edge_MF, edge_EFO, att_EOH = parts.each(_exact)
    has_autocast = autocasts(att_EOH.device)
    with torch.autocast(att_EOH.device.type, enabled=False) if has_autocast else nullcontext():
        sum_MO = source_UO.index_select(0, sender) + target_PO.index_select(0, receiver)
        if edge_MF is not None and edge_EFO is not None:
            sum_MO = sum_MO + times(edge_MF, edge_EFO)
        leaky_MO = F.leaky_relu(sum_MO, negative_slope)
        return times(leaky_MO, att_EOH).to(dtype)


def _empty_scores(*inputs: Any) -> Tensor:
    *_, att_EOH, _, sender, _, _ = inputs
    scores_MH: Tensor = att_EOH.new_empty(sender.size(0), att_EOH.size(2))
    return scores_MH


@operator(fake=_empty_scores)
def _score_additively(
    source_UO: Tensor,
    target_PO: Tensor,
    edge_MF: Tensor | None,
    edge_EFO: Tensor | None,
    att_EOH: Tensor,
    negative_slope: float,
    sender: Tensor,
    receiver: Tensor,
    offsets: Tensor,
) -> Tensor:
    """(M, H) the scores, computed in float32 at least.

    Products are written in place: autocast does not touch those.
    """
    dtype = att_EOH.dtype
    parts = _Parts(source_UO, target_PO, edge_MF, edge_EFO, att_EOH).each(_exact)
    score_MH = parts.att_EOH.new_empty(sender.size(0), att_EOH.size(2))
    for expert, block in _blocks(offsets, att_EOH.size(1)):
        sum_BO = _sums(parts, sender, receiver, expert, block)
        leaky_BO = F.leaky_relu_(sum_BO, negative_slope)
        torch.mm(leaky_BO, parts.att_EOH[expert], out=score_MH[block])
    return score_MH.to(dtype)


def _empty_gradients(_: Tensor, *inputs: Any) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in inputs[:5] if t is not None]


@operator(fake=_empty_gradients)
def _score_additively_backward(
    grad_MH: Tensor,
    source_UO: Tensor,
    target_PO: Tensor,
    edge_MF: Tensor | None,
    edge_EFO: Tensor | None,
    att_EOH: Tensor,
    negative_slope: float,
    sender: Tensor,
    receiver: Tensor,
    offsets: Tensor,
) -> list[Tensor]:
    """The gradients of the first five inputs, of those that are there."""
    given = _Parts(source_UO, target_PO, edge_MF, edge_EFO, att_EOH)
    parts = given.each(_exact)
    # Contiguous, however the inputs lie: not zeros_like.
    grads = parts.each(lambda value: value.new_zeros(value.shape))
    grad_MH = grad_MH.to(parts.att_EOH.dtype)
    for expert, block in _blocks(offsets, att_EOH.size(1)):
        # The sums are computed anew: they take more memory than all else.
        sum_BO = _sums(parts, sender, receiver, expert, block)
        grad_BH = grad_MH[block]
        grad_BO = torch.mm(grad_BH, parts.att_EOH[expert].T, out=torch.empty_like(sum_BO))
        grad_BO = torch.ops.aten.leaky_relu_backward(grad_BO, sum_BO, negative_slope, False)
        leaky_BO = F.leaky_relu_(sum_BO, negative_slope)
        grads.att_EOH[expert].addmm_(leaky_BO.T, grad_BH)
        grads.source_UO.index_add_(0, sender[block], grad_BO)
        grads.target_PO.index_add_(0, receiver[block], grad_BO)
        if parts.edge_MF is not None:
            torch.mm(grad_BO, parts.edge_EFO[expert].T, out=grads.edge_MF[block])
            grads.edge_EFO[expert].addmm_(parts.edge_MF[block].T, grad_BO)
    return [
        grad.to(part.dtype) for grad, part in zip(grads, given, strict=True) if part is not None
    ]


def _exact(value: Tensor) -> Tensor:
    """The tensor in float32 at least."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _blocks(offsets: Tensor, width: int) -> Iterator[tuple[int, slice]]:
    """The messages in blocks, each of one expert, which is given with it.

    Args:
        offsets: (E,) cumulative ends of each expert's messages.
        width: numbers that each message takes.
    """
    ends = offsets.tolist()
    for expert, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        for block in blocks(start, end, width, offsets.device):
            yield expert, block


def _sums(parts: _Parts, sender: Tensor, receiver: Tensor, expert: int, block: slice) -> Tensor:
    """(B, O) the sums before the leaky ReLU, of a block of messages of one expert."""
    sum_BO = parts.source_UO.index_select(0, sender[block])
    sum_BO += parts.target_PO.index_select(0, receiver[block])
    if parts.edge_MF is not None:
        sum_BO.addmm_(parts.edge_MF[block], parts.edge_EFO[expert])
    return sum_BO
