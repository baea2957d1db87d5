"""Attention experts: GAT, GATv2, TransformerConv.

Shapes: N sources, I in, O out, F edge features, E experts, P pairs, M messages, U rows, H heads of width C.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.utils import softmax

from gmoe._autograd import first_order
from gmoe._checks import check
from gmoe.conv.base import StackedExperts, is_plain, stacked
from gmoe.conv.edges import Edges, blocks, dot, weighted_sum
from gmoe.conv.graph import Graph
from gmoe.conv.kept import lazy
from gmoe.dispatch import Backend, combine, dispatch, grouped_linear, operator
from gmoe.experts import LinearExperts
from gmoe.routing import Routing


class Rows(NamedTuple):
    """What experts transform: U rows, one for each (expert, source) with a message, ascending.

    Args:
        expert: (U,) the expert of each row.
        source: (U,) its source.
        offsets: (E,) int32, cumulative ends of each expert's rows.
        place: (E, N) the position of (expert, source) among the rows, if it is one.
    """

    expert: Tensor
    source: Tensor
    offsets: Tensor
    place: Tensor


def _empty_rows(expert: Tensor, _: Tensor, num_experts: int, num_sources: int) -> tuple[Tensor, ...]:
    rows = torch.library.get_ctx().new_dynamic_size()
    offsets = expert.new_empty(num_experts, dtype=torch.int32)
    return expert.new_empty(rows), expert.new_empty(rows), offsets, expert.new_empty(num_experts, num_sources)


@operator(fake=_empty_rows)
def _find_rows(
    expert: Tensor, source: Tensor, num_experts: int, num_sources: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The :class:`Rows` of messages, given the expert and the source of each."""
    is_row = expert.new_zeros(num_experts, num_sources, dtype=torch.bool)
    is_row[expert, source] = True
    # Copies: columns of one tensor, as an operator's results must not be.
    row_expert, row_source = (column.clone() for column in is_row.nonzero(as_tuple=True))
    offsets = is_row.sum(dim=1).cumsum(0).to(torch.int32)
    return row_expert, row_source, offsets, is_row.view(-1).cumsum(0).view_as(is_row) - 1


class Messages:
    """The in-edges of each pair of a routing, pair by pair: one message an edge and expert of its destination.

    Args:
        graph: the edges, self-loops included.
        routing: the pairs.
    """

    def __init__(self, graph: Graph, routing: Routing) -> None:
        self.graph = graph
        self.routing = routing
        self.edge, self.pair, self.ptr = graph.edges.of(routing.token)
        """(M,) the edge that each message runs along, the pair that receives it, ascending; and (P + 1,) where the
        messages of each pair start."""
        self.source = graph.edges.sender.index_select(0, self.edge)
        """(M,) the node that sends it."""
        self.offsets = self.ptr[routing.offsets.long()].to(torch.int32)
        """(E,) cumulative ends of each expert's messages."""

    @lazy
    def expert(self) -> Tensor:
        """(M,) the expert of the pair, ascending."""
        return self.routing.expert.index_select(0, self.pair)

    @lazy
    def rows(self) -> Rows:
        """The sources that each expert transforms."""
        sizes = self.routing.num_experts, self.graph.num_src
        return Rows(*_find_rows(self.expert, self.source, *sizes))

    @lazy
    def from_rows(self) -> Edges:
        """From the rows to the pairs."""
        return self.edges_from(self.rows.place[self.expert, self.source], len(self.rows.source))

    def edges_from(self, sender: Tensor, num_senders: int) -> Edges:
        """To the pairs, from whatever sends each message."""
        return Edges(self.ptr, sender, self.pair, num_senders, self.edge)


