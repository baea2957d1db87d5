"""Additive scores of attention, as GATv2 has them, block by block.

Shapes: I in, O out features, H heads, F edge features, E experts, P (token, expert) pairs, M
messages (an edge and an expert of its destination), U rows (a source and an expert that needs it),
B messages in a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gmoe._autograd import autocasts, gradients_of, operator, unbatched
from gmoe.conv.messages import Messages
from gmoe.padded import padded_mm, padded_outer
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

    Computed by blocks of messages, so that no row for each message is kept.

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


class _AdditiveScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *weights, negative_slope, sender, receiver, offsets = inputs
        ctx.negative_slope = negative_slope
        ctx.save_for_backward(*weights, sender, receiver, offsets)
        return _score_additively(*inputs)

    @staticmethod
    @unbatched
    def backward(ctx: Any, grad_MH: Tensor) -> tuple[Tensor | None, ...]:
        *weights, sender, receiver, offsets = ctx.saved_tensors
        if torch.is_grad_enabled():  # this pass is differentiated itself

            def plain(*views: Any) -> Tensor:
                inputs = (*views, ctx.negative_slope, sender, receiver, offsets)
                return _score_by_messages(*inputs)

            needs = ctx.needs_input_grad[: len(weights)]
            return *gradients_of(plain, weights, needs, grad_MH), None, None, None, None
        grad_source, grad_target, *grads_of_edges, grad_att = _score_additively_backward(
            grad_MH, *weights, ctx.negative_slope, sender, receiver, offsets
        )
        grad_edge, grad_weight = grads_of_edges or (None, None)
        return grad_source, grad_target, grad_edge, grad_weight, grad_att, None, None, None, None


def _score_by_messages(*inputs: Any) -> Tensor:
    """(M, H) what :func:`_score_additively` gives, by functions that can be differentiated twice.

    Keeps a row for each message. In float32 at least, with autocast off, as the kernel computes.
    """
    *weights, negative_slope, sender, receiver, offsets = inputs
    dtype = weights[-1].dtype
    source_UO, target_PO, edge_MF, edge_EFO, att_EOH = _exact(*weights)
    has_autocast = autocasts(att_EOH.device)
    with torch.autocast(att_EOH.device.type, enabled=False) if has_autocast else nullcontext():
        sum_MO = source_UO.index_select(0, sender) + target_PO.index_select(0, receiver)
        if edge_MF is not None and edge_EFO is not None:
            sum_MO = sum_MO + grouped_linear(edge_MF, edge_EFO, None, offsets)
        leaky_MO = F.leaky_relu(sum_MO, negative_slope)
        return grouped_linear(leaky_MO, att_EOH, None, offsets).to(dtype)


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
    *rows, att_EOH = _exact(source_UO, target_PO, edge_MF, edge_EFO, att_EOH)
    score_MH = att_EOH.new_empty(sender.size(0), att_EOH.size(2))
    for block in _blocks(offsets, sender.size(0), att_EOH):
        sum_BO = _sums(rows, sender, receiver, block)
        leaky_BO = F.leaky_relu_(sum_BO, negative_slope)
        block.add_product(leaky_BO, att_EOH, score_MH[block.place], beta=0)
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
    inputs = (source_UO, target_PO, edge_MF, edge_EFO, att_EOH)
    *rows, att_EOH = _exact(*inputs)
    grad_MH = grad_MH.to(att_EOH.dtype)
    grads: list[Any] = [None if t is None else t.new_zeros(t.shape) for t in (*rows, att_EOH)]
    grad_source, grad_target, grad_edge, grad_weight, grad_att = grads
    for block in _blocks(offsets, len(sender), att_EOH):
        # The sums are computed anew: they take more memory than all else.
        sum_BO = _sums(rows, sender, receiver, block)
        grad_BH = grad_MH[block.place]
        grad_BO = torch.empty_like(sum_BO)
        block.add_product(grad_BH, att_EOH.transpose(1, 2), grad_BO, beta=0)
        grad_BO = torch.ops.aten.leaky_relu_backward(grad_BO, sum_BO, negative_slope, False)
        leaky_BO = F.leaky_relu_(sum_BO, negative_slope)
        block.add_outer(leaky_BO, grad_BH, grad_att)
        grad_source.index_add_(0, sender[block.place], grad_BO)
        grad_target.index_add_(0, receiver[block.place], grad_BO)
        if grad_edge is not None:
            _, _, edge_MF, edge_EFO = rows
            block.add_product(grad_BO, edge_EFO.transpose(1, 2), grad_edge[block.place], beta=0)
            block.add_outer(edge_MF[block.place], grad_BO, grad_weight)
    return [grad.to(t.dtype) for grad, t in zip(grads, inputs, strict=True) if t is not None]


def _exact(*tensors: Any) -> list[Any]:
    """The tensors in float32 at least; ``None`` stays."""
    return [
        None if t is None else t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors
    ]


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
        offsets: (E,) cumulative ends of each expert's messages in the block.
    """

    place: slice
    offsets: Tensor

    def add_product(
        self, x_BI: Tensor, weight_EIO: Tensor, sum_BO: Tensor, beta: int = 1
    ) -> Tensor:
        """See :class:`_Block`."""
        with torch.autocast(x_BI.device.type, enabled=False):
            y_BO = padded_mm(x_BI, weight_EIO, self.offsets)
        return sum_BO.add_(y_BO) if beta else sum_BO.copy_(y_BO)

    def add_outer(self, x_BI: Tensor, grad_BO: Tensor, sum_EIO: Tensor) -> None:
        """See :class:`_Block`."""
        with torch.autocast(x_BI.device.type, enabled=False):
            sum_EIO += padded_outer(x_BI, grad_BO, self.offsets)


def _one_block(offsets: Tensor, number: int, _: Tensor) -> Iterator[_Block | _MixedBlock]:
    """One block of all messages, whose number an export does not know."""
    yield _MixedBlock(slice(0, number), offsets)


@exported_as(_one_block)
def _blocks(offsets: Tensor, number: int, att_EOH: Tensor) -> Iterator[_Block | _MixedBlock]:
    """The messages in blocks: each of one expert, or of any, where the host would wait for ends.

    Args:
        offsets: (E,) cumulative ends of each expert's messages.
        number: M.
        att_EOH: one of the weights.
    """
    width, device = att_EOH.size(1), att_EOH.device
    if device.type != "cpu":
        for place in blocks(0, number, width, device):
            ends = offsets.clamp(place.start, place.stop) - place.start
            yield _MixedBlock(place, ends)
        return
    ends = offsets.tolist()
    for expert, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        for place in blocks(start, end, width, device):
            yield _Block(place, expert)


def _sums(
    rows: Sequence[Any], sender: Tensor, receiver: Tensor, block: _Block | _MixedBlock
) -> Tensor:
    """(B, O) the sums before the leaky ReLU, of a block of messages."""
    source_UO, target_PO, edge_MF, edge_EFO = rows
    sum_BO = source_UO.index_select(0, sender[block.place])
    sum_BO += target_PO.index_select(0, receiver[block.place])
    if edge_MF is not None:
        block.add_product(edge_MF[block.place], edge_EFO, sum_BO)
    return sum_BO
