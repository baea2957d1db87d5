"""Small layers with experts that differ, of which some are taken away."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch_geometric.nn import GATConv

import gmoe
from gmoe import MoEConv
from gmoe._calls import evaluating
from tests.helpers.vits import timm_vit

WIDTH, EXPERTS, NODES = 4, 8, 5
X = torch.randn(NODES, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
EDGES = torch.tensor([[0, 1, 2, 3, 4, 0, 2], [1, 2, 3, 4, 0, 2, 0]])

CONVS: dict[str, Any] = {
    "gcn": "gcn",
    "sage": "sage",
    "gin": "gin",
    "gat": lambda i, o: GATConv(i, o, heads=2, concat=False),
    "gatv2": "gatv2",
    "transformer": "transformer",
    "one by one": "film",
    "several kinds": ["gcn", "sage", "gat", "graph", "gcn", "film", "gin", "graph"],
}
BY_TOKEN: dict[str, dict[str, Any]] = {
    "token_choice": {},
    "random": {},
    "multi_centroid": {"num_centroids": 2},
}
"""Routers under which a few tokens leave experts dead."""


def moved(layer: Any) -> Any:
    """The layer in evaluation, with experts that differ and a gain that is not zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += 0.3 * noise.to(parameter)
    return layer.eval()


def conv_layer(conv: Any, start: Any, router: str, k: int, **router_kwargs: Any) -> Any:
    torch.manual_seed(0)
    layer = MoEConv(
        conv,
        WIDTH,
        WIDTH,
        num_experts=None if isinstance(conv, list) else EXPERTS,
        start=start,
        router=router,
        k=k,
        router_kwargs=router_kwargs,
    )
    return moved(layer.double())


def moefied(**options: Any) -> Any:
    torch.manual_seed(0)
    return moved(gmoe.moefy(timm_vit(2), every=1, num_experts=EXPERTS, **options))


def assert_has(layer: Any, number: int) -> None:
    """The layer, its router and all stacked tensors have this number of experts."""
    assert layer.num_experts == number
    assert layer.router.num_experts == number
    for part in layer.experts.modules():
        if isinstance(part, gmoe.LinearExperts):
            assert len(part.weight) == part.num_experts == len(part.stored("weight"))


def routings_of(model: Any, *inputs: Any, **named: Any) -> list[gmoe.Routing]:
    """What the model's routers decide for an input, in evaluation."""
    with evaluating(model), gmoe.record_routing(model) as routings:
        model(*inputs, **named)
    return routings


def pruned_on(model: Any, *inputs: Any, **named: Any) -> dict[str, tuple[int, ...]]:
    """Prune the model by its routings of one input; what it kept by layer."""
    return gmoe.prune(model, routings_of(model, *inputs, **named))


class Mine(gmoe.Router):
    """Somebody's own."""

    def reset_parameters(self) -> None: ...

    def route(self, x_TD: Tensor, group: Any, edge_index: Any) -> gmoe.Routing:
        zeros_T1 = torch.zeros(len(x_TD), 1, dtype=torch.long)
        return gmoe.Routing.from_choices(
            zeros_T1, x_TD.new_ones(len(x_TD), 1), num_experts=self.num_experts
        )