class AttentionExperts(StackedExperts):
    r"""E attention convs of which each token runs its expert's: messages along K times the edges, not E times.

    A source is transformed once for each expert that needs it, all in one grouped product; scores, softmax and sums
    run over the in-edges of each (token, expert) pair.

    The linear layers of the PyG class are :class:`LinearExperts` under PyG's names, its other parameters are stacked,
    (E, ...), under theirs.
    """

    layers: tuple[str, ...]
    vectors: tuple[str, ...]

    if TYPE_CHECKING:  # a stacked layer or parameter, None where the options leave it out

        def __getattr__(self, name: str) -> Any: ...

    @staticmethod
    def accepts(conv: Any) -> bool:
        # PyG reduces features of loops over the second row of edge_index, whatever the flow
        turned = conv.flow == "target_to_source" and conv.edge_dim is not None
        return conv.aggr in ("add", "sum") and conv.decomposed_layers == 1 and not turned

    def linears(self, conv: Any) -> dict[str, Any]:
        """The linear layers that the options of a conv leave in use."""
        found: dict[str, Any] = {}
        for name in self.layers:
            layer = getattr(conv, name, None)
            if layer is not None and layer not in found.values():  # one layer may stand for both ends
                found[name] = layer
        return found

    def parts(self, conv: Any) -> list[tuple[Any, Any]]:
        names = (*self.layers, *self.vectors)
        return [(ours, getattr(conv, name)) for name in names if (ours := getattr(self, name)) is not None]

    def build(self, convs: Sequence[Any], backend: Backend) -> None:
        first = convs[0]
        self.backend = backend
        self.heads, self.width = first.heads, first.out_channels
        self.prototype = copy.deepcopy(first)
        for name in (*self.layers, *self.vectors):
            setattr(self.prototype, name, None)
            setattr(self, name, None)
        for name, layer in self.linears(first).items():
            setattr(self, name, stacked(layer, len(convs), backend))
        for name in self.vectors:
            if (vector := getattr(first, name)) is not None:
                setattr(self, name, nn.Parameter(vector.detach().new_empty(len(convs), *vector.shape)))

    def forward(self, graph: Graph, x_src: Tensor, x_dst: Tensor, h: Any, routing: Routing) -> Tensor:
        if getattr(self.prototype, "add_self_loops", False):
            graph = graph.with_loops(fill_value=self.prototype.fill_value)
        y_PHC = self._attend(x_src, x_dst, Messages(graph, routing))
        y_PO = y_PHC.flatten(1) if self.prototype.concat else y_PHC.mean(dim=1)
        return combine(self._finish(y_PO, x_dst, routing), routing)

    @abstractmethod
    def _attend(self, x_src: Tensor, x_dst: Tensor, messages: Messages) -> Tensor:
        """(P, H, C) the sum of each pair's messages, weighted by attention."""

    def _finish(self, y_PO: Tensor, x_dst: Tensor, routing: Routing) -> Tensor:
        """(P, O) with the residual and the bias."""
        if self.res is not None:
            y_PO = y_PO + self.res(dispatch(x_dst, routing), routing.offsets)
        return y_PO if self.bias is None else y_PO + self.bias.index_select(0, routing.expert)

    def _rows(self, linear: LinearExperts, x_src: Tensor, messages: Messages) -> Tensor:
        """(U, O) each row, transformed by its expert."""
        return linear(x_src.index_select(0, messages.rows.source), messages.rows.offsets)

    def _by_head(self, row_UO: Tensor) -> Tensor:
        """(U, H, C)"""
        return row_UO.unflatten(1, (self.heads, self.width))

    def _head_by_head(self, row_PHI: Tensor, weight_EIHO: Tensor, offsets_E: Tensor) -> Tensor:
        """(P, H, O) each head of a row times that head's part of the expert's weight."""
        heads = zip(row_PHI.unbind(1), weight_EIHO.unbind(2), strict=True)
        return torch.stack([grouped_linear(row, w, None, offsets_E, self.backend) for row, w in heads], dim=1)

    def _attention(self, score_MH: Tensor, messages: Messages) -> Tensor:
        """(M, H) the softmax over each pair's messages, with dropout in training and under an explainer's mask."""
        exact = torch.promote_types(score_MH.dtype, torch.float32)
        alpha_MH = softmax(score_MH.to(exact), ptr=messages.ptr).to(score_MH.dtype)
        alpha_MH = F.dropout(alpha_MH, self.prototype.dropout, self.training)
        mask = messages.graph.mask  # as MessagePassing.explain_message applies it
        return alpha_MH if mask is None else alpha_MH * mask[messages.graph.edges.order[messages.edge]][:, None]

    def _edge_attr(self, messages: Messages) -> Tensor | None:
        """(M, F) the edge features, where there are some.

        Raises:
            ValueError: edge features for convs that were built without ``edge_dim``, or whose ``lin_edge`` would not
                run: one that somebody replaced, parametrized or hung something on.
        """
        attr, legal = messages.graph.attr, f"None, since {type(self.prototype).__name__} was built with edge_dim=None"
        check(attr is None or self.lin_edge is not None, "edge_attr", "a tensor", legal)
        check(attr is None or is_plain(self.lin_edge), "lin_edge", "a changed layer", "a plain one: its weight is read")
        return None if attr is None else attr.index_select(0, messages.edge)


