"""Experts that share one aggregation: GCN, SAGE, GraphConv, GIN, GINE, filters, and MLPs.

Shapes: N nodes, T tokens (destinations), M edges, D in, O out width, A columns of the aggregate, I
columns of the rows that experts transform, H hidden width, E experts, P pairs.

A conv of these kinds sums over neighbors, then transforms the sum. The sum is the same for all
experts: a layer computes it once, and experts transform the rows of their tokens.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric import nn as pyg
from torch_geometric.explain.algorithm.utils import set_masks
from torch_geometric.nn import MessagePassing
from torch_geometric.nn.dense.linear import Linear

from gmoe._checks import must_be_called
from gmoe.conv.base import (
    Biases,
    Columns,
    Conv,
    Parts,
    StackedExperts,
    all_of,
    is_plain,
    stacked,
)
from gmoe.conv.call import Call
from gmoe.conv.convs import FilterName, MLPConv
from gmoe.conv.graph import Graph
from gmoe.conv.matrix import Matrix
from gmoe.experts import LinearExperts
from gmoe.products import Backend, combine, dispatch, routed_linear
from gmoe.routing import Routing

MakeMatrix: TypeAlias = Callable[..., Matrix]
"""Called as ``make_matrix(graph, dtype=...)``, gives the A of a sum A x over in-edges."""

MLPS = (
    [pyg.MLP, nn.ReLU, nn.ModuleList, Linear, Linear, nn.ModuleList, nn.Identity],
    [nn.Sequential, nn.Linear, nn.ReLU, nn.Linear],
)
"""The modules of the networks that GIN's experts stack: PyG's MLP without norm, or a Sequential."""


class AggregateOnce(StackedExperts):
    """Convs whose aggregation has no parameters, or is linear: A (x W_e) = (A x) W_e.

    Sums and means of the sources' rows are sparse products of the :class:`Graph`. Any other
    aggregation is PyG's own: the conv itself without its transform, called as ``conv((x, None),
    edge_index, size=...)`` with the edge arguments it takes. If the messages of a subclass are more
    than rows times a weight, its :meth:`matrix_maker` returns ``None``: a product would lose the
    rest.
    """

    weighted_by: Literal["weight", "values"] = "values"
    """The factors of messages, see :meth:`Graph.summing`."""

    @staticmethod
    def accepts(conv: Conv) -> bool:
        # What an aggregation learns differs from expert to expert.
        return next(conv.aggr_module.parameters(), None) is None

    def build(self, convs: Sequence[Conv], backend: Backend) -> None:
        self.make_matrix = self.matrix_maker(convs[0])
        self.prototype = copy.deepcopy(convs[0])
        self.prototype.flow = "source_to_target"  # as edges run inside a graph
        self.strip(self.prototype)

    def matrix_maker(self, conv: Conv) -> MakeMatrix | None:
        """How the matrix of a conv's aggregation is made; ``None`` if it is not a product."""
        if conv.aggr not in ("add", "sum", "mean"):
            return None
        return partial(Graph.summing, by=self.weighted_by, mean=conv.aggr == "mean")

    @abstractmethod
    def strip(self, conv: Conv) -> None:
        """Take the transform out of a conv, in place: what is left is the aggregation alone.

        ``build`` calls it once, on a copy of the first conv, which becomes the prototype.
        Afterwards the conv has no parameters. Unless :meth:`matrix_maker` makes a matrix of all
        convs of the class, ``conv((x, None), edge_index, size=...)`` with the edge arguments it
        takes then gives what :meth:`aggregate` gives: without the linear maps, the root's
        features, the bias and the norm of the output.
        """

    def aggregate(self, call: Call) -> Tensor | None:
        if self.make_matrix is None:
            return self._by_pyg(call)
        matrix = self.make_matrix(call.graph, dtype=call.x_src.dtype)
        return call.graph.product(matrix, call.x_src)

    def _by_pyg(self, call: Call) -> Tensor:
        """(T, A) what the stripped conv itself aggregates."""
        graph = call.graph
        x_src = call.x_src
        conv = self.prototype
        if graph.mask is not None:
            conv = copy.copy(conv)  # another thread may be running it
            set_masks(conv, graph.mask, graph.edge_index, apply_sigmoid=False)
        adj = graph.edge_index
        x = x_src
        if graph.is_sparse:
            adj = graph.adj
            # Sparse products have no kernels for half precision.
            x = x_src.to(torch.promote_types(x_src.dtype, torch.float32))
        autocasts = torch.is_autocast_enabled() and not graph.is_sparse
        with torch.autocast(x_src.device.type, enabled=autocasts):
            size = (graph.num_src, graph.num_rows)
            out = conv((x, None), adj, **graph.args_for(conv), size=size)
        return out[: graph.num_dst].to(x_src.dtype)


