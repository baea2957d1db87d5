"""Experts that share one aggregation: GCN, SAGE, GraphConv, GIN, filters, and MLPs that look at no neighbor.

Shapes: T tokens (destinations), D, I, O widths, E experts, P pairs.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric import EdgeIndex
from torch_geometric.explain.algorithm.utils import set_masks
from torch_geometric.nn import MessagePassing
from torch_geometric.nn.conv.gcn_conv import gcn_norm
from torch_geometric.nn.dense.linear import Linear
from torch_geometric.nn.inits import zeros
from torch_geometric.typing import Adj

from gmoe._checks import check_choice, check_count
from gmoe.conv.base import (
    NodeChunks,
    StackedExperts,
    hooks_of,
    powers,
    probe_copy,
    tokens_of,
)
from gmoe.conv.graph import WEIGHTS_TWICE, Graph, Matrix, weighted_sum
from gmoe.dispatch import Backend, combine, dispatch, routed_linear
from gmoe.experts import LinearExperts, MLPExperts
from gmoe.routing import Routing

FilterName: TypeAlias = Literal["identity", "low_pass", "high_pass"]

SUMS = ("add", "sum", "mean")
"""Aggregations that are sparse products."""


class AggregateOnce(StackedExperts):
    """Convs that aggregate without parameters, or linearly, and transform rows: A x W_e = (A x) W_e.

    Sums and means are sparse products of the :class:`Graph`. Any other aggregation, and one that an explainer looks
    into, is PyG's own: the conv itself with its transform taken out.
    """

    weighted_by: Literal["weight", "values"] = "values"
    """What this conv multiplies messages by: of one without edge weights, the values of a sparse matrix."""

    matrix: Callable[..., Matrix] | None
    """From a graph and a dtype to the A of A x; ``None`` where the aggregation is no such product."""

    def _build(self, template: Any, backend: Backend) -> None:
        mean = template.aggr == "mean"
        linear = isinstance(template.aggr, str) and template.aggr in SUMS
        self.matrix = partial(Graph.weighted, by=self.weighted_by, mean=mean) if linear else None
        self.prototype = self._without_transform(copy.deepcopy(template))
        for name in ("cached", "_cached_edge_index", "_cached_adj_t"):
            if hasattr(self.prototype, name):  # one graph for all time: here a Graph holds what is constant
                setattr(self.prototype, name, False if name == "cached" else None)

    @abstractmethod
    def _without_transform(self, conv: Any) -> MessagePassing: ...

    def aggregate(self, graph: Graph, x_src: Tensor, x_dst: Tensor) -> Any:
        if self.matrix is None or graph.mask is not None:
            return self._by_pyg(graph, x_src)
        matrix = self.matrix(graph, dtype=torch.promote_types(x_src.dtype, torch.float32))
        if graph.constant is False and not matrix.knows(x_src):
            return weighted_sum(matrix.weight[:, None], x_src[:, None], matrix.edges).squeeze(1).to(x_src.dtype)
        return matrix.kept(x_src).to(x_src.dtype)

    def _by_pyg(self, graph: Graph, x_src: Tensor) -> Tensor:
        conv, adj = self._conv_on(graph)
        size = (graph.num_src, graph.num_dst)
        if isinstance(adj, EdgeIndex) and None in adj.sparse_size():  # of which alone PyG takes the number of nodes
            adj = EdgeIndex(adj.as_tensor(), sparse_size=size, sort_order=adj.sort_order)
        half = x_src.dtype in (torch.bfloat16, torch.float16) and graph.is_sparse  # which has no kernels for that
        with torch.autocast(x_src.device.type, enabled=not graph.is_sparse and torch.is_autocast_enabled()):
            x = x_src.float() if half else x_src
            out: Tensor = conv((x, None), adj, **graph.args_for(conv), size=size)
        return out.to(x_src.dtype)

    def _conv_on(self, graph: Graph) -> tuple[Any, Any]:
        """The prototype under the graph's mask, and its edges; a copy, since another thread may be running it."""
        conv, adj = self.prototype, graph.adj
        if conv.flow == "target_to_source" or graph.mask is not None:
            conv = copy.copy(conv)
        if conv.flow == "target_to_source":  # whose features would have to be a tuple that PyG does not take
            conv.flow, adj = "source_to_target", graph.edge_index
        if graph.mask is not None:
            set_masks(conv, graph.mask, graph.edge_index, apply_sigmoid=False)
        return conv, adj

    def aggregate_chunked(self, x: Tensor, chunks: NodeChunks) -> Tensor:
        return chunks.map(lambda x, part, _: self.aggregate(part, x, x), x)


