"""What every model with experts keeps, whoever wrote the model: equal, or refused by name.

A cell is a model, a router and a consistency: nodes in another order, a graph alone and among
others, a trimmed graph, layer-wise inference; an image alone and among others. A router that
decides token by token is never refused.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.loader import NeighborLoader
from torch_geometric.nn import GraphSAGE, SAGEConv

from gmoe import BlockGNN, GNNMoE, ViTMoE, moefy, neighbor_loader

WIDTH, HIDDEN, OUT = 4, 8, 3

ROUTERS: dict[str, dict[str, Any]] = {
    "token_choice": {},
    "expert_choice": {},
    "expert_choice by threshold": {"inference": "threshold"},
    "attention_vote": {},
    "multi_centroid": {},
    "multi_centroid, experts choose": {"choice": "experts"},
    "random": {},
}
BY_TOKEN = ("token_choice", "expert_choice by threshold", "multi_centroid", "random")


def options_of(router: str) -> dict[str, Any]:
    name = router.replace(",", " ").split()[0]
    return {"router": name, "router_kwargs": ROUTERS[router], "num_experts": 3, "start": "shared"}


# Graphs


class Own(nn.Module):
    """Somebody's model of convs, with an inference of its own as in PyG's examples."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([SAGEConv(WIDTH, HIDDEN), SAGEConv(HIDDEN, OUT)])

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor | None = None) -> Tensor:
        first, last = self.convs
        return last(first(x, edge_index).relu(), edge_index)

    @torch.no_grad()
    def inference(self, subgraph_loader: Any) -> Tensor:
        x = subgraph_loader.data.x
        for conv in self.convs:
            parts = []
            for batch in subgraph_loader:
                out = conv(x[batch.n_id], batch.edge_index)[: batch.batch_size]
                parts.append(out if conv is self.convs[-1] else out.relu())
            x = torch.cat(parts)
        return x


class Around(nn.Module):
    """A model that holds one of PyG's."""

    def __init__(self) -> None:
        super().__init__()
        self.gnn = GraphSAGE(WIDTH, HIDDEN, 2, OUT)

    def forward(self, x: Tensor, edge_index: Tensor, **others: Any) -> Tensor:
        return self.gnn(x, edge_index, **others)

    def inference(self, loader: Any) -> Tensor:
        return self.gnn.inference(loader)


def gnn_moe(router: str, **others: Any) -> nn.Module:
    return GNNMoE(WIDTH, HIDDEN, OUT, 3, conv="sage", **others, **options_of(router))


GRAPHS: dict[str, Callable[[str], nn.Module]] = {
    "GNNMoE, routed once": partial(gnn_moe, shared_router=True),
    "GNNMoE, a router a layer": partial(gnn_moe, shared_router=False),
    "BlockGNN": lambda router: BlockGNN(WIDTH, HIDDEN, OUT, 3, conv="sage", **options_of(router)),
    "PyG's": lambda router: moefy(GraphSAGE(WIDTH, HIDDEN, 3, OUT), **options_of(router)),
    "PyG's with jk": lambda router: moefy(
        GraphSAGE(WIDTH, HIDDEN, 2, OUT, jk="last"), **options_of(router)
    ),
    "own": lambda router: moefy(Own(), targets="convs.*", **options_of(router)),
    "around PyG's": lambda router: moefy(Around(), targets="gnn.convs.0", **options_of(router)),
}


def graph(nodes: int, edges: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(nodes, WIDTH, generator=generator, dtype=torch.float64)
    return x, torch.randint(nodes, (2, edges), generator=generator)


def moved(model: nn.Module) -> Any:
    """In evaluation, with experts that differ and thresholds that were seen."""
    torch.manual_seed(1)
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("steps"):
                buffer.fill_(1)
    return model.eval()


def in_another_order(model: Any) -> Iterator[tuple[Tensor, Tensor]]:
    x, edge_index = graph(30, 90, 0)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    yield model(x[order], order.argsort()[edge_index]), model(x, edge_index)[order]


def among_other_graphs(model: Any) -> Iterator[tuple[Tensor, Tensor]]:
    (x, edges), (other_x, other_edges) = graph(20, 60, 0), graph(30, 80, 1)
    batch = torch.arange(50) // 20
    batch = batch.clamp(max=1)
    both = model(torch.cat([x, 2 * other_x]), torch.cat([edges, other_edges + 20], 1), batch=batch)
    yield both[:20], model(x, edges, batch=batch[:20])


def trimmed(model: Any) -> Iterator[tuple[Tensor, Tensor]]:
    x, edge_index = graph(60, 120, 0)
    part = next(iter(neighbor_loader(Data(x=x, edge_index=edge_index), [-1] * 3, batch_size=5)))
    hops = {
        "num_sampled_nodes_per_hop": part.num_sampled_nodes,
        "num_sampled_edges_per_hop": part.num_sampled_edges,
    }
    yield model(part.x, part.edge_index, **hops)[:5], model(part.x, part.edge_index)[:5]


class OneHop(NeighborLoader):
    """As PyG's loader of all neighbors gives a graph, which needs ``pyg-lib``."""

    def __init__(self, data: Data, batch_size: int) -> None:
        sampler = type("Sampler", (), {"num_neighbors": [-1]})
        values = {"data": data, "dataset": range(data.num_nodes or 0), "node_sampler": sampler}
        for name, value in {**values, "size": batch_size}.items():
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.size)

    def __iter__(self) -> Iterator[Data]:
        source, target = self.data.edge_index
        for start in range(0, len(self.dataset), self.size):
            seeds = torch.arange(start, min(start + self.size, len(self.dataset)))
            is_inside = (target >= start) & (target <= seeds[-1])
            found = source[is_inside].unique()
            found = found[(found < start) | (found > seeds[-1])]
            n_id = torch.cat([seeds, found])
            place = torch.full((len(self.dataset),), -1).index_copy(
                0, n_id, torch.arange(len(n_id))
            )
            edge_index = place[self.data.edge_index[:, is_inside]]
            yield Data(n_id=n_id, edge_index=edge_index, batch_size=len(seeds))


