"""A model is exported once, and runs on other numbers of images, nodes and edges."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from torch import Tensor, nn
from torch.export import Dim

from gmoe import GNNMoE, MLPExperts, MoE, MoEConv, SoftMoE, SoftSlots, ViTMoE, moefy
from gmoe.routers import ByType, build_router
from tests.helpers.masked import csr

WIDTH = 8
SIZES = ((20, 70), (33, 191), (12, 20))
"""Nodes and edges; the first is exported, the others are run, too."""

Args = tuple[Tensor, ...]
Make = Callable[[], nn.Module]


class Logits(nn.Module):
    """A classifier of transformers, called with images and giving a tensor."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images).logits


def mlps(router: str, k: int = 1, width: int = WIDTH) -> nn.Module:
    return MoE(
        build_router(router, width, num_experts=4, k=k),
        MLPExperts(width, 16, width, num_experts=4),
    )


class OfTypes(nn.Module):
    """A layer on tokens that have types."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.lin(x)


def by_type(**options: Any) -> nn.Module:
    return moefy(OfTypes(), targets="lin", router=ByType("z", (1, 6, 8)), **options)


def timm_vit(**options: Any) -> nn.Module:
    vit = timm.models.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5
    )
    return moefy(vit, num_experts=4, **options)


def hf_vit(**options: Any) -> nn.Module:
    config = hf.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
    )
    return Logits(moefy(hf.ViTForImageClassification(config), num_experts=4, **options))


conv: Callable[..., nn.Module] = partial(
    MoEConv, in_channels=WIDTH, out_channels=WIDTH, num_experts=4
)
gnn: Callable[..., nn.Module] = partial(GNNMoE, WIDTH, WIDTH, WIDTH, 3, num_experts=4)

TOKENS: dict[str, Make] = {
    **{f"MoE, token_choice, K={k}": partial(mlps, "token_choice", k=k) for k in (1, 2)},
    **{
        f"MoE, {router}, K=2": partial(mlps, router, k=2) for router in ("multi_centroid", "random")
    },
    "MoE, uniform, K=4": partial(mlps, "uniform", k=4),
}
GROUPS: dict[str, Make] = {
    **{f"MoE, {router}": partial(mlps, router) for router in ("expert_choice", "attention_vote")},
    "SoftMoE": lambda: SoftMoE(
        SoftSlots(WIDTH, num_experts=4, slots=2), MLPExperts(WIDTH, 16, WIDTH, num_experts=4)
    ),
}
TYPES: dict[str, Make] = {
    f"by type, {start}": partial(by_type, start=start) for start in ("copies", "shared")
}
IMAGES: dict[str, Make] = {
    "ViTMoE, expert_choice": partial(ViTMoE, 8, num_experts=4),
    "ViTMoE, K=2": partial(ViTMoE, 8, router="token_choice", k=2, num_experts=4),
    "timm, copies": partial(timm_vit, router="token_choice", start="copies"),
    "timm, expert_choice": partial(timm_vit, router="expert_choice", start="shared"),
    "transformers, copies": partial(hf_vit, router="token_choice", start="copies"),
    "transformers, K=2": partial(hf_vit, router="token_choice", start="shared", k=2),
}
GRAPHS: dict[str, Make] = {
    **{
        f"{name}, {kind}, {start}, K={k}": partial(make, conv=kind, start=start, k=k)
        for name, make in (("MoEConv", conv), ("GNNMoE", gnn))
        for kind in ("gcn", "sage", "gin", "gat")
        for start in ("copies", "shared")
        for k in (1, 2)
    },
    **{f"MoEConv, {kind}": partial(conv, kind, k=2) for kind in ("graph", "gatv2", "transformer")},
    "MoEConv, one by one": partial(conv, "cheb", K=2, k=2),
    "MoEConv, sum of neighbors": partial(
        conv, "gcn", router_input=("node", "neighbors", "degree"), k=2
    ),
}
WEIGHTED: dict[str, Make] = {
    f"GNNMoE, gcn, weights, {start}": partial(gnn, conv="gcn", start=start)
    for start in ("copies", "shared")
}
"""Graphs with edge weights and two loops at each node, of which GCN takes the last one's weight."""
CASES = {**TOKENS, **GROUPS, **TYPES, **IMAGES, **GRAPHS, **WEIGHTED}
SHORT = (
    "MoE, token_choice, K=2",
    "SoftMoE",
    "by type, shared",
    "ViTMoE, expert_choice",
    "timm, copies",
    "GNNMoE, sage, shared, K=2",
    "MoEConv, gin, copies, K=2",
    "MoEConv, gat, shared, K=2",
    "GNNMoE, gcn, weights, copies",
)
"""Cases of the default suite; the others are slow together."""