class LinearAggregation(AggregateOnce):
    """One linear map per expert of the aggregate and, if the conv uses them, the root's features."""

    linears: tuple[str, ...]
    root: bool = True
    normalize: bool = False

    def _linears(self, conv: Any) -> list[Any]:
        """The linear layers of a conv: of the aggregate, and of the root."""
        return [getattr(conv, name) for name in self.linears[: 1 + self.root]]

    def _bias(self, conv: Any) -> Any:
        return self._linears(conv)[0].bias

    def _build(self, template: Any, backend: Backend) -> None:
        super()._build(template, backend)
        linears = self._linears(template)
        out_channels, self.aggregate_width = (int(n) for n in linears[0].weight.shape)
        width = sum(int(linear.weight.size(1)) for linear in linears)
        bias = self._bias(template) is not None
        self.linear = LinearExperts(width, out_channels, self.num_experts, bias=bias, backend=backend)

    def _parts(self, conv: Any) -> list[tuple[Any, Any]]:
        own = [linear.weight for linear in self._linears(conv)]
        stacked = self.linear.weight.transpose(1, 2).split([weight.size(1) for weight in own], dim=2)
        weights = zip(stacked, own, strict=True)
        return [*weights] if self.linear.bias is None else [*weights, (self.linear.bias, self._bias(conv))]

    def forward(self, graph: Graph, x_src: Tensor, x_dst: Tensor, h: Any, routing: Routing) -> Tensor:
        linear = self.linear
        parts = [h, x_dst] if self.root else [h]
        plain = type(linear) is LinearExperts and not any(hooks_of(linear))  # else what a user put there runs
        if self.normalize or not plain:
            y_PO = linear(dispatch(torch.cat(parts, dim=-1), routing), routing.offsets)
            return combine(F.normalize(y_PO, p=2.0, dim=-1) if self.normalize else y_PO, routing)
        return routed_linear(parts, linear.weight, linear.bias, routing, linear.backend)


class GCNExperts(LinearAggregation):
    """GCN: x' = (D^-1/2 (A + I) D^-1/2 x) W_e + b_e."""

    linears = ("lin",)
    root = False
    weighted_by = "weight"
    takes_two_sets = False

    @staticmethod
    def accepts(conv: Any) -> bool:
        return conv.aggr in ("add", "sum")  # transforms before it aggregates, so that has to be linear

    def _without_transform(self, conv: Any) -> MessagePassing:
        if getattr(conv, "normalize", False):  # not a FilterConv, which holds its own product
            self.matrix = partial(Graph.normalized, improved=conv.improved, loops=conv.add_self_loops)
        conv.lin = nn.Identity()
        conv.bias = None
        return conv

    def _bias(self, conv: Any) -> Any:
        return conv.bias

    def _by_pyg(self, graph: Graph, x_src: Tensor) -> Tensor:
        if graph.is_sparse and graph.edge_weight is not None:
            raise ValueError(WEIGHTS_TWICE)
        conv, adj = self._conv_on(graph)
        out: Tensor = conv(x_src, adj, **graph.args_for(conv))
        return out


class SAGEExperts(LinearAggregation):
    """SAGE: x' = aggr_j(x_j) W_e + x_i V_e + b_e, optionally normalized."""

    linears = ("lin_l", "lin_r")

    @staticmethod
    def accepts(conv: Any) -> bool:
        return not conv.project and has_no_parameters(conv.aggr_module)

    def _without_transform(self, conv: Any) -> MessagePassing:
        self.root, self.normalize = conv.root_weight, conv.normalize
        conv.lin_l = nn.Identity()
        conv.root_weight, conv.normalize = False, False
        if self.root:
            del conv.lin_r
        return conv


class GraphConvExperts(LinearAggregation):
    """GraphConv: x' = aggr_j(w_ji x_j) W_e + x_i V_e + b_e."""

    linears = ("lin_rel", "lin_root")
    weighted_by = "weight"

    @staticmethod
    def accepts(conv: Any) -> bool:
        return has_no_parameters(conv.aggr_module)

    def _without_transform(self, conv: Any) -> MessagePassing:
        conv.lin_rel = nn.Identity()
        del conv.lin_root
        return conv


