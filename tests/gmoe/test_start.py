"""A layer with experts starts as the dense one, beside a shared expert or as copies.

Shapes: N nodes, E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric import nn as pyg
from torch_geometric.nn import GATConv, GCNConv, GINConv, SAGEConv

import gmoe
from gmoe import (
    GNNMoE,
    MoEConv,
    OracleRouter,
    TokenChoice,
    moefy,
)
from gmoe.models.vit import ViTMoE
from gmoe.moe import MoELayer
from tests.helpers.conv_cases import ids
from tests.helpers.equal import assert_same
from tests.helpers.masked import GRAPHS, features, routing_of
from tests.helpers.vits import SMALL_VIT

NODES, EDGES = GRAPHS["mixed"]
WIDTH = 4
FOUR_BLOCKS = SMALL_VIT | {"num_layers": 4}


def gin(width: int, out: int) -> GINConv:
    return GINConv(
        nn.Sequential(nn.Linear(width, out), nn.ReLU(), nn.Linear(out, out)), train_eps=True
    )


def averaged(conv: Callable[..., Any]) -> Callable[..., Any]:
    return partial(conv, heads=2, concat=False)


CONVS: list[Any] = [GCNConv, gin, pyg.GraphConv, partial(pyg.TAGConv, K=2)]
CONVS += map(averaged, (GATConv, pyg.GATv2Conv, pyg.TransformerConv))
CONVS += [
    partial(SAGEConv, project=True),
    partial(SAGEConv, aggr=["mean", "max"]),
    [SAGEConv, GCNConv, pyg.GraphConv],
]
CONVS += [
    [GCNConv, averaged(GATConv), pyg.FiLMConv],
    [partial(pyg.SGConv, K=1), partial(pyg.SGConv, K=2)],
]


def drawn(make: Any, seed: int = 3) -> tuple[Any, Tensor]:
    """What is made with that seed, in float64, and what is drawn next."""
    torch.manual_seed(seed)
    return make().double().eval(), torch.rand(1)


def pair(conv: Any, **options: Any) -> tuple[tuple[Any, Tensor], tuple[Any, Tensor]]:
    """A layer, and the conv that it starts as."""
    first, experts = (conv[0], None) if isinstance(conv, list) else (conv, 3)
    layer = drawn(lambda: MoEConv(conv, WIDTH, WIDTH, num_experts=experts, **options))
    return layer, drawn(lambda: first(WIDTH, WIDTH))


@pytest.mark.filterwarnings("ignore:.*runs on the whole graph")
@pytest.mark.parametrize("conv", CONVS, ids=ids)
def test_a_new_layer_gives_what_its_conv_gives(conv: Any) -> None:
    """Drawn with the same seed; and what is drawn after it is the same too."""
    (layer, after), (plain, expected) = pair(conv, start="shared")
    assert torch.equal(after, expected)
    x = features(NODES, WIDTH)
    assert_same(layer(x, EDGES), plain(x, EDGES))
    for module in (layer, plain):
        torch.manual_seed(3)
        module.float().reset_parameters()
    assert_same(layer.double()(x, EDGES), plain.double()(x, EDGES))


STRAIGHT: dict[str, Any] = {"weight": "straight_through"}
SUMS_TO_ONE: dict[str, dict[str, Any]] = {
    "token choice": {"router": "token_choice"},
    "token choice, balanced": {"router": "token_choice", "router_kwargs": {"balance": "bias"}},
    "token choice, a class": {"router": TokenChoice},
    "token choice, a factory": {"router": partial(TokenChoice), "router_kwargs": STRAIGHT},
    "token choice, K = 2": {"router": "token_choice", "k": 2},
    "centroids": {"router": "multi_centroid"},
    "centroids, K = 2": {"router": "multi_centroid", "k": 2},
    "random": {"router": "random"},
    "random, K = 3": {"router": "random", "k": 3},
    "uniform": {"router": "uniform"},
    "oracle": {"router": partial(OracleRouter, assignment=torch.arange(NODES) % 3)},
}
NOT_ONE: dict[str, dict[str, Any]] = {
    "scores": {"router": "token_choice", "router_kwargs": {"weight": "score"}},
    "scores of a factory": {"router": partial(TokenChoice)},
    "capacity": {"router": "token_choice", "router_kwargs": {**STRAIGHT, "capacity_factor": 1.0}},
    "straight-through at K = 2": {"router": "token_choice", "k": 2, "router_kwargs": STRAIGHT},
    "expert choice": {"router": "expert_choice"},
    "votes": {"router": "attention_vote"},
    "centroids that choose": {"router": "multi_centroid", "router_kwargs": {"choice": "experts"}},
}


OF_ONE_KIND = [conv for conv in CONVS if not isinstance(conv, list)]


@pytest.mark.filterwarnings("ignore:.*runs on the whole graph")
@pytest.mark.parametrize(
    ("conv", "router"),
    [
        *((conv, "token choice, K = 2") for conv in OF_ONE_KIND),
        *((GCNConv, router) for router in SUMS_TO_ONE if router != "token choice, K = 2"),
    ],
    ids=ids,
)
def test_copies_give_what_their_conv_gives(conv: Any, router: str) -> None:
    """With the same seed, in training too.

    What is drawn after it, and after a reset, is the same as well.
    """
    (layer, after), (plain, expected) = pair(conv, start="copies", **SUMS_TO_ONE[router])
    assert layer.router.sums_to_one
    assert layer.shared_expert is None
    assert torch.equal(after, expected)
    x = features(NODES, WIDTH)
    for training in (False, True):
        assert_same(layer.train(training)(x, EDGES), plain.train(training)(x, EDGES))
    drawn_next = []
    for module in (layer, plain):
        torch.manual_seed(3)
        module.float().reset_parameters()
        drawn_next.append(torch.rand(1))
    assert torch.equal(*drawn_next)
    assert_same(layer.double()(x, EDGES), plain.double()(x, EDGES))


@pytest.mark.parametrize("router", NOT_ONE)
def test_copies_under_a_router_that_would_scale_them_are_refused(router: str) -> None:
    for build in (
        partial(MoEConv, GCNConv, WIDTH, WIDTH),
        partial(GNNMoE, WIDTH, WIDTH, WIDTH, shared_router=True),
    ):
        with pytest.raises(
            ValueError,
            match=r"^start: got 'copies' with \w+\(k=\d, weight='\w+'\), expected a router",
        ):
            build(num_experts=3, start="copies", **NOT_ONE[router])


def test_token_choice_by_name_does_not_balance_copies() -> None:
    """Since experts without tokens cost nothing there; what a caller says goes first."""

    def router(**options: Any) -> Any:
        return MoEConv(GCNConv, 4, 4, num_experts=3, **options).router

    copies = router(start="copies")
    assert (copies.balance, copies.noise, copies.weight) == (None, True, "straight_through")
    pair_of_experts = router(start="copies", k=2)
    assert (pair_of_experts.balance, pair_of_experts.weight) == (None, "normalized")
    rate: dict[str, Any]
    for rate in ({"bias_rate": 0.2}, {"balance_coef": 0.1, "balance": "switch"}):
        assert router(start="copies", router_kwargs=rate).balance == rate.get("balance", "bias")
    balanced = router(start="copies", router_kwargs={"balance": "bias"})
    assert (balanced.balance, balanced.noise, balanced.weight) == (
        "bias",
        True,
        "straight_through",
    )
    quiet = router(start="copies", router_kwargs={"noise": False, "balance": None})
    assert (quiet.balance, quiet.noise) == (None, False)
    shared = router(start="shared")
    assert (shared.balance, shared.noise, shared.weight) == ("bias", True, "score")


@pytest.mark.parametrize(
    "options",
    [{"start": "shared"}, {"router": "attention_vote"}],
    ids=str,
)
def test_experts_and_router_learn_from_the_second_step_on(options: dict[str, Any]) -> None:
    """The first one's gradient opens the gain."""
    (layer, _), (plain, _) = pair(GCNConv, **options)
    x = features(NODES, WIDTH)
    assert_same(layer.train()(x, EDGES), plain.train()(x, EDGES))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        layer(x, EDGES).sin().sum().backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, name
            assert bool(parameter.grad.any()) == (
                step > 0 or name.startswith(("gain", "shared_expert"))
            ), name
        optimizer.step()


