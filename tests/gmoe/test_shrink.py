"""What routers and experts keep of the experts that stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gmoe
from gmoe.layer_groups import groups_of
from gmoe.shrink import keep_experts, take
from tests.gmoe.shrunk import (
    EDGES,
    EXPERTS,
    NODES,
    WIDTH,
    X,
    assert_has,
    assert_same,
    conv_layer,
    moefied,
    moved,
)
from tests.gmoe.test_convert import images


def test_weights_of_a_softmax_would_change_without_the_removed_columns() -> None:
    """So the router keeps them; of other weightings it does not."""
    layer = conv_layer("gcn", "plain", "token_choice", 1)
    expected = layer(X, EDGES)
    gmoe.prune(layer, (X, EDGES))
    assert_same(layer(X, EDGES), expected)
    removed, layer.router.removed = layer.router.removed, None
    assert len(removed.weight) == EXPERTS - layer.num_experts
    assert not torch.allclose(layer(X, EDGES), expected)
    straight = conv_layer("gcn", "plain", "token_choice", 1, weight="straight_through")
    gmoe.prune(straight, (X, EDGES))
    assert straight.router.removed is None


@pytest.mark.parametrize(
    ("router", "options"),
    [
        ("expert_choice", {}),
        ("expert_choice", {"normalize": "tokens"}),
        ("expert_choice", {"inference": "threshold"}),
        ("attention_vote", {}),
        ("attention_vote", {"shared_queries": True}),
        ("multi_centroid", {"choice": "experts"}),
        ("multi_centroid", {"choice": "experts", "normalize": "tokens"}),
        ("multi_centroid", {"weight": "score"}),
        ("random", {"weight": "score"}),
        ("token_choice", {"weight": "score", "balance": "importance_load"}),
    ],
)
@pytest.mark.parametrize("k", [1, 2])
def test_what_kept_experts_take_and_weigh_stays(
    router: str, options: dict[str, Any], k: int
) -> None:
    """Where experts choose, or weights are scores: the mixture without the others."""
    torch.manual_seed(0)
    layer = gmoe.MoE(
        gmoe.build_router(router, WIDTH, num_experts=EXPERTS, k=k, kwargs=options),
        gmoe.MLPExperts(WIDTH, 6, WIDTH, num_experts=EXPERTS),
    ).double()
    layer(X)  # in training, for thresholds
    layer = moved(layer)
    by_token = router in ("token_choice", "random") or options == {"weight": "score"}
    _, before = layer(X, return_routing=True)
    kept = (1, 2, 4, 6)
    (group,) = groups_of(layer)
    group.keep(kept)
    _, after = layer(X, return_routing=True)
    assert_has(layer, len(kept))
    assert_same(after.scores, before.scores[:, kept])
    if not by_token:
        dense_TE = before.to_dense()[:, kept]
        along_tokens = router == "attention_vote" or options.get("normalize") == "tokens"
        if along_tokens:  # weights are relative to the mean of all chosen pairs
            dense_TE = dense_TE * (after.weight.sum() / dense_TE.sum())
        assert_same(after.to_dense(), dense_TE)
    layer.train()
    (layer(X).square().sum() + gmoe.aux_loss(layer(X, return_routing=True)[1])).backward()


class Counted(gmoe.Router):
    """Somebody's own that says how it is pruned: a learned score for each expert."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__(dim, num_experts=num_experts)
        self.score_E = nn.Parameter(torch.linspace(0, 1, num_experts))

    def reset_parameters(self) -> None: ...

    def route(self, x_TD: Tensor, group: Any, edge_index: Any) -> gmoe.Routing:
        expert_T1 = self.score_E.argmax().expand(len(x_TD), 1)
        return gmoe.Routing.from_choices(
            expert_T1, x_TD.new_ones(expert_T1.shape), num_experts=self.num_experts
        )


@keep_experts.register
def _counted(router: Counted, kept: Any) -> None:
    take(router, "score_E", kept)
    router.num_experts = len(kept)


def test_a_router_of_your_own_says_how_it_is_pruned() -> None:
    experts = gmoe.MLPExperts(WIDTH, 6, WIDTH, num_experts=EXPERTS)
    layer = gmoe.MoE(Counted(WIDTH, num_experts=EXPERTS), experts).double()
    expected = layer(X)
    assert gmoe.prune(layer, X).layers[0].kept == (EXPERTS - 1,)
    assert_same(layer(X), expected)


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
        gmoe.prune(layer, torch.randn(9, WIDTH), keep=2)
    assert layer.num_experts == EXPERTS


def test_dead_experts_of_an_oracle_go() -> None:
    layer = gmoe.MoE(
        gmoe.OracleRouter(WIDTH, num_experts=EXPERTS, assignment=torch.tensor([2, 2, 5, 7, 5])),
        gmoe.MLPExperts(WIDTH, 6, WIDTH, num_experts=EXPERTS),
    ).double()
    expected = layer(X)
    assert gmoe.prune(layer, X).layers[0].kept == (2, 5, 7)
    assert_same(layer(X), expected)


def test_uniform_experts_are_averaged_over_those_that_stay() -> None:
    layer = gmoe.MoE(
        gmoe.UniformRouter(WIDTH, num_experts=EXPERTS),
        gmoe.MLPExperts(WIDTH, 6, WIDTH, num_experts=EXPERTS),
    ).double()
    _, routing = layer(X, return_routing=True)
    assert routing.num_experts == EXPERTS
    gmoe.prune(layer, X, keep=2)
    _, routing = layer(X, return_routing=True)
    assert_same(routing.to_dense(), torch.full((NODES, 2), 0.5, dtype=torch.float64))


def test_pruning_twice_is_pruning_once() -> None:
    x = images(2)
    once, twice = moefied(), moefied()
    for model, steps in ((once, [(1, 4)]), (twice, [(1, 3, 4, 6), (0, 2)])):
        for group in groups_of(model):
            for kept in steps:
                group.keep(kept)
    assert_same(twice(x), once(x))
    (layer, *_) = [part for part in twice.modules() if isinstance(part, gmoe.MoE)]
    assert layer.kept == (1, 4)
