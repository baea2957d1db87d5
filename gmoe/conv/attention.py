"""Attention experts: GAT, GATv2, TransformerConv.

Shapes: N sources, I in, O out features, H heads of width C (O = H C, unless heads are averaged), F
edge features, E experts, P (token, expert) pairs, M messages (an edge and an expert of its
destination), U rows (a source and an expert that needs it).

A layer transforms U rows, sends M messages from rows to pairs, and sums over each pair.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gmoe._checks import check, must_be_called
from gmoe.conv.additive import additive_scores
from gmoe.conv.base import Conv, StackedExperts, is_plain
from gmoe.conv.call import Call
from gmoe.conv.graph import Graph
from gmoe.conv.messages import AllMessages, DenseMessages, Messages
from gmoe.experts import LinearExperts
from gmoe.portable import cast, exported_as
from gmoe.routed import are_few_numbers
from gmoe.routing import Routing
from gmoe.sums import add_ends, dot, softmax, to_messages, weighted_sum


@exported_as(lambda *_: True)  # nobody can ask which rows have a message
def _runs_all(x_src: Tensor, routing: Routing, width: int) -> bool:
    """True if each expert transforms all nodes, of which there are few."""
    return are_few_numbers(x_src, routing, x_src.size(1) + width)


class AttentionExperts(StackedExperts):
    r"""E attention convs; each token runs its experts: messages along K times the edges, not E.

    A source is transformed once for each expert that needs it, all in one grouped product. Scores,
    softmax and sums run over the in-edges of each (token, expert) pair.
    """

    @staticmethod
    def accepts(conv: Conv) -> bool:
        # PyG averages the features of loops over the second row of edge_index, whatever the flow.
        has_turned_loops = conv.flow == "target_to_source" and conv.edge_dim is not None
        is_sum = conv.aggr in ("add", "sum")
        return is_sum and conv.decomposed_layers == 1 and not has_turned_loops

    def build(self, convs: Sequence[Conv]) -> None:
        super().build(convs)
        self.heads = convs[0].heads
        self.width = convs[0].out_channels

    def forward(self, call: Call, routing: Routing) -> Tensor:
        runs_all = _runs_all(call.x_src, routing, self.heads * self.width)
        make = AllMessages if runs_all else Messages
        messages = make(self._looped(call.graph), routing)
        return messages.combine(self._outputs(call.x_src, call.x_dst, messages))

    def on_all(self, call: Call) -> Tensor:
        if must_be_called(self):
            return super().on_all(call)
        messages = DenseMessages(self._looped(call.graph))
        return self._outputs(call.x_src, call.x_dst, messages)

    def _looped(self, graph: Graph) -> Graph:
        """The graph with the loops that the convs add."""
        if getattr(self.prototype, "add_self_loops", False):
            return graph.with_loops(fill_value=self.prototype.fill_value)
        return graph

    def _outputs(self, x_src: Tensor, x_dst: Tensor, messages: Messages) -> Tensor:
        """(P, O) each pair's output."""
        y_PHC = self._attend(x_src, x_dst, messages)
        y_PO = y_PHC.flatten(1) if self.prototype.concat else y_PHC.mean(dim=1)
        return self._finish(y_PO, x_dst, messages)

    @abstractmethod
    def _attend(self, x_src: Tensor, x_dst: Tensor, messages: Messages) -> Tensor:
        """(P, H, C) the sum of each pair's messages, weighted by attention."""

    def _finish(self, y_PO: Tensor, x_dst: Tensor, messages: Messages) -> Tensor:
        """(P, O) with the residual and the bias."""
        if self.res is not None:
            y_PO = y_PO + messages.tokens_by(self.res, x_dst)
        bias_EO = self.bias
        return y_PO if bias_EO is None else y_PO + messages.at_pairs(bias_EO)

    def _by_head(self, row_UO: Tensor) -> Tensor:
        """(U, H, C) the rows, split by head."""
        return row_UO.unflatten(1, (self.heads, self.width))

    def _head_by_head(self, row_PHI: Tensor, weight_EIHO: Tensor, messages: Messages) -> Tensor:
        """(P, H, O) each head of a pair times that head's part of its expert's weight."""
        outputs = [
            messages.pairs_times(row_PI, weight_EIO)
            for row_PI, weight_EIO in zip(row_PHI.unbind(1), weight_EIHO.unbind(2), strict=True)
        ]
        return torch.stack(outputs, dim=1)

    def _attention(self, score_MH: Tensor, messages: Messages) -> Tensor:
        """(M, H) the softmax over each pair's messages, with dropout and an explainer's mask."""
        if messages.graph.is_replaced is not None:
            # Replaced loops get no weight. The softmax stays finite: their pairs have the new loop.
            is_replaced_M = messages.of_edges(messages.graph.is_replaced)
            score_MH = score_MH.masked_fill(is_replaced_M[:, None], -torch.inf)
        exact = torch.promote_types(score_MH.dtype, torch.float32)
        alpha_MH = cast(softmax(cast(score_MH, exact), messages.from_sources), score_MH.dtype)
        dropped_MH = F.dropout(alpha_MH, self.prototype.dropout, self.training)
        mask = messages.graph.mask
        if mask is None:
            return dropped_MH
        # After the softmax, as in MessagePassing.explain_message.
        given_M = messages.of_edges(messages.graph.edges.order)
        return dropped_MH * mask[given_M][:, None]

    def _edge_attr(self, messages: Messages) -> Tensor | None:
        """(M, F) the edge features; ``None`` if the graph has none.

        Raises:
            ValueError: edge features for convs that were built without ``edge_dim``, or whose
                ``lin_edge`` was replaced, parametrized or hooked: only its weight is read.
        """
        attr = messages.graph.attr
        if attr is None:
            return None
        if self.lin_edge is None:
            name = type(self.prototype).__name__
            raise ValueError(
                f"edge_attr: got a tensor, expected None, since {name} was built with edge_dim=None"
            )
        # The stacks note their changes in one place, where unstacked ones are noted, too.
        is_as_built = type(self.lin_edge) is LinearExperts and not must_be_called(self.lin_edge)
        check(is_as_built, "lin_edge", "a changed layer", "a plain one: its weight is read")
        return attr.index_select(0, messages.of_edges(messages.graph.edges.order))


