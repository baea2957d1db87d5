"""What routers and experts keep of the experts that stay."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gmoe
from gmoe import MoEConv
from gmoe.routers import build_router
from tests.helpers.equal import assert_same
from tests.helpers.shrunk import (
    EDGES,
    EXPERTS,
    WIDTH,
    X,
    assert_has,
    moefied,
    moved,
    pruned_on,
)
from tests.helpers.vits import images


@pytest.mark.parametrize(
    ("router", "options"),
    [
        ("expert_choice", {}),
        ("expert_choice", {"inference": "threshold"}),
        ("attention_vote", {}),
        ("multi_centroid", {"choice": "experts"}),
        ("multi_centroid", {"weight": "score"}),
        ("random", {"weight": "score"}),
        ("token_choice", {"weight": "score", "balance": "switch"}),
    ],
)
@pytest.mark.parametrize("k", [1, 2])
def test_what_kept_experts_take_and_weigh_stays(
    router: str, options: dict[str, Any], k: int
) -> None:
    """Where experts choose, or weights are scores: the mixture without the others."""
    torch.manual_seed(0)
    layer = gmoe.MoE(
        build_router(router, WIDTH, num_experts=EXPERTS, k=k, kwargs=options),
        gmoe.MLPExperts(WIDTH, 6, WIDTH, num_experts=EXPERTS),
    ).double()
    layer(X)  # in training, for thresholds
    layer = moved(layer)
    by_token = not layer.router.experts_choose
    _, before = layer(X, return_routing=True)
    kept = (1, 2, 4, 6)
    layer.keep(kept)
    _, after = layer(X, return_routing=True)
    assert_has(layer, len(kept))
    assert_same(after.scores, before.scores[:, kept])
    if by_token:  # the best of those that stay, with the weights that they had
        scores_TK, expert_TK = before.scores[:, kept].topk(k)
        assert_same(
            after.to_dense(), torch.zeros_like(after.scores).scatter(1, expert_TK, scores_TK)
        )
        assert layer.experts_per_token == k
    else:
        assert torch.equal(after.load, before.load[list(kept)])
        assert layer.experts_per_token == k * len(kept) / EXPERTS
        dense_TE = before.to_dense()[:, kept]
        if router == "attention_vote":  # weights are relative to the mean of all chosen pairs
            dense_TE = dense_TE * (after.weight.sum() / dense_TE.sum())
        assert_same(after.to_dense(), dense_TE)
    layer.train()
    (layer(X).square().sum() + gmoe.aux_loss(layer(X, return_routing=True)[1])).backward()


CHOSEN_BY: dict[str, dict[str, Any]] = {
    "token_choice": {},
    "expert_choice": {"inference": "threshold"},
    "attention_vote": {"head_dim": 4},
    "multi_centroid": {},
    "random": {},
}
"""Routers, each with an option that gives it a buffer of each expert, if it has one."""


def pruned_layer(router: str, kept: tuple[int, ...] = (1, 2, 6), options: Any = None) -> Any:
    torch.manual_seed(0)
    options = CHOSEN_BY[router] if options is None else options
    layer = gmoe.MoE(
        build_router(router, WIDTH, num_experts=EXPERTS, k=1, kwargs=options),
        gmoe.MLPExperts(WIDTH, 6, WIDTH, num_experts=EXPERTS),
    ).double()
    layer(X)
    layer.keep(kept)
    return layer.eval()


@pytest.mark.parametrize("router", CHOSEN_BY)
def test_what_scores_stays_whole_and_a_state_says_who_is_left(router: str) -> None:
    layer, other = pruned_layer(router), pruned_layer(router, (0, 3, 5))
    options = CHOSEN_BY[router]
    whole = gmoe.ROUTERS[router](WIDTH, num_experts=EXPERTS, **options)
    assert {name: value.shape for name, value in layer.router.named_parameters()} == {
        name: value.shape for name, value in whole.named_parameters()
    }
    other.load_state_dict(layer.state_dict())
    assert other.router.alive_E.tolist() == [1, 2, 6]
    assert_same(other(X), layer(X))
    other.keep((0, 2))
    assert other.router.alive_E.tolist() == [1, 6]
    with pytest.raises(RuntimeError, match="alive_E"):
        whole.load_state_dict(layer.router.state_dict())


@pytest.mark.parametrize("router", CHOSEN_BY)
def test_a_pruned_router_is_drawn_anew_where_its_values_were_lost(router: str) -> None:
    layer = pruned_layer(router)
    layer.to("meta").to_empty(device="cpu").reset_parameters()
    assert layer.router.alive_E.tolist() == [1, 2, 6]
    _, routing = layer.train()(X, return_routing=True)
    assert routing.num_experts == 3


@pytest.mark.parametrize(
    "router",
    [
        "token_choice",
        pytest.param("expert_choice", marks=pytest.mark.slow),
        pytest.param("attention_vote", marks=pytest.mark.slow),
    ],
)
def test_a_pruned_layer_is_compiled_and_exported(router: str) -> None:
    layer = pruned_layer(router, options={})
    expected = layer(X)
    assert_same(torch.compile(layer, fullgraph=True, backend="eager")(X), expected)
    assert_same(torch.export.export(layer, (X,)).module()(X), expected)


def test_centroids_of_experts_that_are_gone_stay_where_they_were() -> None:
    router = pruned_layer("multi_centroid").router
    before = router.centroid.clone()
    router.init_from_data(torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(0)))
    has_moved = (router.centroid != before).flatten(1).any(dim=1)
    assert has_moved.nonzero().flatten().tolist() == [1, 2, 6]


class Counted(gmoe.Router):
    """Somebody's own that says how it is pruned: a learned score for each expert."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__(dim, num_experts=num_experts)
        self.score_E = nn.Parameter(torch.linspace(0, 1, num_experts))

    def reset_parameters(self) -> None: ...

    def keep(self, kept: Any) -> None:
        super().keep(kept)
        self.score_E = nn.Parameter(self.score_E.detach()[list(kept)])

    def route(self, x_TD: Tensor, group: Any, edge_index: Any) -> gmoe.Routing:
        expert_T1 = self.score_E.argmax().expand(len(x_TD), 1)
        return gmoe.Routing.from_choices(
            expert_T1, x_TD.new_ones(expert_T1.shape), num_experts=self.num_experts
        )