def layer_by_layer(model: Any) -> Iterator[tuple[Tensor, Tensor]]:
    if not hasattr(model, "inference"):
        return
    x, edge_index = graph(40, 120, 0)
    loader = OneHop(Data(x=x, edge_index=edge_index), 7)
    yield model.inference(loader), model(x, edge_index)


OF_GRAPHS = [in_another_order, among_other_graphs, trimmed, layer_by_layer]
DOCUMENTED = {("GNNMoE, a router a layer", "trimmed"), ("BlockGNN", "trimmed")}
"""Where experts choose, they choose among the nodes that are left: the docstring says so."""


@lru_cache(maxsize=1)  # the consistencies of a model come one after the other
def model_of_graphs(host: str, router: str) -> Any:
    torch.manual_seed(0)
    return moved(GRAPHS[host](router))


def require_equal_or_refused(
    model: nn.Module, consistency: Callable[[Any], Iterator[tuple[Tensor, Tensor]]], router: str
) -> None:
    try:
        for found, expected in consistency(model):
            torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    except ValueError as error:
        if router in BY_TOKEN or ": got " not in str(error) or ", expected " not in str(error):
            raise


@pytest.mark.parametrize("consistency", OF_GRAPHS, ids=lambda one: one.__name__)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("host", GRAPHS)
def test_a_model_of_graphs_is_consistent(
    host: str, router: str, consistency: Callable[[Any], Iterator[tuple[Tensor, Tensor]]]
) -> None:
    if router not in BY_TOKEN and (host, consistency.__name__) in DOCUMENTED:
        pytest.skip("documented")
    if host == "own" and consistency is trimmed:
        pytest.skip("it takes no such arguments")
    require_equal_or_refused(model_of_graphs(host, router), consistency, router)


@pytest.mark.parametrize("host", ["PyG's", "own", "around PyG's"])
def test_what_is_refused_is_refused_of_copies_and_of_models_in_models(host: str) -> None:
    model = moved(GRAPHS[host]("expert_choice"))
    copies = [model, copy.deepcopy(model)]
    if host == "PyG's":
        copies.append(pickle.loads(pickle.dumps(model)))
    x, edge_index = graph(20, 60, 0)
    for one in copies:
        assert one(x, edge_index).shape == (20, OUT)
        with pytest.raises(ValueError, match=r"^batch: got graphs, of which the layers"):
            one(x, edge_index, batch=torch.zeros(20, dtype=torch.long))
        with pytest.raises(ValueError, match=r"^inference: got layers in which nodes compete"):
            one.inference(OneHop(Data(x=x, edge_index=edge_index), 7))


def test_a_model_whose_routers_decide_token_by_token_has_no_guard() -> None:
    model: Any = GRAPHS["PyG's"]("token_choice")
    assert not model._forward_pre_hooks
    assert "inference" not in vars(model)


def test_rows_in_a_model_of_graphs_are_guarded_like_convs() -> None:
    """A network in a conv sees rows, which are nodes of all graphs."""

    class Conv(SAGEConv):
        def __init__(self) -> None:
            super().__init__(WIDTH, OUT)
            self.after = nn.Linear(OUT, OUT)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv: Any = Conv()

        def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor | None = None) -> Tensor:
            y: Tensor = self.conv.after(self.conv(x, edge_index))
            return y

    model: Any = moefy(Model(), targets="*.after", **options_of("expert_choice")).double()
    x, edge_index = graph(20, 60, 0)
    model(x, edge_index)
    with pytest.raises(ValueError, match=r"^batch: got graphs"):
        model(x, edge_index, torch.zeros(20, dtype=torch.long))


# Images


class Blocks(nn.Module):
    """Somebody's transformer, whose argument has the name of PyG's."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, HIDDEN, 4, 4)
        self.blocks: Any = nn.ModuleList([nn.Module(), nn.Module()])
        for block in self.blocks:
            block.mlp = nn.Sequential(nn.Linear(HIDDEN, 12), nn.GELU(), nn.Linear(12, HIDDEN))
        self.head = nn.Linear(HIDDEN, OUT)

    def forward(self, batch: Tensor) -> Tensor:
        x = self.patches(batch).flatten(2).mT
        for block in self.blocks:
            x = x + block.mlp(x + x.mean(dim=1, keepdim=True))
        return self.head(x.mean(dim=1))


def timm_vit(router: str) -> nn.Module:
    vit = timm.models.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2, num_classes=3
    )
    return moefy(vit, **options_of(router))


IMAGES: dict[str, Callable[[str], nn.Module]] = {
    "ViTMoE": lambda router: ViTMoE(8, **options_of(router)),
    "timm's": timm_vit,
    "own": lambda router: moefy(Blocks(), **options_of(router)),
}


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("host", IMAGES)
def test_an_image_alone_is_as_among_others(host: str, router: str) -> None:
    torch.manual_seed(0)
    model = moved(IMAGES[host](router))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(5, 3, 8, 8, generator=generator, dtype=torch.float64)
    together = model(images)
    torch.testing.assert_close(torch.cat([model(one[None]) for one in images]), together)
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(model(images[order]), together[order])
