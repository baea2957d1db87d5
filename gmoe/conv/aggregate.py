"""Experts that share what they aggregate. Shapes: T tokens, D, I, O widths, E experts, P pairs."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import MessagePassing

from gmoe.conv.experts import StackedExperts, tokens_of, without_dropout
from gmoe.conv.graph import Graph, aggregated, sized
from gmoe.conv.pieces import Pieces
from gmoe.dispatch import Backend, combine, dispatch, grouped_linear
from gmoe.experts import LinearExperts
from gmoe.routed_linear import routed_linear
from gmoe.routing import Routing


class AggregateOnce(StackedExperts):
    """Convs that aggregate without parameters, or linearly, and transform rows: A x W_e = (A x) W_e.

    The aggregation is PyG's own: the class itself with its transform taken out, so that every option of it (edge
    weights, normalisation, caching, fused kernels) holds.
    """

    def _build(self, template: Any, backend: Backend) -> None:
        self.prototype = self._without_transform(template)

    @abstractmethod
    def _without_transform(self, conv: Any) -> MessagePassing: ...

    def aggregate(self, x_src: Tensor, graph: Graph) -> Tensor:
        size = (graph.num_src, graph.num_dst)
        adj = sized(graph.adj, size)
        return aggregated(adj, x_src, lambda x: self.prototype((x, None), adj, **graph.edge_args, size=size))

    def aggregate_by_pieces(self, x: Tensor, pieces: Pieces) -> Tensor:
        with pieces.of(self.prototype) as own:
            return own.map(lambda x, piece: self.aggregate(x, piece.graph.with_args_of([self.prototype])), x)

    def by_pieces(self, x: Tensor, aggregate: Tensor | None, pieces: Pieces, routing: Routing) -> Tensor:
        if aggregate is None:
            aggregate = self.aggregate_by_pieces(x, pieces)
        return self._rows_by_pieces(x, aggregate, pieces, routing)


class LinearAggregation(AggregateOnce):
    """One linear map an expert of what was aggregated, beside the root's features where the conv looks at them.

    Where all experts' outputs side by side are narrower than the input, and the aggregation is a sum or a mean, the
    order is turned round: A (x [W_1 ... W_E]), of which each row keeps the columns of its experts.
    """

    linears: tuple[str, ...]
    linear: LinearExperts
    root: bool = True
    normalize: bool = False

    def _parts(self, conv: Any) -> list[Any]:
        """The linear layers of a conv: of the aggregate, and of the root."""
        return [getattr(conv, name) for name in self.linears[: 1 + self.root]]

    def _bias(self, conv: Any) -> Tensor | None:
        bias: Tensor | None = self._parts(conv)[0].bias
        return bias

    def _build(self, template: Any, backend: Backend) -> None:
        super()._build(template, backend)
        parts = self._parts(template)
        width = sum(int(part.weight.size(1)) for part in parts)
        out_channels = int(parts[0].weight.size(0))
        self.linear = LinearExperts(
            width, out_channels, self.num_experts, bias=self._bias(template) is not None, backend=backend
        )
        self.aggregate_width = int(parts[0].weight.size(1))
        narrower = self.num_experts * out_channels < self.aggregate_width
        self.transforms_first = narrower and template.aggr in ("add", "sum", "mean")

    @torch.no_grad()
    def _fill(self, convs: list[Any]) -> None:
        for expert, conv in enumerate(convs):
            self.linear.weight[expert] = torch.cat([part.weight for part in self._parts(conv)], dim=1).T
            bias = self._bias(conv)
            if self.linear.bias is not None and bias is not None:
                self.linear.bias[expert] = bias

    @torch.no_grad()
    def _unfill(self, conv: Any, index: int) -> None:
        parts = self._parts(conv)
        widths = [part.weight.size(1) for part in parts]
        for part, weight in zip(parts, self.linear.weight[index].T.split(widths, dim=1), strict=True):
            part.weight.copy_(weight)
        bias = self._bias(conv)
        if self.linear.bias is not None and bias is not None:
            bias.copy_(self.linear.bias[index])

    def forward(self, x_src: Tensor, x_dst: Tensor, aggregate: Tensor | None, graph: Graph, routing: Routing) -> Tensor:
        if aggregate is None:
            return self._transform_first(x_src, x_dst, graph, routing)
        parts = [aggregate, x_dst] if self.root else [aggregate]
        if self.normalize:
            return dispatch(torch.cat(parts, dim=-1), routing, self._transform)
        linear = self.linear
        return routed_linear(parts, linear.weight, linear.bias, routing, linear.backend)

    def _transform_first(self, x_src: Tensor, x_dst: Tensor, graph: Graph, routing: Routing) -> Tensor:
        weight_EIO = self.linear.weight
        weight_IEO = weight_EIO[:, : self.aggregate_width].transpose(0, 1).flatten(1)
        h_TEO = self.aggregate(x_src @ weight_IEO, graph)
        pair_P = routing.token * self.num_experts + routing.expert
        y_PO = h_TEO.view(-1, weight_EIO.size(2)).index_select(0, pair_P)
        if self.root:
            root_EIO = weight_EIO[:, self.aggregate_width :]
            x_PI = x_dst.index_select(0, routing.token)
            y_PO = y_PO + grouped_linear(x_PI, root_EIO, None, routing.offsets, self.linear.backend)
        if self.linear.bias is not None:
            y_PO = y_PO + self.linear.bias.to(y_PO.dtype).index_select(0, routing.expert)
        return combine(self._finish(y_PO), routing)

    def _finish(self, y_PO: Tensor) -> Tensor:
        """What the conv does to its output."""
        return F.normalize(y_PO, p=2.0, dim=-1) if self.normalize else y_PO

    def _transform(self, rows_PI: Tensor, offsets_E: Tensor) -> Tensor:
        return self._finish(self.linear(rows_PI, offsets_E))


class GCNExperts(LinearAggregation):
    """GCN: x' = (D^-1/2 (A + I) D^-1/2 x) W_e + b_e."""

    linears = ("lin",)
    root = False

    @staticmethod
    def accepts(conv: Any) -> bool:
        return conv.aggr in ("add", "sum", "mean")  # transforms before it aggregates, so that has to be linear

    def _without_transform(self, conv: Any) -> MessagePassing:
        conv = copy.deepcopy(conv)
        conv.lin = nn.Identity()
        conv.bias = None
        return conv

    def _bias(self, conv: Any) -> Tensor | None:
        bias: Tensor | None = conv.bias
        return bias

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.prototype._cached_edge_index = self.prototype._cached_adj_t = None  # as PyG's does

    def aggregate(self, x_src: Tensor, graph: Graph) -> Tensor:
        if graph.bipartite:
            raise ValueError(
                "x: got a tuple of source and destination nodes, expected one tensor, since GCNConv takes no bipartite "
                "input (SAGEConv and GraphConv do)"
            )
        return aggregated(graph.adj, x_src, lambda x: self.prototype(x, graph.adj, **graph.edge_args))