class Masked(Counted):
    """The same, which chooses among those that are left of what it scores."""

    def keep(self, kept: Any) -> None:
        gmoe.Router.keep(self, kept)

    def route(self, x_TD: Tensor, group: Any, edge_index: Any) -> gmoe.Routing:
        expert_T1 = self.of_alive(self.score_E).argmax().expand(len(x_TD), 1)
        return gmoe.Routing.from_choices(
            expert_T1, x_TD.new_ones(expert_T1.shape), num_experts=self.num_experts
        )


@pytest.mark.parametrize("own", [Counted, Masked])
def test_a_router_of_your_own_says_how_it_is_pruned(own: Any) -> None:
    experts = gmoe.MLPExperts(WIDTH, 6, WIDTH, num_experts=EXPERTS)
    layer: Any = gmoe.MoE(own(WIDTH, num_experts=EXPERTS), experts).double()
    expected = layer(X)
    assert pruned_on(layer, X) == {"": (EXPERTS - 1,)}
    assert_same(layer(X), expected)
    assert len(layer.router.score_E) == (EXPERTS if own is Masked else 1)


class Residual(gmoe.MLPExperts):
    """Experts of one's own that add what they see."""

    def rows(self, x_PI: Tensor, offsets: Tensor) -> Tensor:
        return x_PI + super().rows(x_PI, offsets)


class Tempered(gmoe.TokenChoice):
    """A router of one's own with another weight for each expert."""


@pytest.mark.parametrize("own", [Residual, Tempered])
def test_nothing_is_known_of_subclasses(own: Any) -> None:
    """They may compute something else, of weights that their base does not have."""
    experts: Any = Residual if own is Residual else gmoe.MLPExperts
    router: Any = Tempered if own is Tempered else gmoe.TokenChoice
    layer = gmoe.MoE(
        router(WIDTH, num_experts=EXPERTS), experts(WIDTH, 6, WIDTH, num_experts=EXPERTS)
    )
    with pytest.raises(ValueError, match=f"^model: got {own.__name__}, of which no expert"):
        layer.keep((0, 1))
    assert layer.num_experts == EXPERTS


def test_of_baselines_that_know_all_experts_none_is_taken_away() -> None:
    oracle = partial(gmoe.OracleRouter, assignment=torch.tensor([2, 2, 5, 7, 5]))
    for router in (oracle, gmoe.UniformRouter):
        experts = gmoe.MLPExperts(WIDTH, 6, WIDTH, num_experts=EXPERTS)
        layer = gmoe.MoE(router(WIDTH, num_experts=EXPERTS), experts)
        with pytest.raises(ValueError, match=r"^model: got .*Router, of which no expert"):
            layer.keep((2, 5, 7))
        assert layer.num_experts == layer.experts.num_experts == EXPERTS