class GATExperts(AttentionExperts):
    r"""GAT: :math:`s_{ij} = \mathrm{leaky}(a \cdot W x_j + b \cdot V x_i + c \cdot U e_{ij})`, the values are
    :math:`W x_j`.

    Rows are transformed; or, where a head is no narrower than the input, the sum that a head receives is, and the
    scores follow from the inputs, :math:`a \cdot W x = W^\top a \cdot x`.
    """

    layers = ("lin", "lin_src", "lin_dst", "lin_edge", "res")
    vectors = ("att_src", "att_dst", "att_edge", "bias")

    def _attend(self, x_src: Tensor, x_dst: Tensor, messages: Messages) -> Tensor:
        lin_src, lin_dst = (self.lin_src, self.lin_dst) if self.lin is None else (self.lin, self.lin)
        pairs, offsets = messages.routing, messages.routing.offsets
        raw = lin_src.in_features <= self.width and is_plain(lin_src) and is_plain(lin_dst)
        if raw:
            score_MH = self._of_all(x_src, lin_src, self.att_src, messages.source, messages.expert)
            at_target = self._of_all(x_dst, lin_dst, self.att_dst, pairs.token, pairs.expert)
        else:
            value_UHC = self._by_head(self._rows(lin_src, x_src, messages))
            at_source = self._at(value_UHC, self.att_src, messages.rows.expert)
            score_MH = at_source.index_select(0, messages.from_rows.sender)
            if x_src is x_dst and lin_src is lin_dst and self.prototype.add_self_loops:  # each pair has a row
                target_PHC = value_UHC.index_select(0, messages.rows.place[pairs.expert, pairs.token])
            else:
                target_PHC = self._by_head(lin_dst(dispatch(x_dst, pairs), offsets))
            at_target = self._at(target_PHC, self.att_dst, pairs.expert)
        score_MH = score_MH + at_target.index_select(0, messages.pair)
        if self.lin_edge is not None and (edge_MF := self._edge_attr(messages)) is not None:
            edge_EFH = self._folded(self.lin_edge, self.att_edge)
            score_MH = score_MH + grouped_linear(edge_MF, edge_EFH, None, messages.offsets, self.backend)
        score_MH = F.leaky_relu(score_MH.to(self.att_src.dtype), self.prototype.negative_slope)
        alpha_MH = self._attention(score_MH, messages)
        if raw:
            sum_PHI = weighted_sum(alpha_MH, x_src[:, None], messages.edges_from(messages.source, len(x_src)))
            weight_EIHC = lin_src.weight.unflatten(2, (self.heads, self.width))
            return self._head_by_head(sum_PHI, weight_EIHC, offsets).to(alpha_MH.dtype)
        return weighted_sum(alpha_MH, value_UHC, messages.from_rows)

    def _at(self, value_UHC: Tensor, att_E1HC: Tensor, expert_U: Tensor) -> Tensor:
        """(U, H) the attention vector of a row's expert times the row."""
        return (value_UHC * att_E1HC.squeeze(1).index_select(0, expert_U)).sum(dim=-1)

    def _of_all(self, x_NI: Tensor, layer: LinearExperts, att_E1HC: Tensor, node_U: Tensor, expert_U: Tensor) -> Tensor:
        """(U, H) the same of some nodes and experts, from the attention vectors of all experts times every node."""
        at_NEH = x_NI @ self._folded(layer, att_E1HC).transpose(0, 1).flatten(1)
        return at_NEH.view(-1, self.heads).index_select(0, node_U * self.num_experts + expert_U)

    def _folded(self, layer: LinearExperts, att_E1HC: Tensor) -> Tensor:
        """(E, I, H) the layer and the attention vector in one."""
        return (layer.weight.unflatten(2, (self.heads, self.width)) * att_E1HC).sum(dim=-1)


