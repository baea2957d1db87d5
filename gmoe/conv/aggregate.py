"""Experts that share one aggregation: GCN, SAGE, GraphConv, GIN, GINE, filters, and MLPs that look at no neighbor.

Shapes: T tokens (destinations), D, I, O widths, E experts, P pairs.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric import nn as pyg
from torch_geometric.explain.algorithm.utils import set_masks
from torch_geometric.nn import MessagePassing
from torch_geometric.nn.dense.linear import Linear
from torch_geometric.nn.inits import zeros
from torch_geometric.typing import Adj

from gmoe._checks import check_choice, check_counts, must_be_called
from gmoe.conv.base import StackedExperts, all_of, is_plain, stacked
from gmoe.conv.graph import Graph, Matrix
from gmoe.dispatch import Backend, combine, dispatch, routed_linear
from gmoe.experts import LinearExperts
from gmoe.routing import Routing

FilterName: TypeAlias = Literal["identity", "low_pass", "high_pass"]

MLPS = (
    [pyg.MLP, nn.ReLU, nn.ModuleList, Linear, Linear, nn.ModuleList, nn.Identity],
    [nn.Sequential, nn.Linear, nn.ReLU, nn.Linear],
)
"""The modules of the networks that GIN's experts stack: PyG's MLP without norm, or layers in a row."""


class AggregateOnce(StackedExperts):
    """Convs that aggregate without parameters, or linearly, and transform rows: A x W_e = (A x) W_e.

    Sums and means of the sources' rows are sparse products of the :class:`Graph`. Any other aggregation is PyG's own:
    the conv itself with its transform taken out, called as ``conv((x, None), edge_index, size=...)`` with the edge
    arguments it takes. A subclass whose messages are more than rows times a weight sets ``matrix`` to
    ``None`` in :meth:`strip`: the product would pass over them.
    """

    weighted_by: Literal["weight", "values"] = "values"
    """The factors of messages, see :meth:`Graph.summing`."""

    matrix: Callable[..., Matrix] | None
    """From a graph and a dtype to the A of A x; ``None`` where the aggregation is no such product."""

    @staticmethod
    def accepts(conv: Any) -> bool:
        return next(conv.aggr_module.parameters(), None) is None  # what is learned differs from expert to expert

    def build(self, convs: Sequence[Any], backend: Backend) -> None:
        self.prototype = conv = copy.deepcopy(convs[0])
        conv.flow = "source_to_target"  # as edges run inside a graph
        linear = conv.aggr in ("add", "sum", "mean")
        self.matrix = partial(Graph.summing, by=self.weighted_by, mean=conv.aggr == "mean") if linear else None
        self.strip(conv)

    @abstractmethod
    def strip(self, conv: Any) -> None:
        """Take the transform out of a conv, and leave its aggregation."""

    def aggregate(self, graph: Graph, x_src: Tensor) -> Tensor | None:
        if self.matrix is None:
            return self._by_pyg(graph, x_src)
        return graph.product(self.matrix(graph, dtype=x_src.dtype), x_src)

    def _by_pyg(self, graph: Graph, x_src: Tensor) -> Tensor:
        """(T, D) what the stripped conv itself aggregates."""
        conv = self.prototype
        if graph.mask is not None:
            conv = copy.copy(conv)  # another thread may be running it
            set_masks(conv, graph.mask, graph.edge_index, apply_sigmoid=False)
        adj, size = graph.adj if graph.is_sparse else graph.edge_index, (graph.num_src, graph.num_rows)
        # sparse products have no kernels for half precision
        x = x_src.to(torch.promote_types(x_src.dtype, torch.float32)) if graph.is_sparse else x_src
        with torch.autocast(x_src.device.type, enabled=not graph.is_sparse and torch.is_autocast_enabled()):
            out = conv((x, None), adj, **graph.args_for(conv), size=size)
        return out[: graph.num_dst].to(x_src.dtype)


class LinearAggregation(AggregateOnce):
    """One linear map per expert of the aggregate and, if the conv uses them, the root's features."""

    linears: tuple[str, ...]
    root: bool = True
    normalize: bool = False

    def transforms(self, conv: Any) -> list[Any]:
        """The linear layers of a conv: of the aggregate, and of the root."""
        return [getattr(conv, name) for name in self.linears[: 1 + self.root]]

    def bias(self, conv: Any) -> Tensor | None:
        """The bias of a conv, or of the linear layer of its aggregate."""
        return getattr(conv, "bias", getattr(conv, self.linears[0]).bias)

    def build(self, convs: Sequence[Any], backend: Backend) -> None:
        super().build(convs, backend)
        weights = [linear.weight for linear in self.transforms(convs[0])]
        out_channels, self.aggregate_width = weights[0].shape
        width, bias = sum(weight.size(1) for weight in weights), self.bias(convs[0]) is not None
        self.linear = LinearExperts(width, out_channels, len(convs), bias=bias, backend=backend)

    def parts(self, conv: Any) -> list[tuple[Any, Any]]:
        weights = [linear.weight for linear in self.transforms(conv)]
        stacked = self.linear.weight.transpose(1, 2).split([weight.size(1) for weight in weights], dim=2)
        biases = [] if self.linear.bias is None else [(self.linear.bias, self.bias(conv))]
        return [*zip(stacked, weights, strict=True), *biases]

    def forward(self, graph: Graph, x_src: Tensor, x_dst: Tensor, h: Any, routing: Routing) -> Tensor:
        parts, linear = [h, x_dst][: 1 + self.root], self.linear
        if not self.normalize and is_plain(linear):
            return routed_linear(parts, linear.weight, linear.bias, routing, linear.backend)
        y_PO = linear(dispatch(torch.cat(parts, dim=-1), routing), routing.offsets)
        return combine(F.normalize(y_PO, p=2.0, dim=-1) if self.normalize else y_PO, routing)

    def on_all(self, graph: Graph, x_src: Tensor, x_dst: Tensor, h: Any) -> Tensor:
        linear, dtype = self.linear, self.linear.weight.dtype
        if self.normalize or must_be_called(self) or not is_plain(linear):
            return super().on_all(graph, x_src, x_dst, h)
        weights = linear.weight[0].T.tensor_split([h.size(1)], dim=1)
        out = F.linear(h.to(dtype), weights[0], None if linear.bias is None else linear.bias[0])
        return out.add_(F.linear(x_dst.to(dtype), weights[1])) if self.root else out


