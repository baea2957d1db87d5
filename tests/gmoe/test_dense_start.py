"""A layer with experts starts as the dense one. Shapes: N nodes, E experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gmoe import ROUTERS, GNNMoE, MoEConv
from gmoe.conv.kinds import Make
from gmoe.models.vit import ViTMoE, ViTSize
from tests.gmoe.conv.masked import GRAPHS, features, routing_of
from tests.gmoe.conv.test_experts import ALL, SOME, WIDTH, Case, build, edge_args, ids

NODES, EDGES = GRAPHS["mixed"]
SMALL_VIT = ViTSize(image_size=8, patch_size=4, num_layers=4, num_heads=2, hidden_dim=16, mlp_dim=24)


def assert_same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def drawn(make: Any, seed: int = 3) -> tuple[Any, Tensor]:
    """What is made with that seed, in float64, and what is drawn next."""
    torch.manual_seed(seed)
    return make().double().eval(), torch.rand(1)


def dense_conv(conv: Any, kwargs: dict[str, Any], width: int = WIDTH) -> Any:
    first = conv[0] if isinstance(conv, list) else conv
    own = {name: value for name, value in kwargs.items() if name != "local"}  # which is MoEConv's
    return drawn(lambda: Make([first], width, WIDTH, (), own)(0))


@pytest.mark.filterwarnings("ignore:.*runs on the whole graph")
@pytest.mark.parametrize(("conv", "kwargs"), ALL, ids=ids)
def test_a_new_layer_gives_what_its_conv_gives(conv: Any, kwargs: dict[str, Any]) -> None:
    """Drawn with the same seed; and what is drawn after it is the same too."""
    experts = None if isinstance(conv, list) else 3
    layer, after = drawn(lambda: MoEConv(conv, WIDTH, WIDTH, num_experts=experts, **kwargs))
    plain, expected = dense_conv(conv, kwargs)
    assert torch.equal(after, expected)
    given = edge_args(layer, EDGES.size(1))
    x = features(NODES, WIDTH)
    own = {name: value for name, value in given.items() if name in plain.forward.__code__.co_varnames}
    assert_same(layer(x, EDGES, **given), plain(x, EDGES, **own))
    torch.manual_seed(3)
    layer.float().reset_parameters()
    torch.manual_seed(3)
    plain.float().reset_parameters()
    assert_same(layer.double()(x, EDGES, **given), plain.double()(x, EDGES, **own))


@pytest.mark.filterwarnings("ignore:.*runs on the whole graph")
@pytest.mark.parametrize(
    ("case", "router", "options"),
    [
        *((SOME[0], router, {"k": 2}) for router in ROUTERS),
        *((case, "token_choice", {"shared_transform": True}) for case in SOME),
    ],
    ids=str,
)
def test_every_router_starts_dense_and_learns(case: Case, router: str, options: dict[str, Any]) -> None:
    """From the second step on: the first one's gradient opens the gain."""
    conv, kwargs = case
    experts = None if isinstance(conv, list) else 3
    layer, _ = drawn(lambda: MoEConv(conv, WIDTH, WIDTH, num_experts=experts, router=router, **options, **kwargs))
    plain, _ = dense_conv(conv, kwargs)
    x = features(NODES, WIDTH)
    assert_same(layer.train()(x, EDGES), plain.train()(x, EDGES))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    seen: dict[str, bool] = {name: False for name, _ in layer.named_parameters()}
    for step in range(6):
        optimizer.zero_grad()
        layer(x, EDGES).sin().sum().backward()
        routed = [p.grad for p in layer.experts.parameters()]
        assert all(grad is not None for grad in routed)
        assert any(bool(grad.any()) for grad in routed if grad is not None) == (step > 0)
        for name, parameter in layer.named_parameters():
            seen[name] |= parameter.grad is not None and bool(parameter.grad.any())
        optimizer.step()
    assert all(learned for name, learned in seen.items() if name.startswith(("router.gate", "gain", "transform"))), seen


@pytest.mark.parametrize("widths", [(5, 5), (5, 7), (-1, -1)], ids=str)
def test_a_shared_transform_of_bipartite_input(widths: tuple[int, int]) -> None:
    layer = MoEConv("sage", widths, 4, shared_transform=True).double()
    wide = 7 if widths == (5, 7) else 5
    x = features(9, 5), features(6, wide)
    assert layer(x, torch.randint(6, (2, 20))).shape == (6, 4)
    assert layer.transform is not None
    assert len(layer.transform) == (2 if wide == 7 else 1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shared_router": True, "router_input": ("node", "neighbors"), "jk": "cat", "norm": "batch_norm"},
        {"conv": "gat", "heads": 2, "router": "expert_choice", "residual": "linear", "in_proj": True},
        {"conv": ["sage", "gcn", "mlp"], "router": "multi_centroid", "every": 2},
    ],
    ids=str,
)
def test_a_new_gnn_gives_what_the_dense_one_gives(options: dict[str, Any]) -> None:
    sizes = (4, 6, 3, 4)
    model, after = drawn(lambda: GNNMoE(*sizes, **options))
    plain, expected = drawn(lambda: GNNMoE(*sizes, **{**options, "router": None}))
    assert torch.equal(after, expected)
    x = features(NODES, 4)
    assert_same(model(x, EDGES), plain(x, EDGES))


@pytest.mark.parametrize("router", [*ROUTERS])
def test_a_new_vit_gives_what_the_dense_one_gives(router: str) -> None:
    def with_head(vit: ViTMoE) -> ViTMoE:  # torchvision's starts at zero
        nn.init.normal_(vit.heads[0].weight)
        return vit

    model, after = drawn(lambda: with_head(ViTMoE(SMALL_VIT, router=router)))
    plain, expected = drawn(lambda: with_head(ViTMoE(SMALL_VIT, router=None)))
    assert torch.equal(after, expected)
    images = features(2, 3, 8, 8)
    assert_same(model(images), plain(images))


def test_an_expert_is_what_is_added_for_it() -> None:
    layer = build("sage", {}, shared_expert=True)
    x, weight_TE = features(NODES, WIDTH), torch.eye(3, dtype=torch.float64)[torch.arange(NODES) % 3]
    added = layer(x, EDGES, routing=routing_of(weight_TE)) - layer.shared_expert.expert(0)(x, EDGES)
    found = torch.stack([layer.expert(e)(x, EDGES) for e in range(3)])
    assert_same(added, found[torch.arange(NODES) % 3, torch.arange(NODES)])


def test_experts_follow_the_seed_and_differ() -> None:
    """What leaves torch's generator alone is drawn from it all the same."""
    layers = [drawn(lambda: nn.ModuleList([MoEConv("gcn", 4, 4), MoEConv("gcn", 4, 4)]), seed)[0] for seed in (3, 3, 4)]
    first, again, other = ([layer.experts.linear.weight for layer in pair] for pair in layers)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0][0], first[0][1])
