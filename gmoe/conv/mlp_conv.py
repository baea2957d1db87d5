"""MLPConv: an expert that does not look at the graph. Shapes: T tokens, I in, O out, E experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing
from torch_geometric.typing import Adj

from gmoe.conv.experts import StackedExperts
from gmoe.conv.graph import Graph
from gmoe.conv.pieces import Pieces
from gmoe.dispatch import Backend
from gmoe.experts import MLPExperts
from gmoe.routing import Routing


class MLPConv(MessagePassing):
    r"""A two-layer perceptron in the place of a conv: :math:`x_i' = V \,\mathrm{relu}(W x_i + b) + c`.

    The expert for nodes that need no neighbours (the weak expert of Mowst, Zeng et al., 2024).

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

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_channels}, {self.out_channels})"


class MLPConvExperts(StackedExperts):
    """E MLPConvs as stacked perceptrons."""

    @staticmethod
    def accepts(conv: Any) -> bool:
        return True

    def _build(self, template: Any, backend: Backend) -> None:
        self.prototype = MLPConv(1, 1)
        self.prototype.up = self.prototype.down = nn.Identity()
        self.mlp = MLPExperts(
            template.up.in_features,
            template.hidden_channels,
            template.out_channels,
            self.num_experts,
            activation="relu",
            bias=template.up.bias is not None,
            backend=backend,
        )

    @torch.no_grad()
    def _fill(self, convs: list[Any]) -> None:
        for expert, conv in enumerate(convs):
            for stacked, linear in ((self.mlp.up, conv.up), (self.mlp.down, conv.down)):
                stacked.weight[expert] = linear.weight.T
                if stacked.bias is not None:
                    stacked.bias[expert] = linear.bias

    @torch.no_grad()
    def _unfill(self, conv: Any, index: int) -> None:
        for stacked, linear in ((self.mlp.up, conv.up), (self.mlp.down, conv.down)):
            linear.weight.copy_(stacked.weight[index].T)
            if stacked.bias is not None:
                linear.bias.copy_(stacked.bias[index])

    def by_pieces(self, x: Tensor, aggregate: Tensor | None, pieces: Pieces, routing: Routing) -> Tensor:
        return self._rows_by_pieces(x, None, pieces, routing)

    def forward(self, x_src: Tensor, x_dst: Tensor, aggregate: Tensor | None, graph: Graph, routing: Routing) -> Tensor:
        return self.mlp.mix(x_dst, routing)