class GATExperts(AttentionExperts):
    r"""GAT: :math:`s_{ij} = \mathrm{leaky}(a \cdot W x_j + b \cdot V x_i + c \cdot U e_{ij})`.

    The values are :math:`W x_j`. There are two orders of the same sums. Usually rows are
    transformed, then summed. If a head is at least as wide as the input, the inputs are summed,
    then transformed; the scores follow from the inputs, :math:`a \cdot W x = W^\top a \cdot x`.
    """

    parts = (
        "lin",
        "lin_src",
        "lin_dst",
        "lin_edge",
        "res",
        "att_src",
        "att_dst",
        "att_edge",
        "bias",
    )

    def _attend(self, x_src: Tensor, x_dst: Tensor, messages: Messages) -> Tensor:
        lin_src = self.lin_src if self.lin is None else self.lin
        lin_dst = self.lin_dst if self.lin is None else self.lin
        sums_inputs = lin_src.in_features <= self.width and is_plain(lin_src) and is_plain(lin_dst)

        # 1. The part of the scores that each end of a message gives.
        att_src_E1HC = self.att_src
        if sums_inputs:
            weight_EOI = lin_src.weight
            of_target_EOI = weight_EOI if lin_dst is lin_src else lin_dst.weight
            source_NEH = self._folded_scores(x_src, weight_EOI, att_src_E1HC)
            target_TEH = self._folded_scores(x_dst, of_target_EOI, self.att_dst)
            from_target_PH = messages.by_token(target_TEH)
            # Not by add_ends, which would sort the messages by source and expert in the backward.
            from_source_MH = messages.by_source(source_NEH)
            edges = messages.from_sources
            score_MH = from_source_MH + to_messages(from_target_PH, edges.ptr, edges.receiver)
        else:
            value_UHC = self._by_head(messages.rows_by(lin_src, x_src))
            from_source_UH = self._scores(value_UHC, messages.at_rows(att_src_E1HC))
            is_one_map = x_src is x_dst and lin_src is lin_dst
            if is_one_map and self.prototype.add_self_loops:
                # The loop of its token makes each pair a row, which is transformed already.
                target_PHC = messages.pairs_of_rows(value_UHC)
            else:
                target_PO = messages.tokens_by(lin_dst, x_dst)
                target_PHC = self._by_head(target_PO)
            from_target_PH = self._scores(target_PHC, messages.at_pairs(self.att_dst))
            score_MH = add_ends(from_source_UH, from_target_PH, messages.from_rows)

        # 2. The part that the edge gives.
        edge_MF = None if self.lin_edge is None else self._edge_attr(messages)
        if edge_MF is not None:
            edge_EFH = self._folded(self.lin_edge.weight, self.att_edge)
            score_MH = score_MH + messages.times(edge_MF, edge_EFH)

        # 3. Softmax over each pair's messages, and the weighted sum.
        score_MH = cast(score_MH, att_src_E1HC.dtype)
        score_MH = F.leaky_relu(score_MH, self.prototype.negative_slope)
        alpha_MH = self._attention(score_MH, messages)
        if not sums_inputs:
            return weighted_sum(alpha_MH, value_UHC, messages.from_rows)
        sum_PHI = weighted_sum(alpha_MH, x_src[:, None], messages.from_sources)
        weight_EIHC = weight_EOI.mT.unflatten(2, (self.heads, self.width))
        sum_PO = self._head_by_head(sum_PHI, weight_EIHC, messages)
        return cast(sum_PO, alpha_MH.dtype)

    def _scores(self, value_UHC: Tensor, att_U1HC: Tensor) -> Tensor:
        """(U, H) each row times its expert's attention vector."""
        return (value_UHC * att_U1HC.squeeze(1)).sum(dim=-1)

    def _folded_scores(self, x_NI: Tensor, weight_EOI: Tensor, att_E1HC: Tensor) -> Tensor:
        """(N, E, H) the same from the inputs, for each node and each expert in one product."""
        folded_IEH = self._folded(weight_EOI, att_E1HC).transpose(0, 1)
        score_NF = x_NI @ folded_IEH.flatten(1)
        return score_NF.view(-1, self.num_experts, self.heads)

    def _folded(self, weight_EOI: Tensor, att_E1HC: Tensor) -> Tensor:
        """(E, I, H) a layer and the attention vector in one."""
        weight_EHCI = weight_EOI.unflatten(1, (self.heads, self.width))
        att_EHC1 = att_E1HC.squeeze(1)[..., None]
        return (weight_EHCI * att_EHC1).sum(dim=2).mT