class TransformerExperts(AttentionExperts):
    r"""TransformerConv: :math:`s_{ij} = Q x_i \cdot (K x_j + U e_{ij}) / \sqrt{C}`, the values are
    :math:`V x_j + U e_{ij}`.

    U is taken to the pairs, :math:`q \cdot U e = U^\top q \cdot e` and :math:`\sum \alpha U e = U \sum \alpha e`.
    """

    layers = ("lin_query", "lin_key", "lin_value", "lin_edge", "lin_skip", "lin_beta")
    vectors = ()

    def linears(self, conv: Any) -> dict[str, Any]:
        found = super().linears(conv)
        if not conv.root_weight:
            del found["lin_skip"]
        return found

    def _attend(self, x_src: Tensor, x_dst: Tensor, messages: Messages) -> Tensor:
        offsets = messages.routing.offsets
        query_PHC = self._by_head(self.lin_query(dispatch(x_dst, messages.routing), offsets)) / math.sqrt(self.width)
        key_UHC = self._by_head(self._rows(self.lin_key, x_src, messages))
        value_UHC = self._by_head(self._rows(self.lin_value, x_src, messages))
        score_MH = dot(query_PHC, key_UHC, messages.from_rows)
        edge_MF = self._edge_attr(messages)
        if edge_MF is None:
            legal = f"a tensor of shape (edges, {self.prototype.edge_dim}), since TransformerConv has an edge_dim"
            check(self.lin_edge is None, "edge_attr", None, legal)
            return weighted_sum(self._attention(score_MH, messages), value_UHC, messages.from_rows)
        edge_EFHC = self.lin_edge.weight.unflatten(2, (self.heads, self.width))
        edge_M1F = edge_MF[:, None].to(query_PHC.dtype)
        from_edges = messages.edges_from(torch.arange(len(edge_MF), device=edge_MF.device), len(edge_MF))
        asked_PHF = self._head_by_head(query_PHC, edge_EFHC.transpose(1, 3), offsets)
        alpha_MH = self._attention(score_MH + dot(asked_PHF, edge_M1F, from_edges), messages)
        edges_PHF = weighted_sum(alpha_MH, edge_M1F, from_edges)
        sum_PHC = weighted_sum(alpha_MH, value_UHC, messages.from_rows)
        return sum_PHC + self._head_by_head(edges_PHF, edge_EFHC, offsets)

    def _finish(self, y_PO: Tensor, x_dst: Tensor, routing: Routing) -> Tensor:
        if self.lin_skip is None:
            return y_PO
        skip_PO = self.lin_skip(dispatch(x_dst, routing), routing.offsets)
        if self.lin_beta is None:
            return y_PO + skip_PO
        beta_P1 = self.lin_beta(torch.cat([y_PO, skip_PO, y_PO - skip_PO], dim=-1), routing.offsets).sigmoid()
        return beta_P1 * skip_PO + (1 - beta_P1) * y_PO


class GATv2Experts(AttentionExperts):
    r"""GATv2: :math:`s_{ij} = a \cdot \mathrm{leaky}(W x_j + V x_i + U e_{ij})`, the values are :math:`W x_j`."""

    layers = ("lin_l", "lin_r", "lin_edge", "res")
    vectors = ("att", "bias")

    def _attend(self, x_src: Tensor, x_dst: Tensor, messages: Messages) -> Tensor:
        source_UO = self._rows(self.lin_l, x_src, messages)
        lin_r = self.lin_l if self.lin_r is None else self.lin_r
        target_PO = lin_r(dispatch(x_dst, messages.routing), messages.routing.offsets)
        edge_MF = self._edge_attr(messages)
        edge_EFO = None if edge_MF is None else self.lin_edge.weight
        # a head's vector in that head's column, so that one product gives the scores of all
        heads = self.att.new_ones(self.heads).diag()
        att_EOH = (self.att.squeeze(1)[..., None] * heads[:, None]).flatten(1, 2)
        slope = self.prototype.negative_slope
        score_MH = additive_scores(source_UO, target_PO, edge_MF, edge_EFO, att_EOH, slope, messages)
        alpha_MH = self._attention(score_MH, messages)
        return weighted_sum(alpha_MH, self._by_head(source_UO), messages.from_rows)


