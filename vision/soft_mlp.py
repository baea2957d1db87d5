"""Soft experts beside the MLP of a ViT's block."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

import gmoe


class SoftMLP(nn.Module):
    """The MLP of a block, and slots that start at zero beside it.

    An image has as many slots as tokens.

    Args:
        mlp: the MLP.
        size: the sizes of the ViT.
        experts: E.
        dropout: inside of the experts.
    """

    def __init__(
        self, mlp: nn.Module, size: Mapping[str, int], experts: int, dropout: float
    ) -> None:
        super().__init__()
        width = size["hidden_dim"]
        tokens = (size["image_size"] // size["patch_size"]) ** 2 + 1
        self.mlp = mlp
        self.experts = gmoe.MLPExperts(
            width, size["mlp_dim"], width, num_experts=experts, dropout=dropout, zero_init=True
        )
        slots = gmoe.SoftSlots(width, num_experts=experts, slots=-(-tokens // experts))
        self.soft = gmoe.SoftMoE(slots, self.experts)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mlp(x) + self.soft(x)
        return y