def built(name: str) -> nn.Module:
    """Of random parameters: at the start, experts are equal or add nothing."""
    torch.manual_seed(0)
    model = CASES[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def call(name: str, index: int) -> Args:
    torch.manual_seed(index)
    nodes, edges = SIZES[index]
    if name in GRAPHS:
        return torch.randn(nodes, WIDTH), torch.randint(nodes, (2, edges))
    if name in WEIGHTED:
        loops = torch.arange(nodes).expand(2, nodes)
        edge_index = torch.cat([loops, torch.randint(nodes, (2, edges)), loops.flip(1)], dim=1)
        return torch.randn(nodes, WIDTH), edge_index, torch.rand(edges + 2 * nodes)
    if name in TOKENS:
        return (torch.randn(nodes, WIDTH),)
    if name in TYPES:
        return torch.randn(nodes, WIDTH), torch.tensor([1, 6, 8])[torch.randint(3, (nodes,))]
    if name in GROUPS:
        return (torch.randn(nodes, 10, WIDTH),)
    side = 8 if name.startswith("ViTMoE") else 16
    return (torch.randn(nodes // 6, 3, side, side),)


DIMS: dict[str, Callable[[str], Any]] = {
    "DYNAMIC": lambda _: Dim.DYNAMIC,
    "AUTO": lambda _: Dim.AUTO,
    "named": Dim,
    "named, with bounds": lambda name: Dim(name, min=2, max=64 if name == "rows" else 4096),
}
"""The ways in which torch's users say that a size is any."""
STRICT = "named, with bounds"
"""The one that asks for most: no guard on a size may hold for a part of its range alone."""


def any_size(args: Args, way: str = "DYNAMIC") -> tuple[dict[int, Any], ...]:
    """Any number of rows; and of edges, the columns of integers and the weights behind them."""
    rows, edges = DIMS[way]("rows"), DIMS[way]("edges")
    # The types of tokens are as many as their rows.
    others = [rows if len(x) == len(args[0]) else edges for x in args[1:]]
    sizes = zip(args[1:], others, strict=True)
    return {0: rows}, *({1: edges} if x.dim() == 2 else {0: size} for x, size in sizes)


def close(found: Tensor, model: nn.Module, args: Args) -> None:
    with torch.no_grad():
        torch.testing.assert_close(found, model(*args), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in SHORT)) for name in CASES]
)
def test_a_model_is_exported_for_any_number_of_images_nodes_and_edges(name: str) -> None:
    model = built(name)
    args = call(name, 0)
    exported = torch.export.export(model, args, dynamic_shapes=any_size(args, STRICT))
    # Other runtimes know torch's operators only.
    assert not [node for node in exported.graph.nodes if "gmoe" in str(node.target)]
    run = exported.module()
    for index in range(len(SIZES)):
        args = call(name, index)
        close(run(*args), model, args)


@pytest.mark.slow
@pytest.mark.parametrize("way", DIMS)
def test_each_way_to_say_any_size_is_taken(way: str) -> None:
    name = "MoEConv, gin, copies, K=2"
    model, args = built(name), call(name, 0)
    run = torch.export.export(model, args, dynamic_shapes=any_size(args, way)).module()
    close(run(*call(name, 1)), model, call(name, 1))


@pytest.mark.parametrize(("router", "patches"), [("expert_choice", 4), ("token_choice", 196)])
def test_a_vit_of_few_tokens_or_many_is_exported_for_any_number_of_images(
    router: str, patches: int
) -> None:
    """Of many tokens, the blocks of experts are larger than the least."""
    torch.manual_seed(0)
    side = 8 * math.isqrt(patches)
    vit = timm.models.VisionTransformer(
        img_size=side, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5
    )
    model = moefy(vit, num_experts=4, router=router, start="shared").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    images = torch.randn(3, 3, side, side)
    shapes = any_size((images,), STRICT)
    run = torch.export.export(model, (images,), dynamic_shapes=shapes).module()
    for number in (3, 2, 5, 17, 64) if patches == 4 else (3, 2, 7):
        args = (torch.randn(number, 3, side, side),)
        close(run(*args), model, args)