class TransformerExperts(AttentionExperts):
    r"""TransformerConv: :math:`s_{ij} = Q x_i \cdot (K x_j + U e_{ij}) / \sqrt{C}`, with the values
    :math:`V x_j + U e_{ij}`.

    U is applied to pairs, not to messages, of which there are more: :math:`q \cdot U e = U^\top q
    \cdot e` and :math:`\sum \alpha U e = U \sum \alpha e`.
    """

    parts = ("lin_query", "lin_key", "lin_value", "lin_edge", "lin_skip", "lin_beta")

    def is_used(self, name: str, conv: Conv) -> bool:
        return name != "lin_skip" or bool(conv.root_weight)  # PyG makes it all the same

    def _attend(self, x_src: Tensor, x_dst: Tensor, messages: Messages) -> Tensor:
        # 1. Queries of the pairs, keys and values of the rows, and their scores.
        query_PO = messages.tokens_by(self.lin_query, x_dst)
        query_PHC = self._by_head(query_PO) / math.sqrt(self.width)
        key_UHC = self._by_head(messages.rows_by(self.lin_key, x_src))
        value_UHC = self._by_head(messages.rows_by(self.lin_value, x_src))
        score_MH = dot(query_PHC, key_UHC, messages.from_rows)
        edge_MF = self._edge_attr(messages)
        if edge_MF is None:
            if self.lin_edge is not None:
                raise ValueError(
                    "edge_attr: got None, expected a tensor of shape (edges, "
                    f"{self.prototype.edge_dim}), since TransformerConv has an edge_dim"
                )
            alpha_MH = self._attention(score_MH, messages)
            return weighted_sum(alpha_MH, value_UHC, messages.from_rows)

        # 2. What the edges add to the scores: each message is sent by its edge, too.
        edge_EFHC = self.lin_edge.weight.mT.unflatten(2, (self.heads, self.width))
        edge_M1F = edge_MF[:, None].to(query_PHC.dtype)
        message_M = torch.arange(edge_MF.size(0), device=edge_MF.device)
        from_edges = messages.edges_from(message_M, edge_MF.size(0))
        edge_query_PHF = self._head_by_head(query_PHC, edge_EFHC.transpose(1, 3), messages)
        score_MH = score_MH + dot(edge_query_PHF, edge_M1F, from_edges)

        # 3. Softmax, and the sums of values and of edge features.
        alpha_MH = self._attention(score_MH, messages)
        edges_PHF = weighted_sum(alpha_MH, edge_M1F, from_edges)
        values_PHC = weighted_sum(alpha_MH, value_UHC, messages.from_rows)
        return values_PHC + self._head_by_head(edges_PHF, edge_EFHC, messages)

    def _finish(self, y_PO: Tensor, x_dst: Tensor, messages: Messages) -> Tensor:
        if self.lin_skip is None:
            return y_PO
        skip_PO = messages.tokens_by(self.lin_skip, x_dst)
        if self.lin_beta is None:
            return y_PO + skip_PO
        both_PO = torch.cat([y_PO, skip_PO, y_PO - skip_PO], dim=-1)
        beta_P1 = messages.pairs_by(self.lin_beta, both_PO).sigmoid()
        return beta_P1 * skip_PO + (1 - beta_P1) * y_PO