class LinearAggregation(AggregateOnce):
    """One linear map per expert of the aggregate and, if the conv uses them, the root's features.

    The two maps lie in one weight (E, I, O): the rows of the aggregate come first.
    """

    linears: tuple[str, ...]
    """The conv's linear layers: of the aggregate, and of the root if it has one."""

    def has_root(self, conv: Conv) -> bool:
        """True if the conv transforms the features of the node itself, too."""
        return True

    def has_output_norm(self, conv: Conv) -> bool:
        """True if the conv normalizes the rows of its output."""
        return False

    def transforms(self, conv: Conv) -> list[Linear]:
        """The linear layers of a conv: of the aggregate, and of the root."""
        names = self.linears if self.root else self.linears[:1]
        return [getattr(conv, name) for name in names]

    def bias(self, conv: Conv) -> Tensor | None:
        """The bias of a conv, or of the linear layer of its aggregate."""
        return getattr(conv, "bias", getattr(conv, self.linears[0]).bias)

    def build(self, convs: Sequence[Conv], backend: Backend) -> None:
        super().build(convs, backend)
        first = convs[0]
        self.root = self.has_root(first)
        self.normalize = self.has_output_norm(first)
        weights = [linear.weight for linear in self.transforms(first)]
        self.widths = [weight.size(1) for weight in weights]
        self.linear = LinearExperts(
            sum(self.widths),
            weights[0].size(0),
            num_experts=len(convs),
            bias=self.bias(first) is not None,
            backend=backend,
        )

    @property
    def aggregate_width(self) -> int:
        return self.widths[0]

    def parts(self, conv: Conv) -> Parts:
        parts: Parts = []
        end = 0
        for linear, width in zip(self.transforms(conv), self.widths, strict=True):
            start, end = end, end + width
            parts.append((Columns(self.linear, start, end), linear.weight))
        bias = self.bias(conv)
        if bias is not None:
            parts.append((Biases(self.linear), bias))
        return parts

    def forward(self, call: Call, routing: Routing) -> Tensor:
        assert call.aggregate is not None  # these experts share one
        inputs = [call.aggregate, call.x_dst] if self.root else [call.aggregate]
        linear = self.linear
        if not self.normalize and is_plain(linear):
            return routed_linear(inputs, linear.weight, linear.bias, routing, linear.backend)
        x_PI = dispatch(torch.cat(inputs, dim=-1), routing)
        y_PO = linear(x_PI, routing.offsets)
        if self.normalize:
            y_PO = F.normalize(y_PO, p=2.0, dim=-1)
        return combine(y_PO, routing)

    def on_all(self, call: Call) -> Tensor:
        linear = self.linear
        if self.normalize or must_be_called(self) or not is_plain(linear):
            return super().on_all(call)
        assert call.aggregate is not None  # these experts share one
        # The two maps one after the other, without a copy of their inputs side by side.
        dtype = linear.weight.dtype
        bias = None if linear.bias is None else linear.bias[0]
        of_aggregate, of_root = linear.weight[0].T.tensor_split([self.aggregate_width], dim=1)
        out = F.linear(call.aggregate.to(dtype), of_aggregate, bias)
        if self.root:
            out.add_(F.linear(call.x_dst.to(dtype), of_root))
        return out


class GCNExperts(LinearAggregation):
    """GCN: x' = (D^-1/2 (A + I) D^-1/2 x) W_e + b_e."""

    linears = ("lin",)
    weighted_by = "weight"

    @staticmethod
    def accepts(conv: Conv) -> bool:
        return conv.aggr in ("add", "sum")  # it transforms first: the aggregation must be linear

    def has_root(self, conv: Conv) -> bool:
        return False

    def matrix_maker(self, conv: Conv) -> MakeMatrix | None:
        if conv.normalize:
            return partial(Graph.normalized, improved=conv.improved, loops=conv.add_self_loops)
        return super().matrix_maker(conv)

    def strip(self, conv: Conv) -> None:
        conv.lin = nn.Identity()
        conv.bias = None