class GCNExperts(LinearAggregation):
    """GCN: x' = (D^-1/2 (A + I) D^-1/2 x) W_e + b_e."""

    linears = ("lin",)
    root = False
    weighted_by = "weight"
    takes_two_sets = False

    @staticmethod
    def accepts(conv: Any) -> bool:
        return conv.aggr in ("add", "sum")  # transforms before it aggregates, so that has to be linear

    def strip(self, conv: Any) -> None:
        if getattr(conv, "normalize", False):  # not a FilterConv, which holds its own product
            self.matrix = partial(Graph.normalized, improved=conv.improved, loops=conv.add_self_loops)
        conv.lin = nn.Identity()
        conv.bias = None


class SAGEExperts(LinearAggregation):
    """SAGE: x' = aggr_j(x_j) W_e + x_i V_e + b_e, optionally normalized."""

    linears = ("lin_l", "lin_r")

    @staticmethod
    def accepts(conv: Any) -> bool:
        return not conv.project and AggregateOnce.accepts(conv)

    def strip(self, conv: Any) -> None:
        self.root, self.normalize = conv.root_weight, conv.normalize
        conv.lin_l = nn.Identity()
        conv.root_weight = conv.normalize = False
        if self.root:
            del conv.lin_r


class GraphConvExperts(LinearAggregation):
    """GraphConv: x' = aggr_j(w_ji x_j) W_e + x_i V_e + b_e."""

    linears = ("lin_rel", "lin_root")
    weighted_by = "weight"

    def strip(self, conv: Any) -> None:
        conv.lin_rel = nn.Identity()
        del conv.lin_root


class GINExperts(AggregateOnce):
    """GIN: x' = nn_e((1 + eps_e) x_i + aggr_j(x_j)), for networks of two linear layers with a ReLU between."""

    eps_E1: Tensor

    @staticmethod
    def accepts(conv: Any) -> bool:
        # those of the conv, its aggregation, and its network
        types, dropout = [type(part) for part in conv.modules()], getattr(conv.nn, "dropout", [])
        return AggregateOnce.accepts(conv) and types[2:] in MLPS and not any(dropout)

    def strip(self, conv: Any) -> None:
        conv.nn = nn.Identity()
        del conv.eps
        conv.eps = 0.0

    def build(self, convs: Sequence[Any], backend: Backend) -> None:
        super().build(convs, backend)
        self.up, self.down = (stacked(linear, len(convs), backend) for linear in _linears(convs[0]))
        kind = nn.Parameter if isinstance(convs[0].eps, nn.Parameter) else nn.Buffer
        self.eps_E1 = kind(torch.stack([conv.eps.detach().view(1) for conv in convs]))

    def parts(self, conv: Any) -> list[tuple[Any, Any]]:
        return [(self.eps_E1, conv.eps), *zip((self.up, self.down), _linears(conv), strict=True)]

    def forward(self, graph: Graph, x_src: Tensor, x_dst: Tensor, h: Any, routing: Routing) -> Tensor:
        scale_P1 = (1 + self.eps_E1).index_select(0, routing.expert)
        rows_PI = dispatch(h, routing).addcmul_(dispatch(x_dst, routing), scale_P1)
        return combine(self._network(rows_PI, routing.offsets), routing)

    def on_all(self, graph: Graph, x_src: Tensor, x_dst: Tensor, h: Any) -> Tensor:
        if must_be_called(self):
            return super().on_all(graph, x_src, x_dst, h)
        return self._network(h.addcmul(x_dst, 1 + self.eps_E1), all_of(x_dst))

    def _network(self, x_PI: Tensor, offsets_E: Tensor) -> Tensor:
        return self.down(self.up(x_PI, offsets_E).relu(), offsets_E)


