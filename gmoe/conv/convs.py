"""Convs that PyG does not have: filters, MLPs that need no neighbors, and sums without weights.

Shapes: N nodes, M edges, D width.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing
from torch_geometric.nn.dense.linear import Linear
from torch_geometric.nn.inits import zeros
from torch_geometric.typing import Adj

from gmoe._checks import check, check_choice, check_counts
from gmoe.conv.graph import Graph

BareName: TypeAlias = Literal["gcn", "sage"]
FilterName: TypeAlias = Literal["identity", "low_pass", "high_pass"]


class FilterConv(MessagePassing):
    r"""Filter and transform: :math:`X' = F(\hat A) X W + b`, with
    :math:`\hat A = D^{-1/2} (A + I) D^{-1/2}`.

    ``"identity"``: :math:`F = I`, which ignores the neighbors (the weak expert of Mowst, Zeng et
    al., 2024); ``"low_pass"``: :math:`F = \hat A^k` with k = ``hops`` (a GCN at k = 1; the hop
    experts of GMoE, Wang et al., 2023); ``"high_pass"``: :math:`F = I - \hat A^k` (Node-MoE, Han et
    al., 2024). Experts of a :class:`gmoe.MoEConv` that differ in their filter share the products
    with :math:`\hat A`.

    Args:
        in_channels: width of the nodes.
        out_channels: width of the output.
        filter: ``"identity"``, ``"low_pass"`` (default) or ``"high_pass"``.
        hops: k (default 1); 1 for the identity.
        add_self_loops: the ``+ I`` in the formula (default ``True``).
        bias: learn a bias (default ``True``).

    Shapes:
        - ``x``: (N, in_channels); ``edge_index`` as for ``GCNConv``, or a :class:`gmoe.Graph`;
          ``edge_weight``: (M,).
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
        check_counts(in_channels=in_channels, out_channels=out_channels, hops=hops)
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

    def forward(
        self, x: Tensor, edge_index: Adj | Graph, edge_weight: Tensor | None = None
    ) -> Tensor:
        if self.filter != "identity":
            graph = edge_index if isinstance(edge_index, Graph) else Graph(edge_index, x.size(0))
            graph = graph.fitting((x.size(0), x.size(0)), self.flow, edge_weight)
            if self.explain:
                graph = graph.explained(self)
            low = x
            for _ in range(self.hops):
                low = self.hop(low, graph)
            x = low if self.filter == "low_pass" else x[: low.size(0)] - low
        out = self.lin(x)
        return out if self.bias is None else out + self.bias

    def hop(self, x: Tensor, graph: Graph) -> Tensor:
        """(N, D) one product with the normalized adjacency."""
        matrix = graph.normalized(improved=False, loops=self.add_self_loops, dtype=x.dtype)
        return graph.product(matrix, x)

    def __repr__(self) -> str:
        widths = f"{self.in_channels}, {self.out_channels}"
        return f"{type(self).__name__}({widths}, {self.filter!r}, hops={self.hops})"


class MLPConv(MessagePassing):
    r"""A two-layer MLP as a conv: :math:`x_i' = V \,\mathrm{relu}(W x_i + b) + c`.

    An expert for nodes that need no neighbors (the weak expert of Mowst, Zeng et al., 2024).

    Args:
        in_channels: width of the nodes; for a tuple, that of the destinations.
        out_channels: width of the output.
        hidden_channels: width of the hidden layer (default ``out_channels``).
        bias: learn biases (default ``True``).

    Shapes:
        - ``x``: (N, in_channels), or a tuple of source and destination nodes; only the destinations
          are read.
        - returns (N, out_channels); ``edge_index`` is ignored.
    """

    def __init__(
        self,
        in_channels: int | tuple[int, int],
        out_channels: int,
        hidden_channels: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        width = in_channels[1] if isinstance(in_channels, tuple | list) else in_channels
        hidden = out_channels if hidden_channels is None else hidden_channels
        check_counts(in_channels=width, out_channels=out_channels, hidden_channels=hidden)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.hidden_channels = hidden
        self.up = nn.Linear(width, self.hidden_channels, bias=bias)
        self.down = nn.Linear(self.hidden_channels, out_channels, bias=bias)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.up.reset_parameters()
        self.down.reset_parameters()

    def forward(self, x: Tensor | tuple[Tensor, Tensor], edge_index: Adj | None = None) -> Tensor:
        x_dst = x if isinstance(x, Tensor) else x[1]
        return self.down(self.up(x_dst).relu())


class BareConv(MessagePassing):
    r"""What a GCN or SAGE sums over neighbors, without weights: for blocks whose weights follow.

    ``"gcn"``: :math:`\hat A X` with :math:`\hat A = D^{-1/2} (A + I) D^{-1/2}`; ``"sage"``:
    :math:`[x_i, \mathrm{mean}_{j \to i}\, x_j]`. The modules of `Platonov et al., 2023
    <https://arxiv.org/abs/2302.11640>`_ are these and a feed-forward part behind them, see ``ffn``
    of :class:`gmoe.GNNMoE`.

    Args:
        in_channels: width of the nodes.
        out_channels: the same.
        of: ``"gcn"`` (default) or ``"sage"``.

    Shapes:
        - ``x``: (N, in_channels); ``edge_index`` as for ``GCNConv``, or a :class:`gmoe.Graph`;
          ``edge_weight``: (M,).
        - returns (N, in_channels), of SAGE (N, 2 in_channels).

    Raises:
        ValueError: another name, or another width than that of the nodes.
    """

    def __init__(self, in_channels: int, out_channels: int, of: BareName = "gcn") -> None:
        check_choice("of", of, BareName)
        check_counts(in_channels=in_channels, out_channels=out_channels)
        legal = f"in_channels={in_channels}: there are no weights; in a GNNMoE they are in ffn="
        check(out_channels == in_channels, "out_channels", out_channels, legal)
        super().__init__()
        self.of = of
        self.in_channels = in_channels

    def forward(
        self, x: Tensor, edge_index: Adj | Graph, edge_weight: Tensor | None = None
    ) -> Tensor:
        graph = edge_index if isinstance(edge_index, Graph) else Graph(edge_index, x.size(0))
        graph = graph.fitting((x.size(0), x.size(0)), self.flow, edge_weight)
        if self.explain:
            graph = graph.explained(self)
        if self.of == "sage":
            mean = graph.product(graph.summing(by="weight", mean=True, dtype=x.dtype), x)
            return torch.cat([x[: mean.size(0)], mean], dim=-1)
        matrix = graph.normalized(improved=False, loops=True, dtype=x.dtype)
        return graph.product(matrix, x)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_channels}, {self.of!r})"
