"""A training step of every layer, and how often a GPU would have to wait in it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch_geometric.nn import (
    GCN,
    MLP,
    GATConv,
    GCNConv,
    GINConv,
    SAGEConv,
    TransformerConv,
)

from gmoe import (
    GNNMoE,
    Graph,
    MLPExperts,
    MoE,
    MoEConv,
    SoftMoE,
    SoftSlots,
    moefy,
)
from gmoe.routers import ByType, build_router

WIDTH, NODES, NUM_EDGES, EXPERTS, HEADS = 64, 60, 240, 8, 8


class Step(NamedTuple):
    """A layer, its arguments, and how often its training step waits for a GPU."""

    layer: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    waits: int = 0


def features() -> torch.Tensor:
    return torch.randn(NODES, WIDTH, requires_grad=True)


def edges() -> tuple[Any, ...]:
    return features(), torch.randint(NODES, (2, NUM_EDGES))


def weighted_edges() -> tuple[Any, ...]:
    return *edges(), torch.rand(NUM_EDGES)


def graph() -> tuple[Any, ...]:
    x, edge_index = edges()
    return x, Graph(edge_index, NODES)


def images() -> tuple[Any, ...]:
    return (torch.randn(2, 30, WIDTH, requires_grad=True),)


def ragged() -> tuple[Any, ...]:
    """Tokens of two graphs of other sizes."""
    return features(), torch.tensor([0] * 25 + [1] * 35)


def mixture(router: str, **kwargs: Any) -> nn.Module:
    built = build_router(router, WIDTH, num_experts=EXPERTS, k=2, kwargs=kwargs)
    return MoE(built, MLPExperts(WIDTH, 2 * WIDTH, WIDTH, num_experts=EXPERTS))


def soft_mixture() -> nn.Module:
    slots = SoftSlots(WIDTH, num_experts=EXPERTS, slots=2)
    return SoftMoE(slots, MLPExperts(WIDTH, 2 * WIDTH, WIDTH, num_experts=EXPERTS))


def conv(name: Any, **options: Any) -> Callable[[], nn.Module]:
    return partial(MoEConv, name, WIDTH, WIDTH, **options)


def heads(name: str, **options: Any) -> Callable[[], nn.Module]:
    return partial(MoEConv, name, WIDTH, WIDTH // HEADS, heads=HEADS, **options)


def model(**options: Any) -> Callable[[], nn.Module]:
    return partial(GNNMoE, WIDTH, WIDTH, 5, 3, **options)


class Trimmed(nn.Module):
    """A model on a sampled batch: each layer computes the nodes that the next one needs."""

    def __init__(self) -> None:
        super().__init__()
        self.model = model()()

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> Any:
        return self.model(
            x,
            edge_index,
            num_sampled_nodes_per_hop=[10, 15, 15, 20],
            num_sampled_edges_per_hop=[80, 80, 80],
        )


def sampled_edges() -> tuple[Any, ...]:
    """Edges hop by hop, from nodes that a hop adds to those of the hop before."""
    place = torch.arange(80)
    hops = [(10 + place % 15, place % 10), (25 + place % 15, 10 + place % 15)]
    hops.append((40 + place % 20, 25 + place % 15))
    return features(), torch.cat([torch.stack(ends) for ends in hops], dim=1)


class Typed(nn.Module):
    """Two layers that are routed by the types of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.lins = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> Any:
        return self.lins(x)


def by_type() -> nn.Module:
    device = torch.get_default_device()
    with torch.device("cpu"):  # experts start as layers with values
        model = moefy(Typed(), targets=["lins.0", "lins.2"], router=ByType("z", [1, 6, 7, 8]))
    return model.to(device)


def types() -> tuple[Any, ...]:
    return features(), torch.arange(NODES) % 9


def gin_with_norms() -> nn.Module:
    return MoEConv(lambda i, o: GINConv(MLP([i, o, o])), WIDTH, WIDTH)


def of_start(words: str, start: str) -> dict[str, Step]:
    """The steps of graph layers that start in one way."""
    names = ("gcn", "sage", "graph", "gin", "gat", "gatv2", "transformer")
    return {
        **{f"{name}{words}": Step(conv(name, start=start), edges) for name in names},
        f"gcn on a Graph{words}": Step(conv("gcn", start=start), graph),
        f"gat on a Graph{words}": Step(conv("gat", start=start), graph),
        **{
            f"{name}, {HEADS} heads{words}": Step(heads(name, start=start), edges)
            for name in ("gat", "gatv2", "transformer")
        },
        f"gcn, weighted edges{words}": Step(conv("gcn", start=start), weighted_edges),
        f"GNNMoE{words}": Step(model(start=start), edges),
    }