def _linears(conv: Any) -> list[Any]:
    """The linear layers of a GIN's network."""
    return [part for part in conv.nn.modules() if isinstance(part, nn.Linear | Linear)]


class GINEExperts(GINExperts):
    """GINE without a transform of edge features: x' = nn_e((1 + eps_e) x_i + sum_j relu(x_j + e_ji))."""

    @staticmethod
    def accepts(conv: Any) -> bool:
        return conv.lin is None and GINExperts.accepts(conv)

    def strip(self, conv: Any) -> None:
        super().strip(conv)
        self.matrix = None


class FilterExperts(GCNExperts):
    """E FilterConvs, whose filters may differ: every power of the adjacency is applied once, whoever looks at it."""

    def build(self, convs: Sequence[Any], backend: Backend) -> None:
        super().build(convs, backend)
        self.filters = [(conv.filter, conv.hops) for conv in convs]
        self.hops = max((hops for name, hops in self.filters if name != "identity"), default=0)
        self.aggregate_width = max(self.hops, 1) * self.linear.in_features

    @property
    def too_far(self) -> list[MessagePassing]:
        return [self.prototype] if self.hops > 1 else []

    def aggregate(self, graph: Graph, x_src: Tensor) -> Tensor | None:
        powers = [x_src]
        for _ in range(self.hops):
            powers.append(self.prototype.hop(powers[-1], graph))
        return torch.cat(powers[1:], dim=-1) if self.hops else None

    def forward(self, graph: Graph, x_src: Tensor, x_dst: Tensor, h: Any, routing: Routing) -> Tensor:
        kinds = sorted(set(self.filters))
        after = [self._after(kind, x_dst, h) for kind in kinds]
        if len(kinds) == 1:
            return combine(self.linear(dispatch(after[0], routing), routing.offsets), routing)
        # A token after one filter is a row of its own: which of them experts take depends on the data.
        kind_E = routing.token.new_tensor([kinds.index(kind) for kind in self.filters])
        row_P = routing.token * len(kinds) + kind_E.index_select(0, routing.expert)
        rows_PI = torch.cat(after, dim=1).view(-1, x_dst.size(1)).index_select(0, row_P)
        return combine(self.linear(rows_PI, routing.offsets), routing)

    def _after(self, kind: tuple[FilterName, int], x_dst: Tensor, h: Any) -> Tensor:
        """(T, I) the tokens after a filter, given what :meth:`aggregate` gave."""
        name, hops = kind
        if name == "identity":
            return x_dst
        low = h.split(x_dst.size(1), dim=1)[hops - 1]
        return low if name == "low_pass" else x_dst - low

    on_all = StackedExperts.on_all  # not the linear map of h


class MLPConvExperts(StackedExperts):
    """E MLPConvs as stacked linear layers."""

    def build(self, convs: Sequence[Any], backend: Backend) -> None:
        self.prototype = MLPConv(1, 1)
        self.prototype.up = self.prototype.down = nn.Identity()
        self.up, self.down = (stacked(linear, len(convs), backend) for linear in (convs[0].up, convs[0].down))

    def parts(self, conv: Any) -> list[tuple[Any, Any]]:
        return [(self.up, conv.up), (self.down, conv.down)]

    def forward(self, graph: Graph, x_src: Tensor, x_dst: Tensor, h: Any, routing: Routing) -> Tensor:
        hidden_PH = self.up(dispatch(x_dst, routing), routing.offsets).relu()
        return combine(self.down(hidden_PH, routing.offsets), routing)


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
        check_choice("filter", filter, FilterName)
        check_counts(hops=hops)
        if filter == "identity" and hops > 1:
            raise ValueError(f"hops: got {hops} with filter='identity', expected 1")
        super().__init__(aggr="add")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.filter, self.hops, self.add_self_loops = filter, hops, add_self_loops
        self.lin = Linear(in_channels, out_channels, bias=False, weight_initializer="glorot")
        self.bias = nn.Parameter(self.lin.weight.new_empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.lin.reset_parameters()
        zeros(self.bias)

    def forward(self, x: Tensor, edge_index: Adj | Graph, edge_weight: Tensor | None = None) -> Tensor:
        if self.filter != "identity":
            graph, low = edge_index if isinstance(edge_index, Graph) else Graph(edge_index, len(x)), x
            graph = graph.fitting((len(x), len(x)), self.flow, edge_weight)
            graph = graph.explained(self) if self.explain else graph
            for _ in range(self.hops):
                low = self.hop(low, graph)
            x = low if self.filter == "low_pass" else x[: len(low)] - low
        out = self.lin(x)
        return out if self.bias is None else out + self.bias

    def hop(self, x: Tensor, graph: Graph) -> Tensor:
        """(N, D) one product with the normalized adjacency."""
        return graph.product(graph.normalized(improved=False, loops=self.add_self_loops, dtype=x.dtype), x)

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
        return self.down(self.up(x_dst).relu())
