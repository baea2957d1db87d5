"""GAT experts. Shapes: N sources, I in, F edge features, E experts, P pairs, M messages, H heads, C width of a head."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from gmoe.conv.attention import AttentionExperts
from gmoe.conv.pair_graph import PairGraph
from gmoe.conv.segment import weighted_sum
from gmoe.dispatch import grouped_linear
from gmoe.experts import LinearExperts


class GATExperts(AttentionExperts):
    r"""GAT: :math:`s_{ij} = \mathrm{leaky}(a \cdot W x_j + b \cdot V x_i + c \cdot U e_{ij})`, the values are
    :math:`W x_j`.

    The scores follow from the inputs, :math:`a \cdot W x = W^\top a \cdot x`, so that only values are transformed: of
    each source that an expert hears, or, where a head is no narrower than the input, of the sum that a head hears.
    """

    layers = ("lin", "lin_src", "lin_dst", "lin_edge", "res")
    vectors = ("att_src", "att_dst", "att_edge", "bias")
    lin: LinearExperts | None
    lin_src: LinearExperts
    lin_dst: LinearExperts
    att_src: nn.Parameter
    att_dst: nn.Parameter
    att_edge: nn.Parameter

    def _attend(self, x_src: Tensor, x_PI: Tensor, pairs: PairGraph) -> Tensor:
        lin_src, lin_dst = (self.lin_src, self.lin_dst) if self.lin is None else (self.lin, self.lin)
        offsets = pairs.routing.offsets
        source_IEH = self._folded(lin_src, self.att_src).transpose(0, 1)
        at_source = (x_src @ source_IEH.flatten(1)).view(-1, self.heads)
        at_target = grouped_linear(x_PI, self._folded(lin_dst, self.att_dst), None, offsets, self.backend)
        score_MH = at_source.index_select(0, pairs.source * self.num_experts + pairs.expert)
        score_MH = score_MH + at_target.index_select(0, pairs.pair)
        if self.lin_edge is not None and pairs.edge_attr is not None:
            edge_EFH = self._folded(self.lin_edge, self.att_edge)
            score_MH = score_MH + grouped_linear(pairs.edge_attr, edge_EFH, None, pairs.offsets, self.backend)
        score_MH = F.leaky_relu(score_MH.to(self.att_src.dtype), self.prototype.negative_slope)
        alpha_MH = self._attention(score_MH, pairs)
        if lin_src.in_features <= self.width:
            heard_PHI = weighted_sum(alpha_MH, x_src[:, None], pairs.node_messages)
            weight_EIHC = lin_src.weight.unflatten(2, (self.heads, self.width))
            return self._head_by_head(heard_PHI, weight_EIHC, offsets).to(alpha_MH.dtype)
        value_UO = lin_src(x_src.index_select(0, pairs.heard), pairs.heard_offsets)
        return weighted_sum(alpha_MH, self._by_head(value_UO), pairs.messages)

    def _folded(self, layer: LinearExperts, att_E1HC: Tensor) -> Tensor:
        """(E, I, H) the layer and the attention vector in one."""
        return (layer.weight.unflatten(2, (self.heads, self.width)) * att_E1HC).sum(dim=-1)