@pytest.mark.parametrize("k", [1, 2])
def test_copies_learn_from_the_first_step_on_and_their_router_from_the_second(k: int) -> None:
    """Of two equal experts, no weight is better than another."""
    (layer, _), _ = pair(GCNConv, start="copies", k=k)
    x = features(NODES, WIDTH)
    optimizer = torch.optim.SGD(layer.train().parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        torch.manual_seed(0)
        layer(x, EDGES).sin().sum().backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, name
            if name.startswith("experts") or step > 0:
                assert parameter.grad.abs().max() > 1e-6, name
        optimizer.step()


@pytest.mark.parametrize(
    "options",
    [
        {
            "shared_router": True,
            "router_input": ("node", "neighbors"),
            "jk": "cat",
            "norm": "batch_norm",
            "start": "shared",
        },
        {
            "conv": ["sage", "gcn", "gat"],
            "router": "expert_choice",
            "residual": "linear",
            "every": 2,
        },
        {"start": "shared"},
        {},
        {"start": "copies", "shared_router": False},
        {"start": "copies", "shared_router": True, "conv": "gat"},
        {"start": "copies", "k": 2, "conv": "sage", "norm": "batch_norm"},
    ],
    ids=ids,
)
def test_a_new_gnn_gives_what_the_dense_one_gives(options: dict[str, Any]) -> None:
    model, after = drawn(lambda: GNNMoE(4, 6, 3, 4, **options))
    dense = {name: value for name, value in options.items() if name not in ("router_kwargs", "k")}
    plain, expected = drawn(lambda: GNNMoE(4, 6, 3, 4, **{**dense, "router": None}))
    assert torch.equal(after, expected)
    x = features(NODES, 4)
    assert_same(model(x, EDGES), plain(x, EDGES))


@pytest.mark.parametrize(
    "options",
    [{"router": "expert_choice"}, {"start": "copies", "router": "token_choice", "k": 2}],
    ids=ids,
)
def test_a_new_vit_gives_what_the_dense_one_gives(options: dict[str, Any]) -> None:
    model, after = drawn(lambda: ViTMoE(FOUR_BLOCKS, **options))
    plain, expected = drawn(lambda: ViTMoE(FOUR_BLOCKS, router=None))
    assert torch.equal(after, expected)
    nn.init.normal_(model.heads[0].weight)  # torchvision's starts at zero
    plain.heads.load_state_dict(model.heads.state_dict())
    images = features(2, 3, 8, 8)
    assert_same(model(images), plain(images))


def test_an_expert_is_what_is_added_for_it() -> None:
    layer: Any = MoEConv("sage", WIDTH, WIDTH, num_experts=3, router=None).double()
    nn.init.constant_(layer.gain, 2.0)
    x, weight_TE = (
        features(NODES, WIDTH),
        torch.eye(3, dtype=torch.float64)[torch.arange(NODES) % 3],
    )
    added = layer(x, EDGES, routing=routing_of(weight_TE)) - layer.shared_expert.expert(0)(x, EDGES)
    found = torch.stack([layer.expert(e)(x, EDGES) for e in range(3)])
    assert_same(added, found[torch.arange(NODES) % 3, torch.arange(NODES)])


def test_experts_follow_the_seed_and_differ() -> None:
    """What leaves torch's generator alone is drawn from it all the same."""
    build = partial(MoEConv, "gcn", 4, 4, start="shared")
    layers = [drawn(lambda: nn.ModuleList([build(), build()]), seed)[0] for seed in (3, 3, 4)]
    first, again, other = (
        [layer.experts.expert(e).lin.weight for layer in pair for e in (0, 1)] for pair in layers
    )
    assert all(map(torch.equal, first, again))
    assert len({weight[0, 0].item() for weight in (*first, *other)}) == 8


def test_a_base_and_its_router_follow_the_seed_and_differ_from_layer_to_layer() -> None:
    build = partial(MoEConv, "gcn", 4, 4, start="copies")
    layers = [drawn(lambda: nn.ModuleList([build(), build()]), seed)[0] for seed in (3, 3, 4)]
    for name in ("experts.lin.weight_base", "router.gate.weight"):
        first, again, other = ([x.get_parameter(name) for x in pair] for pair in layers)
        assert all(map(torch.equal, first, again))
        assert len({weight.flatten()[0].item() for weight in (*first, *other)}) == 4


# what start=None becomes --------------------------------------------------------------------------

OPTION = (bool, int, float, str, type(None))
"""What options of routers are."""


def start_under(router: Any, k: int = 1, kwargs: Any = None, **options: Any) -> str:
    """How layers of three convs start by default in a GNN that routes once."""
    options = {"conv": GCNConv, "num_experts": 3, **options}
    model = GNNMoE(WIDTH, WIDTH, 2, 2, router=router, k=k, router_kwargs=kwargs, **options)
    return str(model.config["start"])


BUILDS: dict[str, Callable[..., nn.Module]] = {
    "MoEConv": lambda **options: MoEConv(GCNConv, WIDTH, WIDTH, num_experts=3, **options),
    "GNNMoE": lambda **options: GNNMoE(WIDTH, WIDTH, 2, 2, num_experts=3, **options),
    "moefy": lambda **options: moefy(
        nn.ModuleDict({"conv": GCNConv(WIDTH, WIDTH)}), targets="conv", num_experts=3, **options
    ),
    "ViTMoE": lambda **options: ViTMoE(FOUR_BLOCKS, num_experts=3, **options),
}


@pytest.mark.parametrize("name", gmoe.ROUTERS)
@pytest.mark.parametrize(
    ("build", "start", "k"),
    [
        # Where a start and K change the router's own defaults, or are refused.
        ("MoEConv", "copies", 1),
        ("MoEConv", "shared", 2),
        # A model decides by the router whether its layers share it.
        ("GNNMoE", None, 2),
        ("moefy", "copies", 1),
        ("ViTMoE", None, 1),
    ],
)
def test_a_router_by_name_and_by_class_is_one_model(
    build: str, name: str, start: Any, k: int
) -> None:
    """Equal options and values, or refused alike."""
    found: list[Any] = []
    for router in (name, gmoe.ROUTERS[name]):
        torch.manual_seed(0)
        try:
            model = BUILDS[build](router=router, k=k, start=start)
        except ValueError as error:
            found.append(str(error))
            continue
        routers = [part for part in model.modules() if isinstance(part, gmoe.Router)]
        options = [
            {key: value for key, value in vars(part).items() if isinstance(value, OPTION)}
            for part in routers
        ]
        assert options
        starts = [part.start for part in model.modules() if isinstance(part, MoELayer)]
        found.append((options, starts, {**model.state_dict()}))
    if isinstance(found[0], str):
        assert found[0] == found[1]
        assert start == "copies"
        return
    assert found[0][:2] == found[1][:2]
    torch.testing.assert_close(found[0][2], found[1][2], rtol=0, atol=0)


def test_a_factory_is_called_for_the_router_alone_and_not_for_the_default() -> None:
    calls = []

    def factory(dim: int, num_experts: int, k: int = 1) -> TokenChoice:
        calls.append(k)
        return TokenChoice(dim, num_experts=num_experts, k=k, weight="straight_through")

    assert start_under(factory) == "shared"
    assert calls == [1]
    assert MoEConv(GCNConv, WIDTH, WIDTH, num_experts=3, router=factory, start="copies").router


@pytest.mark.parametrize(
    ("router", "start"),
    [
        (lambda: TokenChoice(WIDTH, num_experts=3), "shared"),
        (lambda: TokenChoice(WIDTH, num_experts=3, weight="straight_through"), "copies"),
        (lambda: TokenChoice(WIDTH, num_experts=3, k=2), "copies"),
        (lambda: OracleRouter(WIDTH, num_experts=3, assignment=torch.arange(NODES) % 3), "copies"),
        (lambda: gmoe.ExpertChoice(WIDTH, num_experts=3), "shared"),
    ],
)
def test_the_default_under_an_instance_leaves_it_as_it_is(router: Any, start: str) -> None:
    instance = router()
    before, state = dict(vars(instance)), copy.deepcopy(instance.state_dict())
    model: Any = GNNMoE(WIDTH, WIDTH, 2, 2, conv=GCNConv, num_experts=3, router=instance)
    assert model.config["start"] == start
    assert instance in (model.shared_router, model.convs[0].router)
    assert vars(instance) == before
    torch.testing.assert_close(instance.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "start", "shared_router"),
    [
        ({}, "copies", True),
        ({"k": 2}, "copies", True),
        ({"shared_router": False}, "shared", False),
        ({"start": "copies", "shared_router": False}, "copies", False),
        ({"conv": "le"}, "shared", False),
        ({"start": "copies"}, "copies", True),
        ({"start": "shared"}, "shared", False),
        ({"start": "shared", "shared_router": True}, "shared", True),
        ({"start": "plain"}, "plain", False),
        ({"router": "expert_choice"}, "shared", False),
        ({"router_kwargs": {"weight": "score"}}, "shared", False),
        ({"conv": ["gcn", "sage", "gat"], "num_experts": None}, "shared", False),
        ({"conv": ["gcn"] * 3, "num_experts": None}, "copies", True),
        ({"router": None}, "shared", False),
    ],
    ids=str,
)
def test_a_gnn_decides_once_where_its_layers_start_as_copies(
    options: dict[str, Any], start: str, shared_router: bool
) -> None:
    """And records what it became, so that a model that is loaded is the one that was saved."""
    model: Any = GNNMoE(WIDTH, 8, 2, 3, **{"num_experts": 3, **options})
    moe_layers = [conv for conv in model.convs if isinstance(conv, MoEConv)]
    assert {layer.start for layer in moe_layers} == ({start} if moe_layers else set())
    assert (model.shared_router is not None) == shared_router
    assert all((layer.router is None) == shared_router for layer in moe_layers)
    assert model.config["start"] == start
    assert model.config["shared_router"] == shared_router
    again: Any = GNNMoE(**model.config)
    again.load_state_dict(model.state_dict())
    assert again.config == model.config