class SAGEExperts(LinearAggregation):
    """SAGE: x' = aggr_j(x_j) W_e + x_i V_e + b_e, optionally normalized."""

    linears = ("lin_l", "lin_r")

    @staticmethod
    def accepts(conv: Conv) -> bool:
        return not conv.project and AggregateOnce.accepts(conv)

    def has_root(self, conv: Conv) -> bool:
        return bool(conv.root_weight)

    def has_output_norm(self, conv: Conv) -> bool:
        return bool(conv.normalize)

    def strip(self, conv: Conv) -> None:
        conv.lin_l = nn.Identity()
        if conv.root_weight:
            del conv.lin_r
        conv.root_weight = False
        conv.normalize = False


class GraphConvExperts(LinearAggregation):
    """GraphConv: x' = aggr_j(w_ji x_j) W_e + x_i V_e + b_e."""

    linears = ("lin_rel", "lin_root")
    weighted_by = "weight"

    def strip(self, conv: Conv) -> None:
        conv.lin_rel = nn.Identity()
        del conv.lin_root


class FilterExperts(StackedExperts):
    """E FilterConvs, whose filters may differ: x' = F_e(A) x W_e + b_e.

    Every power of the adjacency is applied once, for all experts that use it. An expert's rows are
    what its filter makes of them, not the aggregate itself: so these experts stand beside
    :class:`LinearAggregation`, not under it.
    """

    may_differ = frozenset({"filter", "hops"})

    @staticmethod
    def accepts(conv: Conv) -> bool:
        return conv.aggr in ("add", "sum")

    def build(self, convs: Sequence[Conv], backend: Backend) -> None:
        first = convs[0]
        # Only its `hop` runs.
        self.prototype = copy.deepcopy(first)
        self.prototype.flow = "source_to_target"  # as edges run inside a graph
        self.prototype.lin = nn.Identity()
        self.prototype.bias = None
        self.filters = [(conv.filter, conv.hops) for conv in convs]
        self.hops = max((hops for name, hops in self.filters if name != "identity"), default=0)
        out_channels, in_channels = first.lin.weight.shape
        self.linear = LinearExperts(
            in_channels,
            out_channels,
            num_experts=len(convs),
            bias=first.bias is not None,
            backend=backend,
        )

    def parts(self, conv: Conv) -> Parts:
        parts: Parts = [(Columns(self.linear, 0, self.linear.in_features), conv.lin.weight)]
        if conv.bias is not None:
            parts.append((Biases(self.linear), conv.bias))
        return parts

    @property
    def too_far(self) -> list[MessagePassing]:
        return [self.prototype] if self.hops > 1 else []

    def aggregate(self, call: Call) -> Tensor | None:
        """(T, hops * D) the powers A x, A^2 x, ... side by side."""
        powers = [call.x_src]
        for _ in range(self.hops):
            powers.append(self.prototype.hop(powers[-1], call.graph))
        return torch.cat(powers[1:], dim=-1) if self.hops else None

    @property
    def aggregate_width(self) -> int | None:
        # Without powers, the router sees the mean over in-edges.
        return self.hops * self.linear.in_features if self.hops else None

    def forward(self, call: Call, routing: Routing) -> Tensor:
        # 1. All tokens after each filter that occurs.
        distinct = sorted(set(self.filters))
        filtered = [self._filtered(name, hops, call) for name, hops in distinct]
        # 2. The rows of each expert's tokens, after its filter.
        if len(distinct) == 1:
            rows_PI = dispatch(filtered[0], routing)
        else:
            # Filters of a token lie side by side, so that each is a row of its own. Not dispatched
            # filter by filter: which rows are needed depends on the data.
            # The experts' filters are written one by one: a list of numbers would be copied to the
            # device, for which the host waits.
            number_E = [distinct.index(pair) for pair in self.filters]
            filter_E = torch.cat([routing.token.new_full((1,), number) for number in number_E])
            filter_P = filter_E.index_select(0, routing.expert)
            row_P = routing.token * len(distinct) + filter_P
            filtered_RI = torch.cat(filtered, dim=1).view(-1, call.x_dst.size(1))
            rows_PI = filtered_RI.index_select(0, row_P)
        # 3. Its linear map.
        return combine(self.linear(rows_PI, routing.offsets), routing)

    def _filtered(self, name: FilterName, hops: int, call: Call) -> Tensor:
        """(T, I) the tokens after a filter."""
        x_TI = call.x_dst
        if name == "identity":
            return x_TI
        assert call.aggregate is not None  # all others need a power
        low_TI = call.aggregate.split(x_TI.size(1), dim=1)[hops - 1]
        return low_TI if name == "low_pass" else x_TI - low_TI


