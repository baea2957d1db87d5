"""TransformerConv experts. Shapes: I in, O out, F edge features, E experts, P pairs, M messages, H heads, C width."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gmoe.conv.attention import AttentionExperts
from gmoe.conv.pair_graph import PairGraph
from gmoe.conv.segment import dot, weighted_sum
from gmoe.experts import LinearExperts
from gmoe.routing import Routing


class TransformerExperts(AttentionExperts):
    r"""TransformerConv: :math:`s_{ij} = Q x_i \cdot (K x_j + U e_{ij}) / \sqrt{C}`, the values are
    :math:`V x_j + U e_{ij}`.

    U is taken to the pairs, :math:`q \cdot U e = U^\top q \cdot e` and :math:`\sum \alpha U e = U \sum \alpha e`.
    """

    layers = ("lin_query", "lin_key", "lin_value", "lin_edge", "lin_skip", "lin_beta")
    vectors = ()
    lin_query: LinearExperts
    lin_key: LinearExperts
    lin_value: LinearExperts
    lin_skip: LinearExperts | None
    lin_beta: LinearExperts | None

    def _layers(self, conv: Any) -> dict[str, Any]:
        found = super()._layers(conv)
        if not conv.root_weight:
            del found["lin_skip"]
        return found

    def _attend(self, x_src: Tensor, x_PI: Tensor, pairs: PairGraph) -> Tensor:
        offsets, messages = pairs.routing.offsets, pairs.messages
        heard_UI = x_src.index_select(0, pairs.heard)
        query_PHC = self._by_head(self.lin_query(x_PI, offsets)) / math.sqrt(self.width)
        key_UHC = self._by_head(self.lin_key(heard_UI, pairs.heard_offsets))
        value_UHC = self._by_head(self.lin_value(heard_UI, pairs.heard_offsets))
        score_MH = dot(query_PHC, key_UHC, messages)
        edge_MF = self._edge_attr(pairs)
        if self.lin_edge is None or edge_MF is None:
            return weighted_sum(self._attention(score_MH, pairs), value_UHC, messages)
        edge_EFHC = self.lin_edge.weight.unflatten(2, (self.heads, self.width))
        edge_M1F = edge_MF[:, None].to(query_PHC.dtype)
        asked_PHF = self._head_by_head(query_PHC, edge_EFHC.transpose(1, 3), offsets)
        alpha_MH = self._attention(score_MH + dot(asked_PHF, edge_M1F, pairs.edge_messages), pairs)
        edges_PHF = weighted_sum(alpha_MH, edge_M1F, pairs.edge_messages)
        return weighted_sum(alpha_MH, value_UHC, messages) + self._head_by_head(edges_PHF, edge_EFHC, offsets)

    def _edge_attr(self, pairs: PairGraph) -> Tensor | None:
        if pairs.edge_attr is None and self.lin_edge is not None:
            raise ValueError(
                f"edge_attr: got None, expected a tensor of shape (edges, {self.lin_edge.in_features}), since "
                "TransformerConv was built with an edge_dim"
            )
        return super()._edge_attr(pairs)

    def _finish(self, y_PO: Tensor, x_PI: Tensor, routing: Routing) -> Tensor:
        if self.lin_skip is None:
            return y_PO
        skip_PO = self.lin_skip(x_PI, routing.offsets)
        if self.lin_beta is None:
            return y_PO + skip_PO
        beta_P1 = self.lin_beta(torch.cat([y_PO, skip_PO, y_PO - skip_PO], dim=-1), routing.offsets).sigmoid()
        return beta_P1 * skip_PO + (1 - beta_P1) * y_PO
