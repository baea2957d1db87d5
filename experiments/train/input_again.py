"""A dense GNN whose layers see the input again: a control of routing once by the input.

A router that decides for all layers by the raw features hands these to every layer. The dense rival
is a model whose layers see them, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gmoe import GNNMoE
from gmoe._checks import check
from gmoe.models.layers import build_conv


class InputAgain(GNNMoE):
    """The dense ``GNNMoE``, but that each layer behind the first sees ``[h, x]`` in place of ``h``.

    Residuals stay those of ``h``.

    Args:
        in_channels, hidden_channels, out_channels, num_layers, conv: as in ``GNNMoE``.
        **options: as in ``GNNMoE``, but for those of routers and of blocks.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        num_layers: int,
        *,
        conv: Any,
        **options: Any,
    ) -> None:
        sizes = (in_channels, hidden_channels, out_channels, num_layers)
        jk = options.get("jk")
        check(jk in (None, "last"), "jk", f"{jk!r} with input_again", "None or 'last'")
        super().__init__(*sizes, conv=conv, router=None, **options)
        for layer in range(1, num_layers):
            is_hidden = layer < num_layers - 1 or self.jk_mode is not None
            width = hidden_channels if is_hidden else out_channels
            seen = hidden_channels + in_channels
            self.convs[layer] = build_conv(conv, seen, width, is_hidden, None, {})
            if str(layer) in self.residuals:
                self.residuals[str(layer)] = OfFirst(self.residuals[str(layer)], hidden_channels)

    def finish(self, layer: int, x: Tensor, *args: Any, **options: Any) -> Any:
        """(n, D + C) the layer's output and, behind it, the input; of the last layer no input."""
        h, routing = super().finish(layer, x, *args, **options)
        if layer < self.num_layers - 1:
            h = torch.cat([h, x[:, -self.in_channels :]], dim=1)
        return h, routing


class OfFirst(nn.Module):
    """A module of the first columns of what it gets."""

    def __init__(self, module: nn.Module, width: int) -> None:
        super().__init__()
        self.module = module
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.module(x[:, : self.width])
        return out