class SAGEExperts(LinearAggregation):
    """SAGE: x' = aggr_j(x_j) W_e + x_i V_e + b_e, optionally normalised."""

    linears = ("lin_l", "lin_r")

    @staticmethod
    def accepts(conv: Any) -> bool:
        return not conv.project and _has_no_parameters(conv.aggr_module)

    def _without_transform(self, conv: Any) -> MessagePassing:
        conv = copy.deepcopy(conv)
        self.root, self.normalize = conv.root_weight, conv.normalize
        conv.lin_l = nn.Identity()
        conv.root_weight, conv.normalize = False, False
        if self.root:
            del conv.lin_r
        return conv


class GraphConvExperts(LinearAggregation):
    """GraphConv: x' = aggr_j(w_ji x_j) W_e + x_i V_e + b_e."""

    linears = ("lin_rel", "lin_root")

    @staticmethod
    def accepts(conv: Any) -> bool:
        return _has_no_parameters(conv.aggr_module)

    def _without_transform(self, conv: Any) -> MessagePassing:
        conv = copy.deepcopy(conv)
        conv.lin_rel = nn.Identity()
        del conv.lin_root
        return conv


class GINExperts(AggregateOnce):
    """GIN: x' = nn_e((1 + eps_e) x_i + aggr_j(x_j)), for networks that treat each row by itself."""

    eps_E: Tensor

    @staticmethod
    def accepts(conv: Any) -> bool:
        return _has_no_parameters(conv.aggr_module) and isinstance(conv.nn, nn.Module) and _row_wise(conv.nn)

    def _without_transform(self, conv: Any) -> MessagePassing:
        conv = copy.deepcopy(conv)
        conv.nn = nn.Identity()
        del conv.eps
        conv.register_buffer("eps", torch.zeros(1), persistent=False)
        return conv

    def _build(self, template: Any, backend: Backend) -> None:
        super()._build(template, backend)
        self.nns = nn.ModuleList(self.make(expert).nn for expert in range(self.num_experts))
        eps = template.eps.detach().expand(self.num_experts).clone()
        if isinstance(template.eps, nn.Parameter):
            self.eps_E = nn.Parameter(eps)
        else:
            self.register_buffer("eps_E", eps)

    @torch.no_grad()
    def _fill(self, convs: list[Any]) -> None:
        for expert, conv in enumerate(convs):
            self.nns[expert].load_state_dict(conv.nn.state_dict())
            self.eps_E[expert] = conv.eps

    @torch.no_grad()
    def _unfill(self, conv: Any, index: int) -> None:
        conv.nn.load_state_dict(self.nns[index].state_dict())
        conv.eps.copy_(self.eps_E[index])

    def forward(self, x_src: Tensor, x_dst: Tensor, aggregate: Tensor | None, graph: Graph, routing: Routing) -> Tensor:
        assert aggregate is not None
        outs = []
        for index, token in enumerate(tokens_of(routing)):
            rows = aggregate.index_select(0, token) + (1 + self.eps_E[index]) * x_dst.index_select(0, token)
            outs.append(self.nns[index](rows))
        return combine(torch.cat(outs), routing)


def _has_no_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is None


@torch.no_grad()
def _row_wise(network: nn.Module) -> bool:
    """Whether each row's output depends on that row alone, which batch norm in training breaks."""
    first = next(network.parameters(), None)
    if first is None:
        return False
    x = torch.randn(7, first.size(-1), dtype=torch.float64, device=first.device)
    probe = without_dropout(network)
    return torch.allclose(probe(x)[:3], probe(x[:3]), atol=1e-10)