class GATv2Experts(AttentionExperts):
    r"""GATv2: :math:`s_{ij} = a \cdot \mathrm{leaky}(W x_j + V x_i + U e_{ij})`, with the values
    :math:`W x_j`.
    """

    parts = ("lin_l", "lin_r", "lin_edge", "res", "att", "bias")

    def _attend(self, x_src: Tensor, x_dst: Tensor, messages: Messages) -> Tensor:
        lin_r = self.lin_l if self.lin_r is None else self.lin_r
        source_UO = messages.rows_by(self.lin_l, x_src)
        target_PO = messages.tokens_by(lin_r, x_dst)
        edge_MF = self._edge_attr(messages)
        edge_EFO = None if edge_MF is None else self.lin_edge.weight.mT
        # Each head's vector in that head's column: one product gives the scores of all heads.
        att_EHC = self.att.squeeze(1)
        is_head_HH = att_EHC.new_ones(self.heads).diag()
        att_EOH = (att_EHC[..., None] * is_head_HH[:, None]).flatten(1, 2)
        score_MH = additive_scores(
            source_UO,
            target_PO,
            edge_MF,
            edge_EFO,
            att_EOH,
            self.prototype.negative_slope,
            messages,
        )
        alpha_MH = self._attention(score_MH, messages)
        return weighted_sum(alpha_MH, self._by_head(source_UO), messages.from_rows)