def additive_scores(
    source_UO: Tensor,
    target_PO: Tensor,
    edge_MF: Tensor | None,
    edge_EFO: Tensor | None,
    att_EOH: Tensor,
    negative_slope: float,
    messages: Messages,
) -> Tensor:
    r"""(M, H) the scores :math:`a^\top \mathrm{leaky}(s_{u(m)} + t_{p(m)} + e_m U)`, by blocks: no row for each message
    is kept. Can be differentiated once.

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
    places = edges.sender, edges.receiver, messages.offsets
    return _AdditiveScores.apply(source_UO, target_PO, edge_MF, edge_EFO, att_EOH, negative_slope, *places)


class _AdditiveScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *rows, att_EOH, ctx.negative_slope, sender, receiver, offsets = inputs
        ctx.save_for_backward(*rows, att_EOH, sender, receiver, offsets)
        return _score_additively(att_EOH, *rows, ctx.negative_slope, sender, receiver, offsets)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_MH: Tensor) -> tuple[Tensor | None, ...]:
        *rows, att_EOH, sender, receiver, offsets = ctx.saved_tensors
        places = sender, receiver, offsets
        found = _score_additively_backward(grad_MH, att_EOH, *rows, ctx.negative_slope, *places)
        grad_att, grad_source, grad_target, *of_edges = found
        return grad_source, grad_target, *(of_edges or [None, None]), grad_att, None, None, None, None


@operator(fake=lambda att_EOH, *rest: att_EOH.new_empty(rest[-2].size(0), att_EOH.size(2)))
def _score_additively(
    att_EOH: Tensor,
    source_UO: Tensor,
    target_PO: Tensor,
    edge_MF: Tensor | None,
    edge_EFO: Tensor | None,
    negative_slope: float,
    sender: Tensor,
    receiver: Tensor,
    offsets: Tensor,
) -> Tensor:
    """In float32 at least. Products are written in place: autocast leaves those alone."""
    dtype = att_EOH.dtype
    *rows, att_EOH = _exact(source_UO, target_PO, edge_MF, edge_EFO, att_EOH)
    out_MH = att_EOH.new_empty(len(sender), att_EOH.size(2))
    for expert, block in _blocks(offsets.tolist(), att_EOH):
        sum_BO = F.leaky_relu_(_sums(rows, sender, receiver, expert, block), negative_slope)
        torch.mm(sum_BO, att_EOH[expert], out=out_MH[block])
    return out_MH.to(dtype)


@operator(fake=lambda _, *rest: [torch.empty_like(t) for t in rest[:5] if t is not None])
def _score_additively_backward(
    grad_MH: Tensor,
    att_EOH: Tensor,
    source_UO: Tensor,
    target_PO: Tensor,
    edge_MF: Tensor | None,
    edge_EFO: Tensor | None,
    negative_slope: float,
    sender: Tensor,
    receiver: Tensor,
    offsets: Tensor,
) -> list[Tensor]:
    """The gradients of the tensors that there are, in their order."""
    given = (att_EOH, source_UO, target_PO, edge_MF, edge_EFO)
    att_EOH, *rows = _exact(*given)
    grad_MH = grad_MH.to(att_EOH.dtype)
    grads: list[Any] = [None if t is None else torch.zeros_like(t) for t in (att_EOH, *rows)]
    grad_att, grad_source, grad_target, grad_edge, grad_weight = grads
    for expert, block in _blocks(offsets.tolist(), att_EOH):
        sum_BO = _sums(rows, sender, receiver, expert, block)
        grad_BO = torch.empty_like(sum_BO).addmm_(grad_MH[block], att_EOH[expert].T, beta=0)
        grad_BO = torch.ops.aten.leaky_relu_backward(grad_BO, sum_BO, negative_slope, False)
        grad_att[expert].addmm_(F.leaky_relu_(sum_BO, negative_slope).T, grad_MH[block])
        grad_source.index_add_(0, sender[block], grad_BO)
        grad_target.index_add_(0, receiver[block], grad_BO)
        if grad_edge is not None:
            torch.mm(grad_BO, rows[3][expert].T, out=grad_edge[block])
            grad_weight[expert].addmm_(rows[2][block].T, grad_BO)
    return [grad.to(t.dtype) for grad, t in zip(grads, given, strict=True) if t is not None]


def _exact(*tensors: Any) -> list[Any]:
    """In float32 at least, those that there are."""
    return [None if t is None else t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def _blocks(ends: list[int], att_EOH: Tensor) -> Iterator[tuple[int, slice]]:
    """The messages in blocks, each of one expert."""
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        for block in blocks(start, end, att_EOH.size(1), att_EOH.device):
            yield expert, block


def _sums(rows: Sequence[Any], sender: Tensor, receiver: Tensor, expert: int, block: slice) -> Tensor:
    """(B, O) the sums before the leaky ReLU, of a block of messages."""
    source_UO, target_PO, edge_MF, edge_EFO = rows
    sum_BO = source_UO.index_select(0, sender[block])
    sum_BO += target_PO.index_select(0, receiver[block])
    return sum_BO if edge_MF is None else sum_BO.addmm_(edge_MF[block], edge_EFO[expert])