class GINExperts(AggregateOnce):
    """GIN: x' = nn_e((1 + eps_e) x_i + aggr_j(x_j)).

    The networks have two linear layers with a ReLU between them.
    """

    eps_E1: Tensor

    @staticmethod
    def accepts(conv: Conv) -> bool:
        # The first two modules are the conv and its aggregation; then comes its network.
        network = [type(part) for part in conv.modules()][2:]
        dropout = getattr(conv.nn, "dropout", [])
        return AggregateOnce.accepts(conv) and network in MLPS and not any(dropout)

    def strip(self, conv: Conv) -> None:
        conv.nn = nn.Identity()
        del conv.eps  # it scales the root, which is left out

    def build(self, convs: Sequence[Conv], backend: Backend) -> None:
        super().build(convs, backend)
        up, down = _linears(convs[0])
        self.up = stacked(up, len(convs), backend)
        self.down = stacked(down, len(convs), backend)
        eps_E1 = torch.stack([conv.eps.detach().view(1) for conv in convs])
        is_learned = isinstance(convs[0].eps, nn.Parameter)
        self.eps_E1 = nn.Parameter(eps_E1) if is_learned else nn.Buffer(eps_E1)

    def parts(self, conv: Conv) -> Parts:
        up, down = _linears(conv)
        return [(self.eps_E1, conv.eps), (self.up, up), (self.down, down)]

    def forward(self, call: Call, routing: Routing) -> Tensor:
        assert call.aggregate is not None  # these experts share one
        scale_P1 = (1 + self.eps_E1).index_select(0, routing.expert)
        aggregate_PI = dispatch(call.aggregate, routing)
        root_PI = dispatch(call.x_dst, routing)
        rows_PI = aggregate_PI.addcmul_(root_PI, scale_P1)
        return combine(self._network(rows_PI, routing.offsets), routing)

    def on_all(self, call: Call) -> Tensor:
        if must_be_called(self):
            return super().on_all(call)
        assert call.aggregate is not None  # these experts share one
        rows_TI = call.aggregate.addcmul(call.x_dst, 1 + self.eps_E1)
        return self._network(rows_TI, all_of(call.x_dst))

    def _network(self, x_PI: Tensor, offsets_E: Tensor) -> Tensor:
        """(P, O) each expert's network on its rows."""
        hidden_PH = self.up(x_PI, offsets_E).relu()
        return self.down(hidden_PH, offsets_E)


def _linears(conv: Conv) -> list[nn.Linear | Linear]:
    """The two linear layers of a GIN's network."""
    return [part for part in conv.nn.modules() if isinstance(part, nn.Linear | Linear)]


class GINEExperts(GINExperts):
    """GINE: x' = nn_e((1 + eps_e) x_i + sum_j relu(x_j + e_ji)).

    Only without a transform of the edge features, which would differ from expert to expert.
    """

    @staticmethod
    def accepts(conv: Conv) -> bool:
        return conv.lin is None and GINExperts.accepts(conv)

    def matrix_maker(self, conv: Conv) -> MakeMatrix | None:
        return None  # messages depend on the edges' features


class MLPConvExperts(StackedExperts):
    """E MLPConvs as stacked linear layers."""

    def build(self, convs: Sequence[Conv], backend: Backend) -> None:
        self.prototype = MLPConv(1, 1)
        self.prototype.up = nn.Identity()
        self.prototype.down = nn.Identity()
        self.up = stacked(convs[0].up, len(convs), backend)
        self.down = stacked(convs[0].down, len(convs), backend)

    def parts(self, conv: Conv) -> Parts:
        return [(self.up, conv.up), (self.down, conv.down)]

    def forward(self, call: Call, routing: Routing) -> Tensor:
        hidden_PH = self.up(dispatch(call.x_dst, routing), routing.offsets).relu()
        return combine(self.down(hidden_PH, routing.offsets), routing)