ROUTERS = ("token_choice", "expert_choice", "attention_vote", "multi_centroid", "random", "uniform")
BY_CHOICE = {"router": "expert_choice", "start": "shared"}

STEPS: dict[str, Step] = {
    **of_start("", "shared"),
    **of_start(", copies", "copies"),
    "gat, expert_choice": Step(conv("gat", **BY_CHOICE), edges, waits=1),
    "gatv2, expert_choice": Step(conv("gatv2", **BY_CHOICE), edges, waits=1),
    "GNNMoE of gat": Step(model(conv="gat"), edges),
    "GNNMoE of transformer, 8 heads": Step(model(conv="transformer", heads=HEADS), edges),
    "GNNMoE, trimmed": Step(Trimmed, sampled_edges),
    "gin with batch norms": Step(gin_with_norms, edges),
    "layers by type": Step(by_type, types),
    "mixed kinds": Step(conv(["gcn", "sage", "gin", "graph"]), edges, waits=1),
    **{f"MoE, {name}": Step(partial(mixture, name), images) for name in ROUTERS},
    "MoE, switch and z": Step(
        partial(mixture, "token_choice", balance="switch", z_coef=0.1), images
    ),
    "MoE, capacity": Step(partial(mixture, "token_choice", capacity_factor=1.0), images, waits=1),
    "MoE, threshold": Step(partial(mixture, "expert_choice", inference="threshold"), images),
    "MoE, token_choice on a batch": Step(partial(mixture, "token_choice"), ragged),
    "SoftMoE": Step(soft_mixture, images),
}
"""By name; forward and backward, in float32 on a GPU of capability 8.0."""

LAUNCHES: dict[str, tuple[int, int]] = {
    "gcn": (86, 116),
    "sage": (90, 120),
    "graph": (83, 113),
    "gin": (169, 169),
    "gat": (220, 275),
    "gatv2": (204, 326),
    "transformer": (204, 362),
    "gcn on a Graph": (75, 105),
    "gat on a Graph": (206, 261),
    "gat, 8 heads": (200, 274),
    "gatv2, 8 heads": (207, 328),
    "transformer, 8 heads": (204, 362),
    "gcn, weighted edges": (92, 122),
    "GNNMoE": (186, 246),
    "gcn, copies": (59, 89),
    "sage, copies": (60, 90),
    "graph, copies": (53, 83),
    "gin, copies": (134, 134),
    "gat, copies": (146, 197),
    "gatv2, copies": (140, 262),
    "transformer, copies": (139, 297),
    "gcn on a Graph, copies": (48, 78),
    "gat on a Graph, copies": (127, 178),
    "gat, 8 heads, copies": (133, 207),
    "gatv2, 8 heads, copies": (142, 263),
    "transformer, 8 heads, copies": (139, 297),
    "gcn, weighted edges, copies": (65, 95),
    "GNNMoE, copies": (112, 153),
    "gat, expert_choice": (271, 271),
    "gatv2, expert_choice": (323, 323),
    "GNNMoE of gat": (307, 405),
    "GNNMoE of transformer, 8 heads": (297, 605),
    "GNNMoE, trimmed": (163, 221),
    "gin with batch norms": (295, 295),
    "layers by type": (110, 110),
    "mixed kinds": (333, 333),
    "MoE, token_choice": (128, 128),
    "MoE, expert_choice": (120, 120),
    "MoE, attention_vote": (156, 156),
    "MoE, multi_centroid": (175, 175),
    "MoE, random": (99, 99),
    "MoE, uniform": (90, 90),
    "MoE, switch and z": (120, 120),
    "MoE, capacity": (184, 184),
    "MoE, threshold": (144, 144),
    "MoE, token_choice on a batch": (128, 128),
    "SoftMoE": (176, 176),
}
"""By name: what a step launches at most, of few rows and of more than all experts take at once.

They may fall, not grow: ``python -m tools.waits`` prints what they are.
"""

PYG: dict[str, Step] = {
    **{
        name: Step(partial(kind, WIDTH, WIDTH), edges)
        for name, kind in {"gcn": GCNConv, "sage": SAGEConv}.items()
    },
    "gin": Step(lambda: GINConv(MLP([WIDTH, WIDTH, WIDTH], norm=None)), edges),
    **{
        f"{name}, {HEADS} heads": Step(partial(kind, WIDTH, WIDTH // HEADS, heads=HEADS), edges)
        for name, kind in {"gat": GATConv, "transformer": TransformerConv}.items()
    },
    "GCN of three layers": Step(partial(GCN, WIDTH, WIDTH, 3, 5), edges),
}
"""What the same costs without experts."""
