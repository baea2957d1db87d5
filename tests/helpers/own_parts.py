"""A user's own router, conv and models."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch_geometric.nn import GraphSAGE, MessagePassing

import gmoe


class FirstBits(gmoe.Router):
    """Even tokens to the first expert, odd ones to the second."""

    def __init__(self, dim: int, *, num_experts: int, k: int = 1) -> None:
        super().__init__(dim, num_experts=num_experts, k=k, weight="score")
        self.scale = nn.Parameter(torch.ones(()))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)

    def route(self, x_TD: Tensor, group: object, edge_index: object) -> gmoe.Routing:
        expert_TK = (torch.arange(len(x_TD)) % 2)[:, None]
        return gmoe.Routing.from_choices(
            expert_TK, self.scale.expand(len(x_TD), 1), num_experts=self.num_experts
        )


class Mean(MessagePassing):
    """A linear map of the mean over in-neighbors."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(aggr="mean")
        self.lin = nn.Linear(in_channels, out_channels)

    def reset_parameters(self) -> None:
        self.lin.reset_parameters()

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        y: Tensor = self.lin(self.propagate(edge_index, x=x))
        return y


def sage(in_channels: int, num_classes: int) -> nn.Module:
    return GraphSAGE(in_channels, 8, 2, num_classes)


def moe(in_channels: int, num_classes: int) -> nn.Module:
    return gmoe.GNNMoE(in_channels, 8, num_classes, 2, num_experts=3)


def flat(image_size: int, num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(image_size**2, num_classes))


def nothing(*sizes: int) -> int:
    return 3


class Pairs(nn.Module):
    """Gives two things."""

    def forward(self, x: Tensor, *edges: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class FirstHalf(nn.Module):
    """Forgets half of the nodes."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.lin = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor, *edges: Tensor) -> Tensor:
        y: Tensor = self.lin(x[: len(x) // 2])
        return y


def pairs(in_channels: int, num_classes: int) -> nn.Module:
    return Pairs()


def wide(in_channels: int, num_classes: int) -> nn.Module:
    return GraphSAGE(in_channels, 8, 2, num_classes + 1)
