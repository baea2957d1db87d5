"""Convs with options, and the graph and the layers that tests of MoEConv share."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing

from gmoe import MoEConv
from tests.helpers.masked import GRAPHS, features

NODES = 8
WIDTH = 4
EDGE_DIM = 3
FILL = torch.tensor([1.0, -1.0, 2.0])
Case = tuple[Any, dict[str, Any]]

AGGREGATE_ONCE: list[Case] = [
    *(
        ("gcn", {"improved": True, "cached": True, "bias": False}),
        ("graph", {"aggr": "mean"}),
        ("sage", {}),
    ),
    ("sage", {"aggr": ["mean", "max"], "root_weight": False, "normalize": True}),
    *(("gin", {"train_eps": True, "eps": 0.5}), ("gine", {})),
]

ATTENTION: list[Case] = [
    ("gat", {"heads": 2, "concat": False, "residual": True, "add_self_loops": False}),
    ("gat", {"edge_dim": EDGE_DIM, "fill_value": FILL}),
    ("gatv2", {"heads": 2, "edge_dim": EDGE_DIM, "fill_value": FILL}),
    *(("gatv2", {"share_weights": True, "bias": False}), ("transformer", {"root_weight": False})),
    ("transformer", {"heads": 2, "beta": True, "concat": False, "edge_dim": EDGE_DIM}),
]

SOME: list[Case] = [
    *(
        ("gcn", {}),
        ("gin", {}),
        ("gat", {"heads": 2}),
        ("sage", {"project": True}),
        ("tag", {"K": 2}),
    ),
    (["gcn", "gat", "le"], {}),
]
"""One of each way to run experts."""


def ids(value: Any) -> str:
    """An id that all workers of pytest agree on."""
    return re.sub(r" at 0x\w+", "", str(value))


def graph() -> tuple[Tensor, Tensor]:
    """Features and edges of the mixed graph."""
    return features(NODES, WIDTH).float(), GRAPHS["mixed"][1]


KINDS: list[Any] = ["gcn", "gin", "gat", "le", ["gcn", "gat", "le"]]


def layer(conv: Any = "gcn", in_channels: Any = WIDTH, **kwargs: Any) -> MoEConv:
    torch.manual_seed(0)
    return MoEConv(conv, in_channels, WIDTH, **{"num_experts": 3, **kwargs})


class Two(nn.Module):
    """Two layers, as in PyG's tutorials, with experts or without.

    Those with experts equal the dense ones, since their gains are zero.
    """

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.conv2 = make(), make()

    def forward(self, x: Tensor, edge_index: Tensor) -> Any:
        return self.conv2(self.conv1(x, edge_index).relu(), edge_index)


class GatedSum(MessagePassing):
    """Local: a sum over in-edges, gated by both ends."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(aggr="add")
        self.lin = nn.Linear(in_channels, out_channels)
        self.gate = nn.Linear(2 * in_channels, 1)

    def reset_parameters(self) -> None:
        self.lin.reset_parameters()
        self.gate.reset_parameters()

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        out: Tensor = self.propagate(edge_index, x=x)
        return out

    def message(self, x_i: Tensor, x_j: Tensor) -> Tensor:
        return torch.sigmoid(self.gate(torch.cat([x_i, x_j], dim=-1))) * self.lin(x_j)
