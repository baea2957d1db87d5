"""A dense SAGE whose layers see the input again: a control of routing once by the input.

A router that decides for all layers by the raw features hands these to every layer. The dense rival
is a model whose layers see them, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import SAGEConv
from torch_geometric.typing import Adj

from gmoe import Graph
from gmoe.models.parts import Norm, Residual, norm_of, residual_of


class InputAgain(nn.Module):
    """The dense ``GNNMoE`` of SAGE convs, but that each layer sees ``[h, x]`` in place of ``h``.

    Args:
        in_channels: width of x.
        out_channels: width of the logits.
        hidden_channels: width of the hidden layers.
        num_layers: convs; the last is the output layer.
        dropout, norm, residual: as in ``GNNMoE``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden_channels: int,
        num_layers: int,
        dropout: float,
        norm: Norm,
        residual: Residual,
    ) -> None:
        super().__init__()
        widths = [in_channels, *[hidden_channels] * (num_layers - 1)]
        self.hidden_channels = hidden_channels
        self.convs = nn.ModuleList(
            SAGEConv(
                width + in_channels if layer else in_channels,
                hidden_channels if layer < num_layers - 1 else out_channels,
            )
            for layer, width in enumerate(widths)
        )
        self.norms = nn.ModuleList(norm_of(norm, hidden_channels) for _ in widths[1:])
        self.residuals = nn.ModuleDict()
        for layer, width in enumerate(widths[:-1]):
            added = residual_of(residual, width, hidden_channels)
            if added is not None:
                self.residuals[str(layer)] = added
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, edge_index: Adj, *edge_args: Tensor) -> Tensor:
        """(N, out_channels) the logits."""
        graph = Graph(edge_index, len(x))  # sorted once for all layers
        h = x
        for layer, norm in enumerate(self.norms):
            out = self._convolve(layer, h, x, graph)
            if str(layer) in self.residuals:
                out = out + self.residuals[str(layer)](h)
            h = self.dropout(norm(out).relu())
        return self._convolve(len(self.norms), h, x, graph)

    def _convolve(self, layer: int, h: Tensor, x: Tensor, graph: Graph) -> Tensor:
        conv: Any = self.convs[layer]
        seen = torch.cat([h, x], dim=1) if layer else x
        out: Tensor = conv.lin_l(graph.mean(seen)) + conv.lin_r(seen)
        return out


def facebook(in_channels: int, out_channels: int) -> InputAgain:
    """Two layers of 16, as the column facebook has them."""
    return InputAgain(in_channels, out_channels, 16, 2, 0.2, None, "linear")


def minesweeper(in_channels: int, out_channels: int) -> InputAgain:
    """Eight layers of 16, as the column minesweeper has them."""
    return InputAgain(in_channels, out_channels, 16, 8, 0.2, "batch_norm", "linear")