class GINExperts(AggregateOnce):
    """GIN: x' = nn_e((1 + eps_e) x_i + aggr_j(x_j)), for networks that treat each row by itself."""

    eps_E: Tensor

    @staticmethod
    def accepts(conv: Any) -> bool:
        return has_no_parameters(conv.aggr_module) and isinstance(conv.nn, nn.Module) and _row_wise(conv.nn)

    def _without_transform(self, conv: Any) -> MessagePassing:
        conv.nn = nn.Identity()
        del conv.eps
        conv.eps = 0.0
        return conv

    def _build(self, template: Any, backend: Backend) -> None:
        super()._build(template, backend)
        self.nns = nn.ModuleList(self.make(expert).nn for expert in range(self.num_experts))
        eps = template.eps.detach().expand(self.num_experts).clone()
        if isinstance(template.eps, nn.Parameter):
            self.eps_E = nn.Parameter(eps)
        else:
            self.register_buffer("eps_E", eps)

    def _parts(self, conv: Any) -> list[tuple[Any, Any]]:
        return [(self.eps_E, conv.eps)]

    @torch.no_grad()
    def fill(self, convs: list[Any]) -> None:
        super().fill(convs)
        for network, conv in zip(self.nns, convs, strict=True):
            network.load_state_dict(conv.nn.state_dict())

    def expert(self, index: int) -> MessagePassing:
        conv: Any = super().expert(index)
        conv.nn.load_state_dict(self.nns[index].state_dict())
        return conv

    def forward(self, graph: Graph, x_src: Tensor, x_dst: Tensor, h: Any, routing: Routing) -> Tensor:
        outs = []
        for index, token in enumerate(tokens_of(routing)):
            rows = h.index_select(0, token) + (1 + self.eps_E[index]) * x_dst.index_select(0, token)
            outs.append(self.nns[index](rows))
        return combine(torch.cat(outs), routing)


class FilterExperts(GCNExperts):
    """E FilterConvs, whose filters may differ: every power of the adjacency is applied once, whoever looks at it."""

    def fill(self, convs: list[Any]) -> None:
        self.filters = [(conv.filter, conv.hops) for conv in convs]
        self.hops = max((hops for name, hops in self.filters if name != "identity"), default=0)
        self.aggregate_width = max(self.hops, 1) * self.linear.in_features
        super().fill(convs)

    def aggregate(self, graph: Graph, x_src: Tensor, x_dst: Tensor) -> Any:
        conv, _ = self._conv_on(graph)
        return powers(lambda x: conv.hop(x, graph), x_src, self.hops) if self.hops else None

    def aggregate_chunked(self, x: Tensor, chunks: NodeChunks) -> Any:
        def hop(x: Tensor) -> Tensor:
            return chunks.map(lambda x, part, _: self.prototype.hop(x, part), x)

        return powers(hop, x, self.hops) if self.hops else None

    def forward(self, graph: Graph, x_src: Tensor, x_dst: Tensor, h: Any, routing: Routing) -> Tensor:
        after = [x_dst] if h is None else [x_dst, *h.split(x_dst.size(1), dim=1)]
        rows = []
        for (name, hops), token in zip(self.filters, tokens_of(routing), strict=True):
            row = after[0 if name == "identity" else hops].index_select(0, token)
            rows.append(x_dst.index_select(0, token) - row if name == "high_pass" else row)
        return combine(self.linear(torch.cat(rows), routing.offsets), routing)


class MLPConvExperts(StackedExperts):
    """E MLPConvs as stacked MLPs."""

    def _build(self, template: Any, backend: Backend) -> None:
        self.prototype = MLPConv(1, 1)
        self.prototype.up = self.prototype.down = nn.Identity()
        sizes = (template.up.in_features, template.hidden_channels, template.out_channels, self.num_experts)
        bias = template.up.bias is not None
        self.mlp = MLPExperts(*sizes, activation="relu", bias=bias, backend=backend)

    def _parts(self, conv: Any) -> list[tuple[Any, Any]]:
        return [(self.mlp.up, conv.up), (self.mlp.down, conv.down)]

    def forward(self, graph: Graph, x_src: Tensor, x_dst: Tensor, h: Any, routing: Routing) -> Tensor:
        out: Tensor = self.mlp(x_dst, routing)
        return out


def has_no_parameters(module: nn.Module) -> bool:
    """Whether there is nothing to learn in it."""
    return next(module.parameters(), None) is None


@torch.no_grad()
def _row_wise(network: nn.Module) -> bool:
    """Whether each row's output depends on that row alone, which batch norm in training breaks."""
    first = next(network.parameters(), None)
    if first is None:
        return False
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(7, first.size(-1), dtype=torch.float64, device="cpu", generator=generator)
    probe = probe_copy(network)
    return torch.allclose(probe(x)[:3], probe(x[:3]), atol=1e-10)


