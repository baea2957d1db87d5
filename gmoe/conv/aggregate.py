"""Experts that share one aggregation: GCN, SAGE, GraphConv, GIN and GINE.

Shapes: N nodes, T tokens (destinations), M edges, D in, O out width, A columns of the aggregate, I
columns of the rows that experts transform, H hidden width, E experts, P pairs.

A conv of these kinds sums over neighbors, then transforms the sum. The sum is the same for all
experts: a layer computes it once, and experts transform the rows of their tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmoe._autograd import autocasts, row_norms
from gmoe._checks import must_be_called
from gmoe.conv.base import Conv, StackedExperts, all_of, is_plain
from gmoe.conv.call import Call
from gmoe.conv.explain import with_mask
from gmoe.conv.graph import Graph
from gmoe.conv.matrix import Matrix
from gmoe.conv.network import can_be_stacked, run_network
from gmoe.portable import exported_as
from gmoe.products import NUMBERS, combine, dispatch
from gmoe.routed import routed_linear
from gmoe.routing import Routing

MakeMatrix: TypeAlias = Callable[..., Matrix]
"""Called as ``make_matrix(graph, dtype=...)``, gives the A of a sum A x over in-edges."""


class AggregateOnce(StackedExperts):
    """Convs whose aggregation has no parameters, or is linear: A (x W_e) = (A x) W_e.

    Sums and means of the sources' rows are sparse products of the :class:`Graph`. Any other
    aggregation is PyG's own: the conv itself without its transform, called as ``conv((x, None),
    edge_index, size=...)`` with the edge arguments it takes. If the messages of a subclass are more
    than rows times a weight, its :meth:`matrix_maker` returns ``None``: a product would lose the
    rest.

    The first of a subclass's ``parts`` transforms the aggregate.
    """

    weighted_by: Literal["weight", "values"] = "values"
    """The factors of messages, see :meth:`Graph.summing`."""

    @staticmethod
    def accepts(conv: Conv) -> bool:
        # What an aggregation learns differs from expert to expert.
        return next(conv.aggr_module.parameters(), None) is None

    def build(self, convs: Sequence[Conv]) -> None:
        super().build(convs)
        self.make_matrix = self.matrix_maker(convs[0])
        # The first part transforms what was aggregated: without it, the prototype aggregates.
        setattr(self.prototype, self.parts[0], nn.Identity())

    def matrix_maker(self, conv: Conv) -> MakeMatrix | None:
        """How the matrix of a conv's aggregation is made; ``None`` if it is not a product."""
        if conv.aggr not in ("add", "sum", "mean"):
            return None
        return partial(Graph.summing, by=self.weighted_by, mean=conv.aggr == "mean")

    def aggregate(self, call: Call, routing: Routing | None = None) -> Tensor | None:
        if self.make_matrix is None:
            return self._by_pyg(call)
        if routing is not None and self.can_sum_pairs(call) and _gains_by_pairs(call, routing):
            return None
        return call.graph.product(self.matrix(call), call.x_src)

    def matrix(self, call: Call) -> Matrix:
        """The A of the sum A x, if it is one."""
        assert self.make_matrix is not None
        return self.make_matrix(call.graph, dtype=call.x_src.dtype)

    def can_sum_pairs(self, call: Call) -> bool:
        """True if :meth:`forward` runs without the aggregate, and sums for each pair itself."""
        return False

    def _by_pyg(self, call: Call) -> Tensor:
        """(T, A) what the stripped conv itself aggregates."""
        graph = call.graph
        x_src = call.x_src
        conv = self.prototype
        if graph.mask is not None:
            conv = with_mask(conv, graph.mask, graph.edge_index)
        adj = graph.edge_index
        x = x_src
        if graph.is_sparse:
            adj = graph.adj
            # Sparse products have no kernels for half precision.
            x = x_src.to(torch.promote_types(x_src.dtype, torch.float32))
        stops_autocast = graph.is_sparse and autocasts(x_src.device)
        with torch.autocast(x.device.type, enabled=False) if stops_autocast else nullcontext():
            size = (graph.num_src, graph.num_rows)
            out = conv((x, None), adj, **graph.args_for(conv), size=size)
        return out[: graph.num_dst].to(x_src.dtype)


@exported_as(lambda *_: False)  # how many numbers there are is not known
def _gains_by_pairs(call: Call, routing: Routing) -> bool:
    """True if it takes less time to sum in the order of the pairs than to move the sums there.

    That is where their rows outgrow a CPU's caches. Not if the features need a gradient, which
    would sort the messages once more; nor if the graph keeps their sum.
    """
    x_src, graph = call.x_src, call.graph
    is_large = x_src.device.type == "cpu" and x_src.numel() > NUMBERS
    is_kept = x_src is graph.x or graph.mask is not None
    return is_large and not is_kept and not x_src.requires_grad and routing.pairs_each == 1


