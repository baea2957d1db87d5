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
from gmoe.blocks import Blocks, blocks_of, expert_of_rows, sum_at
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
    """True if there may be a row for each message: there are few."""
    return isinstance(messages, AllMessages)


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
    for block in _blocks(offsets, sender.size(0), att_EOH):
        sum_BO = _sums(parts, sender, receiver, block)
        leaky_BO = F.leaky_relu_(sum_BO, negative_slope)
        block.add_product(leaky_BO, parts.att_EOH, score_MH[block.place], beta=0)
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
    for block in _blocks(offsets, sender.size(0), att_EOH):
        # The sums are computed anew: they take more memory than all else.
        sum_BO = _sums(parts, sender, receiver, block)
        grad_BH = grad_MH[block.place]
        grad_BO = torch.empty_like(sum_BO)
        block.add_product(grad_BH, parts.att_EOH.transpose(1, 2), grad_BO, beta=0)
        grad_BO = torch.ops.aten.leaky_relu_backward(grad_BO, sum_BO, negative_slope, False)
        leaky_BO = F.leaky_relu_(sum_BO, negative_slope)
        block.add_outer(leaky_BO, grad_BH, grads.att_EOH)
        grads.source_UO.index_add_(0, sender[block.place], grad_BO)
        grads.target_PO.index_add_(0, receiver[block.place], grad_BO)
        if parts.edge_MF is not None:
            weight_EOF = parts.edge_EFO.transpose(1, 2)
            block.add_product(grad_BO, weight_EOF, grads.edge_MF[block.place], beta=0)
            block.add_outer(parts.edge_MF[block.place], grad_BO, grads.edge_EFO)
    return [
        grad.to(part.dtype) for grad, part in zip(grads, given, strict=True) if part is not None
    ]


def _exact(value: Tensor) -> Tensor:
    """The tensor in float32 at least."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


class _Block(NamedTuple):
    """A block of messages, all of one expert.

    Args:
        place: of the block among the messages.
        expert: of all of them.
    """

    place: slice
    expert: int

    def add_product(
        self, x_BI: Tensor, weight_EIO: Tensor, sum_BO: Tensor, beta: int = 1
    ) -> Tensor:
        """Add rows times the weight of their expert to ``beta`` times ``sum_BO``."""
        return sum_BO.addmm_(x_BI, weight_EIO[self.expert], beta=beta)

    def add_outer(self, x_BI: Tensor, grad_BO: Tensor, sum_EIO: Tensor) -> None:
        """Add the gradient of the weights, from rows (B, I) and gradients (B, O)."""
        sum_EIO[self.expert].addmm_(x_BI.T, grad_BO)


class _MixedBlock(NamedTuple):
    """A block of messages of any experts, of which the host knows no ends.

    Args:
        place: of the block among the messages.
        blocks: its messages, in blocks of one expert each.
    """

    place: slice
    blocks: Blocks

    def add_product(
        self, x_BI: Tensor, weight_EIO: Tensor, sum_BO: Tensor, beta: int = 1
    ) -> Tensor:
        """See :class:`_Block`."""
        with torch.autocast(x_BI.device.type, enabled=False):
            y_BO = self.blocks.linear(x_BI, weight_EIO, None)
        return sum_BO.add_(y_BO) if beta else sum_BO.copy_(y_BO)

    def add_outer(self, x_BI: Tensor, grad_BO: Tensor, sum_EIO: Tensor) -> None:
        """See :class:`_Block`."""
        with torch.autocast(x_BI.device.type, enabled=False):
            outer_NIO = self.blocks.filled(x_BI).mT @ self.blocks.filled(grad_BO)
            sum_EIO += sum_at(self.blocks.expert_N, outer_NIO, sum_EIO.size(0))


def _mixed(place: slice, offsets: Tensor) -> _MixedBlock:
    """A block of messages, given the ends of each expert's messages among all."""
    ends = offsets.clamp(place.start, place.stop) - place.start
    return _MixedBlock(place, blocks_of(ends, expert_of_rows(ends, place.stop - place.start)))


def _blocks(offsets: Tensor, number: int, att_EOH: Tensor) -> Iterator[_Block | _MixedBlock]:
    """The messages in blocks: each of one expert, or of any, where the host would wait for ends.

    Args:
        offsets: (E,) cumulative ends of each expert's messages.
        number: M.
        att_EOH: one of the weights.
    """
    width, device = att_EOH.size(1), att_EOH.device
    if device.type != "cpu":
        yield from (_mixed(place, offsets) for place in blocks(0, number, width, device))
        return
    ends = offsets.tolist()
    for expert, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        for place in blocks(start, end, width, device):
            yield _Block(place, expert)


def _sums(parts: _Parts, sender: Tensor, receiver: Tensor, block: _Block | _MixedBlock) -> Tensor:
    """(B, O) the sums before the leaky ReLU, of a block of messages."""
    sum_BO = parts.source_UO.index_select(0, sender[block.place])
    sum_BO += parts.target_PO.index_select(0, receiver[block.place])
    if parts.edge_MF is not None:
        block.add_product(parts.edge_MF[block.place], parts.edge_EFO, sum_BO)
    return sum_BO