def of_vit(**options: Any) -> Any:
    return ViTMoE(FOUR_BLOCKS, router="token_choice", num_experts=3, **options)


DOORS: dict[str, tuple[Callable[..., Any], str]] = {
    "MoEConv": (partial(MoEConv, GCNConv, WIDTH, WIDTH, num_experts=3), "shared"),
    "GNNMoE": (partial(GNNMoE, WIDTH, WIDTH, 2, 2, num_experts=3), "copies"),
    "ViTMoE": (of_vit, "shared"),
    "moefy, MLPs": (lambda **options: moefy(ViTMoE(FOUR_BLOCKS, router=None), **options), "shared"),
    "moefy, convs": (
        lambda **options: moefy(nn.Sequential(GCNConv(WIDTH, WIDTH)), targets="0", **options),
        "shared",
    ),
}
"""What builds layers, and how they start if nobody says."""


@pytest.mark.parametrize("start", [None, "copies", "shared", "plain"])
@pytest.mark.parametrize("door", DOORS)
def test_every_layer_knows_how_it_started(door: str, start: Any) -> None:
    build, default = DOORS[door]
    layers = [part for part in build(start=start).modules() if isinstance(part, MoELayer)]
    assert layers
    assert {layer.start for layer in layers} == {start or default}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_refuses_an_unknown_start(door: str) -> None:
    build, _ = DOORS[door]
    with pytest.raises(ValueError, match=r"^start: got 'warm', expected one of 'copies', 'shared'"):
        build(start="warm")