class FilterConv(MessagePassing):
    r"""Filter and transform: :math:`X' = F(\hat A) X W + b`, with
    :math:`\hat A = D^{-1/2} (A + I) D^{-1/2}`.

    ``"identity"``: :math:`F = I`, no look at the neighbors (the weak expert of Mowst, Zeng et al., 2024);
    ``"low_pass"``: :math:`F = \hat A^k` with k = ``hops`` (at k = 1 GCN; the hop experts of GMoE, Wang et al., 2023);
    ``"high_pass"``: :math:`F = I - \hat A^k` (Node-MoE, Han et al., 2024). Experts of a :class:`gmoe.MoEConv` that
    differ in their filter share the products with :math:`\hat A`.

    Args:
        in_channels: width of the nodes.
        out_channels: width of the output.
        filter: ``"identity"``, ``"low_pass"`` (default) or ``"high_pass"``.
        hops: k (default 1); 1 for the identity.
        add_self_loops: the ``+ I`` in the formula (default ``True``).
        bias: learn a bias (default ``True``).

    Shapes:
        - ``x``: (N, in_channels); ``edge_index`` as for ``GCNConv``, or a :class:`gmoe.Graph`; ``edge_weight``: (M,).
        - returns (N, out_channels).

    Raises:
        ValueError: an unknown filter; ``hops`` below 1, or above 1 for the identity.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        filter: FilterName = "low_pass",  # noqa: A002
        hops: int = 1,
        add_self_loops: bool = True,
        bias: bool = True,
    ) -> None:
        check_choice("filter", filter, get_args(FilterName))
        check_count("hops", hops)
        if filter == "identity" and hops > 1:
            raise ValueError(f"hops: got {hops} with filter='identity', expected 1")
        super().__init__(aggr="add")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.filter = filter
        self.hops = hops
        self.add_self_loops = add_self_loops
        self.lin = Linear(in_channels, out_channels, bias=False, weight_initializer="glorot")
        self.bias = nn.Parameter(self.lin.weight.new_empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.lin.reset_parameters()
        zeros(self.bias)

    def forward(self, x: Tensor, edge_index: Adj | Graph, edge_weight: Tensor | None = None) -> Tensor:
        if self.filter != "identity":
            graph = edge_index if isinstance(edge_index, Graph) else Graph(edge_index, x.size(0))
            graph = graph.with_args(edge_weight, None)
            low = x
            for _ in range(self.hops):
                low = self.hop(low, graph)
            x = low if self.filter == "low_pass" else x - low
        out: Tensor = self.lin(x)
        return out if self.bias is None else out + self.bias

    def hop(self, x: Tensor, graph: Graph) -> Tensor:
        """(N, D) one product with the normalized adjacency."""
        if self.explain:  # a mask of edges, which PyG applies to messages
            weight = graph.edge_weight if graph.matrix_values is None else graph.matrix_values
            ends, weight = gcn_norm(graph.edge_index, weight, x.size(0), False, self.add_self_loops, dtype=x.dtype)
            out: Tensor = self.propagate(ends, x=x, edge_weight=weight)
            return out
        exact = torch.promote_types(x.dtype, torch.float32)
        matrix = graph.normalized(False, self.add_self_loops, exact)
        return (matrix.times if graph.constant is False else matrix.kept)(x).to(x.dtype)

    def message(self, x_j: Tensor, edge_weight: Tensor) -> Tensor:
        return edge_weight[:, None] * x_j

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_channels}, {self.out_channels}, {self.filter!r}, hops={self.hops})"


class MLPConv(MessagePassing):
    r"""A two-layer MLP as a conv: :math:`x_i' = V \,\mathrm{relu}(W x_i + b) + c`.

    An expert for nodes that need no neighbors (the weak expert of Mowst, Zeng et al., 2024).

    Args:
        in_channels: width of the nodes; for a tuple, that of the destinations.
        out_channels: width of the output.
        hidden_channels: width of the hidden layer (default ``out_channels``).
        bias: learn biases (default ``True``).

    Shapes:
        - ``x``: (N, in_channels), or a tuple of source and destination nodes, of which the second counts.
        - returns (N, out_channels); ``edge_index`` is not looked at.
    """

    def __init__(
        self,
        in_channels: int | tuple[int, int],
        out_channels: int,
        hidden_channels: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.hidden_channels = out_channels if hidden_channels is None else hidden_channels
        width = in_channels if isinstance(in_channels, int) else in_channels[1]
        self.up = nn.Linear(width, self.hidden_channels, bias=bias)
        self.down = nn.Linear(self.hidden_channels, out_channels, bias=bias)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.up.reset_parameters()
        self.down.reset_parameters()

    def forward(self, x: Tensor | tuple[Tensor, Tensor], edge_index: Adj | None = None) -> Tensor:
        x_dst = x if isinstance(x, Tensor) else x[1]
        out: Tensor = self.down(self.up(x_dst).relu())
        return out