class LinearAggregation(AggregateOnce):
    """One linear map per expert of the aggregate and, if the conv uses them, the root's features.

    The first two ``parts`` are these layers, or the first layer and a bias.
    """

    normalize = False
    """Whether the convs normalize the rows of their output."""

    def build(self, convs: Sequence[Conv]) -> None:
        super().build(convs)
        self.width: int = self.layers()[0].in_features

    def layers(self) -> list[Any]:
        """The linear layer of the aggregate, and of the root if it has one."""
        # Not getattr: a bias with a base would be added up, for nobody.
        children = dict(self.named_children())
        return [children[part] for part in self.parts if part in children]

    def bias_of(self, layers: Sequence[Any]) -> Tensor | None:
        """(E, O) the bias of the convs, or of the layers of their aggregates."""
        bias: Tensor | None = self.bias if "bias" in self.parts else layers[0].bias
        return bias

    @property
    def aggregate_width(self) -> int:
        return self.width

    def can_sum_pairs(self, call: Call) -> bool:
        return len(self.layers()) == 1  # else the rows of the roots move anyway

    def forward(self, call: Call, routing: Routing) -> Tensor:
        layers = self.layers()
        if call.aggregate is None:
            rows_PI = self.matrix(call).times(call.x_src, routing.token)
        elif not self.normalize and all(map(is_plain, layers)):
            weights = [layer.weight for layer in layers]
            bias_EO = self.bias_of(layers)
            parts = [call.aggregate, call.x_dst][: len(layers)]
            return routed_linear(parts, weights, bias_EO, routing)
        else:
            rows_PI = dispatch(call.aggregate, routing)
        y_PO = layers[0](rows_PI, routing.offsets)
        if len(layers) == 2:
            y_PO = y_PO + layers[1](dispatch(call.x_dst, routing), routing.offsets)
        if "bias" in self.parts and self.bias is not None:
            y_PO = y_PO + self.bias.index_select(0, routing.expert).to(y_PO.dtype)
        if self.normalize:
            y_PO = y_PO / row_norms(y_PO)
        return combine(y_PO, routing)

    def on_all(self, call: Call) -> Tensor:
        layers = self.layers()
        if self.normalize or must_be_called(self) or not all(map(is_plain, layers)):
            return super().on_all(call)
        assert call.aggregate is not None  # these experts share one
        # squeeze, not [0], whose backward pass would fill a whole weight with zeros.
        weights = [layer.weight.squeeze(0) for layer in layers]
        bias_1O = self.bias_of(layers)
        bias = None if bias_1O is None else bias_1O.squeeze(0)
        out = F.linear(call.aggregate.to(weights[0].dtype), weights[0], bias)
        if len(layers) == 2:
            out.add_(F.linear(call.x_dst.to(weights[1].dtype), weights[1]))
        return out


class GCNExperts(LinearAggregation):
    """GCN: x' = (D^-1/2 (A + I) D^-1/2 x) W_e + b_e."""

    parts = ("lin", "bias")
    weighted_by = "weight"

    @staticmethod
    def accepts(conv: Conv) -> bool:
        return conv.aggr in ("add", "sum")  # it transforms first: the aggregation must be linear

    def matrix_maker(self, conv: Conv) -> MakeMatrix | None:
        if conv.normalize:
            return partial(Graph.normalized, improved=conv.improved, loops=conv.add_self_loops)
        return super().matrix_maker(conv)


class SAGEExperts(LinearAggregation):
    """SAGE: x' = aggr_j(x_j) W_e + x_i V_e + b_e, optionally normalized."""

    parts = ("lin_l", "lin_r")

    @staticmethod
    def accepts(conv: Conv) -> bool:
        return not conv.project and AggregateOnce.accepts(conv)

    def build(self, convs: Sequence[Conv]) -> None:
        super().build(convs)
        self.normalize = bool(convs[0].normalize)
        self.prototype.root_weight = False
        self.prototype.normalize = False


class GraphConvExperts(LinearAggregation):
    """GraphConv: x' = aggr_j(w_ji x_j) W_e + x_i V_e + b_e."""

    parts = ("lin_rel", "lin_root")
    weighted_by = "weight"


class GINExperts(AggregateOnce):
    """GIN: x' = nn_e((1 + eps_e) x_i + aggr_j(x_j)).

    The networks are PyG's MLPs or ``nn.Sequential``s of linear layers, batch norms, activations and
    dropouts. Each expert has batch norms of its own, over its own rows.
    """

    parts = ("nn", "eps")

    @staticmethod
    def accepts(conv: Conv) -> bool:
        return AggregateOnce.accepts(conv) and can_be_stacked(conv.nn)

    def can_sum_pairs(self, call: Call) -> bool:
        is_one_set = call.x_src is call.x_dst
        adds = self.prototype.aggr in ("add", "sum")  # a mean would divide the nodes, too
        return is_one_set and adds and not self.eps.requires_grad

    def forward(self, call: Call, routing: Routing) -> Tensor:
        scale_P1 = (1 + self.eps).index_select(0, routing.expert)
        if call.aggregate is None:  # each node is one of its own neighbors, of this weight
            loops_T = scale_P1.squeeze(1).index_select(0, routing.place)
            matrix = replace(self.matrix(call), loops=loops_T)
            rows_PI = matrix.times(call.x_src, routing.token)
        else:
            root_PI = dispatch(call.x_dst, routing)
            rows_PI = dispatch(call.aggregate, routing).addcmul_(root_PI, scale_P1)
        return combine(run_network(self.nn, rows_PI, routing.offsets), routing)

    def on_all(self, call: Call) -> Tensor:
        if must_be_called(self):
            return super().on_all(call)
        assert call.aggregate is not None  # these experts share one
        rows_TI = call.aggregate.addcmul(call.x_dst, 1 + self.eps)
        return run_network(self.nn, rows_TI, all_of(call.x_dst))


class GINEExperts(GINExperts):
    """GINE: x' = nn_e((1 + eps_e) x_i + sum_j relu(x_j + e_ji)).

    Only without a transform of the edge features, which would differ from expert to expert.
    """

    @staticmethod
    def accepts(conv: Conv) -> bool:
        return conv.lin is None and GINExperts.accepts(conv)

    def matrix_maker(self, conv: Conv) -> MakeMatrix | None:
        return None  # messages depend on the edges' features
