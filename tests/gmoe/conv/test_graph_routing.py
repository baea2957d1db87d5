"""A decision for each graph of a batch: a router in the model, and ``routing=``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.nn import global_mean_pool

from gmoe import MoEConv, TokenChoice
from tests.helpers.masked import redrawn, weighted

BATCH = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3])
KINDS: list[Any] = ["gcn", "gin", "gat", "res_gated_graph", ["gcn", "gat", "sage"]]


class ByGraph(nn.Module):
    """All nodes of a graph go to the experts of their mean."""

    def __init__(self, conv: Any) -> None:
        super().__init__()
        num_experts = len(conv) if isinstance(conv, list) else 4
        self.router = TokenChoice(6, num_experts=num_experts)
        self.conv = MoEConv(conv, 6, 5, num_experts=num_experts, router=None, start="plain")

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        graphs = self.router(global_mean_pool(x, batch))
        out: Tensor = self.conv(x, edge_index, routing=graphs.expand(batch))
        return out


def nodes_and_edges() -> tuple[Tensor, Tensor]:
    """Features, and edges inside each graph."""
    torch.manual_seed(3)
    pairs = torch.cartesian_prod(torch.arange(len(BATCH)), torch.arange(len(BATCH)))
    within = pairs[(BATCH[pairs[:, 0]] == BATCH[pairs[:, 1]]) & (pairs[:, 0] != pairs[:, 1])]
    edge_index = within[torch.rand(len(within)) < 0.6].t()
    return torch.randn(len(BATCH), 6, dtype=torch.float64, requires_grad=True), edge_index


@pytest.mark.parametrize("conv", KINDS, ids=str)
def test_a_layer_takes_the_decision_of_each_graph(conv: Any) -> None:
    x, edge_index = nodes_and_edges()
    model = redrawn(ByGraph(conv))
    out = model(x, edge_index, BATCH)
    means = torch.stack([x[graph == BATCH].mean(dim=0) for graph in range(4)])
    expected = weighted(model.conv, x, edge_index, model.router(means).to_dense()[BATCH])
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    values = [x, model.router.gate.weight]
    found = torch.autograd.grad(out.square().sum(), values)
    wanted = torch.autograd.grad(expected.square().sum(), values)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