KEEPERS: dict[str, tuple[Callable[[], Any], int]] = {
    "a layer": (lambda: MoEConv("gcn", WIDTH, WIDTH, num_experts=EXPERTS), 1),
    "without a router": (lambda: MoEConv("gcn", WIDTH, WIDTH, num_experts=EXPERTS, router=None), 1),
    "a router": (lambda: gmoe.TokenChoice(WIDTH, num_experts=EXPERTS, k=2), 2),
}
"""What keeps experts, and how many at least."""


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("a router", (0,)),
        *((name, kept) for name in KEEPERS for kept in ((), (1, 1), (3, 2), (0, EXPERTS), (-1, 0))),
    ],
)
def test_k_experts_at_least_that_are_there_are_kept_and_each_once(name: str, kept: Any) -> None:
    build, k = KEEPERS[name]
    one = build()
    before = copy.deepcopy(one.state_dict())
    message = rf"^kept: got \[.*\], expected k={k} or more of 0 to 7, asc"
    with pytest.raises(ValueError, match=message):
        one.keep(kept)
    assert one.num_experts == EXPERTS
    assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())


def test_a_layer_without_a_router_shrinks_for_the_routings_of_a_router_that_does() -> None:
    torch.manual_seed(0)
    model = moved(gmoe.GNNMoE(WIDTH, 6, 3, 3, conv="sage", num_experts=EXPERTS).double())
    for conv in model.convs[:2]:
        conv.keep((1, 4, 6))
    with pytest.raises(ValueError, match=r"^routing: got .*8 experts.* and 3 experts"):
        model(X, EDGES)
    model.shared_router.keep((1, 4, 6))
    _, (routing,) = model(X, EDGES, return_routing=True)
    assert routing.num_experts == 3
    assert model.convs[0].kept == (1, 4, 6)


def test_a_capacity_in_training_stays_as_it_was() -> None:
    """Of all tokens, an expert takes the share that it took among all experts."""
    router = gmoe.TokenChoice(WIDTH, num_experts=8, capacity_factor=1.0, balance=None).double()
    x = torch.ones(80, WIDTH, dtype=torch.float64)  # all choose one expert
    before = router(x).load.max()
    router.keep((*range(4),))
    assert router(x).load.max() == before == 10


class OwnExperts(gmoe.Experts):
    """Experts of a user's own, which nobody told how to shrink."""

    def reset_parameters(self) -> None:
        raise NotImplementedError

    def rows(self, x_PI: Tensor, offsets_E: Tensor) -> Tensor:
        raise NotImplementedError


def test_experts_with_a_part_that_cannot_be_cut_are_left_whole() -> None:
    experts = gmoe.MLPExperts(WIDTH, 6, WIDTH, num_experts=EXPERTS)
    experts.down = nn.Linear(6, WIDTH)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"^model: got experts with a Linear in place"):
        experts.keep((0, 1))
    assert experts.up.num_experts == len(experts.up.weight) == EXPERTS
    other = gmoe.MLPExperts(WIDTH, 6, WIDTH, num_experts=EXPERTS)
    nn.utils.parametrize.register_parametrization(other.down, "weight", nn.Identity())
    with pytest.raises(ValueError, match="parametrized weight"):
        other.keep((0, 1))
    assert len(other.up.weight) == EXPERTS
    conv: Any = MoEConv("gcn", WIDTH, 6, num_experts=EXPERTS)
    conv.experts.lin = nn.Linear(WIDTH, 6)
    with pytest.raises(ValueError, match=r"^model: got experts with a Linear in place"):
        conv.keep((0, 1))
    own = OwnExperts(WIDTH, 6, num_experts=EXPERTS)
    with pytest.raises(
        ValueError, match=r"^model: got OwnExperts, of which no expert can be taken away"
    ):
        own.check_kept((0, 1))


def test_pruning_twice_is_pruning_once() -> None:
    x = images(2)
    once, twice = moefied(), moefied()
    for model, steps in ((once, [(1, 4)]), (twice, [(1, 3, 4, 6), (0, 2)])):
        for layer in model.modules():
            for kept in steps if isinstance(layer, gmoe.MoE) else ():
                layer.keep(kept)
    assert_same(twice(x), once(x))
    (layer, _) = [part for part in twice.modules() if isinstance(part, gmoe.MoE)]
    assert layer.kept == (1, 4)
    assert layer.router.alive_E.tolist() == [1, 4]
