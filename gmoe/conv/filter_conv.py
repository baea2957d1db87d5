"""FilterConv: a fixed spectral filter of the graph and a linear layer, one kind of expert."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor, nn
from torch_geometric.nn import MessagePassing
from torch_geometric.nn.conv.gcn_conv import gcn_norm
from torch_geometric.nn.dense.linear import Linear
from torch_geometric.nn.inits import zeros
from torch_geometric.typing import Adj
from torch_geometric.utils import spmm

from gmoe._checks import check_choice, check_count

FilterName: TypeAlias = Literal["identity", "low_pass", "high_pass"]


class FilterConv(MessagePassing):
    r"""A filter and a linear layer: :math:`X' = F(\hat A) X W + b`, with
    :math:`\hat A = D^{-1/2} (A + I) D^{-1/2}`.

    ``"identity"``: :math:`F = I`, no look at the neighbours (the weak expert of Mowst, Zeng et al., 2024);
    ``"low_pass"``: :math:`F = \hat A^k` with k = ``hops`` (at k = 1 GCN; the hop experts of GMoE, Wang et al., 2023);
    ``"high_pass"``: :math:`F = I - \hat A^k` (Node-MoE, Han et al., 2024). Experts of a :class:`gmoe.MoEConv` that
    differ in their filter share the products with :math:`\hat A`.

    Args:
        in_channels: width of the nodes.
        out_channels: width of the output.
        filter: ``"identity"``, ``"low_pass"`` (default) or ``"high_pass"``.
        hops: k (default 1); 1 for the identity.
        add_self_loops: the ``+ I`` in the formula (default ``True``).
        cached: keep the normalised adjacency of the first graph, for a model that sees only one (default ``False``).
        bias: learn a bias (default ``True``).

    Shapes:
        - ``x``: (N, in_channels); ``edge_index`` as for ``GCNConv``; ``edge_weight``: (M,).
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
        cached: bool = False,
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
        self.cached = cached
        self.normalize = True
        self._cached: tuple[Adj, Tensor | None] | None = None
        self.lin = Linear(in_channels, out_channels, bias=False, weight_initializer="glorot")
        self.bias = nn.Parameter(self.lin.weight.new_empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.lin.reset_parameters()
        zeros(self.bias)
        self._cached = None

    def forward(self, x: Tensor, edge_index: Adj, edge_weight: Tensor | None = None) -> Tensor:
        if self.filter != "identity":
            adj, edge_weight = self.norm(x, edge_index, edge_weight)
            low = x
            for _ in range(self.hops):
                low = self.hop(low, adj, edge_weight)
            x = low if self.filter == "low_pass" else x - low
        out: Tensor = self.lin(x)
        return out if self.bias is None else out + self.bias

    def norm(self, x: Tensor, edge_index: Adj, edge_weight: Tensor | None) -> tuple[Adj, Tensor | None]:
        """The normalised adjacency, as ``GCNConv`` has it."""
        if not self.normalize:
            return edge_index, edge_weight
        if self._cached is not None:
            return self._cached
        args = (edge_weight, x.size(0), False, self.add_self_loops, self.flow, x.dtype)
        normed: Any = gcn_norm(edge_index, *args)
        found: tuple[Adj, Tensor | None] = normed if isinstance(normed, tuple) else (normed, None)
        if self.cached:
            self._cached = found
        return found

    def hop(self, x: Tensor, adj: Adj, edge_weight: Tensor | None) -> Tensor:
        """(N, D) one product with the normalised adjacency."""
        out: Tensor = self.propagate(adj, x=x, edge_weight=edge_weight)
        return out

    def message(self, x_j: Tensor, edge_weight: Tensor | None) -> Tensor:
        return x_j if edge_weight is None else edge_weight[:, None] * x_j

    def message_and_aggregate(self, adj_t: Adj, x: Tensor) -> Tensor:
        out: Tensor = spmm(adj_t, x, reduce=self.aggr)
        return out

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_channels}, {self.out_channels}, {self.filter!r}, hops={self.hops})"
