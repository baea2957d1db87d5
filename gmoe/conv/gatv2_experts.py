"""GATv2 experts. Shapes: I in, O out features, F edge features, E experts, P pairs, M messages, U rows, H heads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmoe._autograd import first_order
from gmoe.conv.attention import AttentionExperts
from gmoe.conv.pair_graph import PairGraph
from gmoe.conv.segment import Messages, at_least_float32, blocks, weighted_sum
from gmoe.experts import LinearExperts


class GATv2Experts(AttentionExperts):
    r"""GATv2: :math:`s_{ij} = a \cdot \mathrm{leaky}(W x_j + V x_i + U e_{ij})`, the values are :math:`W x_j`."""

    layers = ("lin_l", "lin_r", "lin_edge", "res")
    vectors = ("att", "bias")
    lin_l: LinearExperts
    lin_r: LinearExperts | None
    att: nn.Parameter

    def _layers(self, conv: Any) -> dict[str, Any]:
        found = super()._layers(conv)
        if conv.share_weights:
            del found["lin_r"]  # lin_l again
        return found

    def _attend(self, x_src: Tensor, x_PI: Tensor, pairs: PairGraph) -> Tensor:
        source_UO = self.lin_l(x_src.index_select(0, pairs.heard), pairs.heard_offsets)
        target_PO = (self.lin_l if self.lin_r is None else self.lin_r)(x_PI, pairs.routing.offsets)
        edge_MF = self._edge_attr(pairs)
        edge_EFO = None if edge_MF is None or self.lin_edge is None else self.lin_edge.weight
        # a head's vector in that head's column, so that one product gives the scores of all
        heads = torch.eye(self.heads, dtype=self.att.dtype, device=self.att.device)
        att_EOH = (self.att.squeeze(1)[..., None] * heads[:, None]).flatten(1, 2)
        slope = self.prototype.negative_slope
        score_MH = additive_scores(source_UO, target_PO, edge_MF, edge_EFO, att_EOH, slope, pairs)
        alpha_MH = self._attention(score_MH, pairs)
        return weighted_sum(alpha_MH, self._by_head(source_UO), pairs.messages)


@torch.compiler.disable  # the sizes depend on the data
def additive_scores(
    source_UO: Tensor,
    target_PO: Tensor,
    edge_MF: Tensor | None,
    edge_EFO: Tensor | None,
    att_EOH: Tensor,
    negative_slope: float,
    pairs: PairGraph,
) -> Tensor:
    r"""(M, H) the scores :math:`a^\top \mathrm{leaky}(s_{u(m)} + t_{p(m)} + e_m U)`, block by block: no row for each
    message is kept. Can be differentiated once.

    Args:
        source_UO, target_PO: transformed rows of the two ends.
        edge_MF, edge_EFO: edge features and their linear layer, or ``None``.
        att_EOH: attention vectors of the experts, a column a head.
        negative_slope: of the leaky ReLU.
        pairs: the messages.
    """
    dtype = torch.promote_types(source_UO.dtype, att_EOH.dtype)
    tensors = (source_UO, target_PO, edge_MF, edge_EFO, att_EOH)
    exact = [None if tensor is None else at_least_float32(tensor) for tensor in tensors]
    out: Tensor = _AdditiveScores.apply(*exact, negative_slope, pairs.messages, pairs.offsets.tolist())
    return out.to(dtype)


class _AdditiveScores(torch.autograd.Function):
    """Products are written in place: autocast leaves those alone."""

    @staticmethod
    def forward(
        ctx: Any,
        source_UO: Tensor,
        target_PO: Tensor,
        edge_MF: Tensor | None,
        edge_EFO: Tensor | None,
        att_EOH: Tensor,
        negative_slope: float,
        messages: Messages,
        ends: list[int],
    ) -> Tensor:
        ctx.save_for_backward(source_UO, target_PO, edge_MF, edge_EFO, att_EOH)
        ctx.negative_slope, ctx.messages, ctx.ends = negative_slope, messages, ends
        out_MH = source_UO.new_empty(messages.sender.numel(), att_EOH.size(2))
        for expert, block in _blocks(ends, att_EOH):
            sum_BO = _sums(source_UO, target_PO, edge_MF, edge_EFO, messages, expert, block)
            torch.mm(F.leaky_relu_(sum_BO, negative_slope), att_EOH[expert], out=out_MH[block])
        return out_MH

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_MH: Tensor) -> tuple[Tensor | None, ...]:
        source_UO, target_PO, edge_MF, edge_EFO, att_EOH = ctx.saved_tensors
        messages, slope = ctx.messages, ctx.negative_slope
        grad_source, grad_target = torch.zeros_like(source_UO), torch.zeros_like(target_PO)
        grad_edge = None if edge_MF is None else torch.empty_like(edge_MF)
        grad_weight = None if edge_EFO is None else torch.zeros_like(edge_EFO)
        grad_att = torch.zeros_like(att_EOH)
        for expert, block in _blocks(ctx.ends, att_EOH):
            sum_BO = _sums(source_UO, target_PO, edge_MF, edge_EFO, messages, expert, block)
            grad_BO = torch.empty_like(sum_BO)
            torch.mm(grad_MH[block], att_EOH[expert].T, out=grad_BO)
            grad_BO = torch.ops.aten.leaky_relu_backward(grad_BO, sum_BO, slope, False)
            grad_att[expert].addmm_(F.leaky_relu_(sum_BO, slope).T, grad_MH[block])
            grad_source.index_add_(0, messages.sender[block], grad_BO)
            grad_target.index_add_(0, messages.receiver[block], grad_BO)
            if grad_edge is not None and grad_weight is not None:
                torch.mm(grad_BO, edge_EFO[expert].T, out=grad_edge[block])
                grad_weight[expert].addmm_(edge_MF[block].T, grad_BO)
        return grad_source, grad_target, grad_edge, grad_weight, grad_att, None, None, None


def _blocks(ends: list[int], att_EOH: Tensor) -> Iterator[tuple[int, slice]]:
    """The messages in blocks, each of one expert."""
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        for block in blocks(start, end, att_EOH.size(1), att_EOH.device):
            yield expert, block


def _sums(
    source_UO: Tensor,
    target_PO: Tensor,
    edge_MF: Tensor | None,
    edge_EFO: Tensor | None,
    messages: Messages,
    expert: int,
    block: slice,
) -> Tensor:
    """(B, O) what the leaky ReLU meets, of a block of messages."""
    sum_BO = source_UO.index_select(0, messages.sender[block])
    sum_BO += target_PO.index_select(0, messages.receiver[block])
    if edge_MF is not None and edge_EFO is not None:
        sum_BO.addmm_(edge_MF[block], edge_EFO[expert])
    return sum_BO