@pytest.mark.parametrize("conv", [pytest.param("gcn", marks=pytest.mark.slow), "gatv2"])
def test_one_expert_is_exported_for_small_graphs_and_large_ones(conv: str) -> None:
    """Its rows are one block on a small graph, and several on a large one."""
    torch.manual_seed(0)
    model = MoEConv(conv, WIDTH, WIDTH, num_experts=1).eval()

    def graph(nodes: int, edges: int) -> Args:
        return torch.randn(nodes, WIDTH), torch.randint(nodes, (2, edges))

    args = graph(5, 9)
    run = torch.export.export(model, args, dynamic_shapes=any_size(args)).module()
    for size in ((300, 2_000), (20, 70), (4, 6), (1, 1)):
        args = graph(*size)
        close(run(*args), model, args)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_onnxruntime_gives_what_the_model_gives_on_any_size(name: str) -> None:
    runtime = pytest.importorskip("onnxruntime")
    model = built(name)
    args = call(name, 0)
    program = torch.onnx.export(
        model, args, dynamic_shapes=any_size(args), dynamo=True, verbose=False
    )
    assert program is not None
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    names = [given.name for given in session.get_inputs()]
    for index in range(len(SIZES)):
        args = call(name, index)
        feed = {key: value.numpy() for key, value in zip(names, args, strict=True)}
        (found,) = session.run(None, feed)
        close(torch.from_numpy(found), model, args)


@pytest.mark.parametrize("router", ["expert_choice", "attention_vote"])
def test_experts_that_choose_are_refused_for_groups_of_any_size(router: str) -> None:
    layer = mlps(router).eval()
    with pytest.raises(ValueError, match=r"torch\.export: got groups of any size"):
        torch.export.export(layer, (torch.randn(20, WIDTH),), dynamic_shapes=({0: Dim.DYNAMIC},))


def test_experts_that_choose_are_refused_for_a_batch_vector() -> None:
    layer = mlps("expert_choice").eval()
    args = (torch.randn(20, WIDTH), torch.arange(20) // 10)
    with pytest.raises(ValueError, match=r"torch\.export: got a batch vector"):
        torch.export.export(layer, args)


@pytest.mark.parametrize("kind", ["gcn", "gat"])
def test_experts_that_choose_are_exported_for_a_fixed_number_of_nodes(kind: str) -> None:
    """A node has any number of experts, so that no one knows the number of GAT's messages."""
    layer = conv(kind, router="expert_choice").eval()
    x = torch.randn(20, WIDTH)
    shapes = (None, {1: Dim.DYNAMIC})
    args = (x, torch.randint(20, (2, 70)))
    run = torch.export.export(layer, args, dynamic_shapes=shapes).module()
    args = (x, torch.randint(20, (2, 33)))
    close(run(*args), layer, args)


def test_experts_of_several_kinds_are_refused() -> None:
    layer = MoEConv(["gcn", "sage"], WIDTH, WIDTH).eval()
    args = call("MoEConv, gcn, shared, K=1", 0)
    with pytest.raises(ValueError, match=r"torch\.export: got experts of several kinds"):
        torch.export.export(layer, args)


def test_a_sparse_matrix_is_refused() -> None:
    matrix = csr(torch.randint(20, (2, 70)).unique(dim=1), (20, 20)).float()
    for layer in (conv("gcn"), gnn(conv="gat")):
        with pytest.raises(ValueError, match=r"torch\.export: got a sparse matrix"):
            torch.export.export(layer.eval(), (torch.randn(20, WIDTH), matrix))


def test_a_token_that_likes_all_experts_alike_takes_the_first_ones() -> None:
    layer = mlps("token_choice", k=2).eval()
    x = torch.zeros(20, WIDTH)
    run = torch.export.export(layer, (x,)).module()
    close(run(x), layer, (x,))
