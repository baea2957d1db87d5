"""Experts that are taken away: dead ones without a change, weak ones by their importance."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch_geometric.nn import GATConv, GCNConv

import gmoe
from gmoe import MoEConv
from gmoe.from_base import FromBase
from gmoe.routers import TokenChoice
from gmoe.shrink import groups_of, keep_experts, take
from tests.gmoe.test_convert import images, timm_vit

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
    "mlp": "mlp",
    "one by one": "film",
    "filters": ["identity", "low_pass", "two_hop", "high_pass"] * 2,
    "several kinds": ["gcn", "sage", "gat", "mlp", "gcn", "film", "gin", "low_pass"],
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


def assert_same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def assert_has(layer: Any, number: int) -> None:
    """The layer, its router and all stacked tensors have this number of experts."""
    assert layer.num_experts == number
    assert layer.router.num_experts == number
    routed = layer.experts.differences if isinstance(layer.experts, FromBase) else layer.experts
    for part in routed.modules():
        if isinstance(part, gmoe.LinearExperts):
            assert len(part.weight) == part.num_experts


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("router", BY_TOKEN)
@pytest.mark.parametrize("start", ["shared", "copies", "plain"])
@pytest.mark.parametrize("conv", CONVS)
def test_without_dead_experts_a_conv_gives_the_same(
    conv: str, start: str, router: str, k: int
) -> None:
    if start == "copies" and isinstance(CONVS[conv], list):
        pytest.skip("convs of several kinds are no copies")
    layer = conv_layer(CONVS[conv], start, router, k, **BY_TOKEN[router])
    x = X[: NODES // k + 1]  # too few tokens for all experts
    edges = EDGES[:, EDGES.amax(dim=0) < len(x)]
    expected = layer(x, edges)
    experts = [layer.expert(index)(x, edges) for index in range(EXPERTS)]

    pruned = gmoe.prune(layer, (x, edges))
    (report,) = pruned.layers
    assert k <= len(report.kept) < EXPERTS
    assert all(report.load[expert] > 0 for expert in report.kept[k:])
    assert_has(layer, len(report.kept))
    assert_same(layer(x, edges), expected)
    assert pruned.change < 1e-12
    for number, expert in enumerate(report.kept):
        assert_same(layer.expert(number)(x, edges), experts[expert])

    # What stays is trained, all of it.
    layer.train()(x, edges).square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.experts.parameters())


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("router", BY_TOKEN)
@pytest.mark.parametrize("start", ["shared", "copies", "plain"])
def test_without_dead_experts_a_vit_gives_the_same(start: Any, router: str, k: int) -> None:
    model = moefied(start=start, router=router, k=k, router_kwargs=BY_TOKEN[router])
    x = images(1)
    with torch.no_grad():  # a gate that leaves experts dead
        for layer in model.modules():
            if isinstance(layer, TokenChoice):
                layer.gate.weight[5:] = layer.gate.weight[0] * 0.1
    expected = model(x)
    pruned = gmoe.prune(model, x)
    assert any(len(report.kept) < EXPERTS for report in pruned.layers)
    assert_same(model(x), expected)
    gmoe.prune(model, x)  # nothing is left to remove
    assert_same(model(x), expected)


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


def test_a_fraction_keeps_the_most_important_of_all_layers() -> None:
    model = moefied()
    x = images(4)
    pruned = gmoe.prune(copy.deepcopy(model), x, keep=0.5)
    numbers = [len(layer.kept) for layer in pruned.layers]
    assert sum(numbers) <= EXPERTS
    weakest = min(layer.importance[e] for layer in pruned.layers for e in layer.kept[1:] or [0])
    for layer in pruned.layers:
        assert sum(layer.importance) == pytest.approx(1)
        best = max(range(EXPERTS), key=lambda expert: layer.importance[expert])
        assert best in layer.kept
        others = [layer.importance[e] for e in range(EXPERTS) if e not in layer.kept]
        if sum(numbers) == EXPERTS:
            assert max(others) <= max(weakest, min(layer.importance[e] for e in layer.kept))
    assert 0 < pruned.change < 1
    assert "relative change" in str(pruned)


def test_importance_is_load_times_mean_score() -> None:
    layer = conv_layer("gcn", "plain", "token_choice", 2)
    _, routing = layer(X, EDGES, return_routing=True)
    (report,) = gmoe.prune(layer, [(X, EDGES), (X, EDGES)], keep=1.0).layers
    mean_E = torch.stack(
        [routing.scores[routing.token[routing.expert == e], e].mean() for e in range(EXPERTS)]
    )
    product_E = (routing.load * mean_E).nan_to_num()
    found = torch.tensor([report.importance, report.load], dtype=torch.float64)
    load_E = routing.load.double()
    assert_same(found, torch.stack([product_E / product_E.sum(), load_E / load_E.sum()]))


def test_a_number_for_each_layer() -> None:
    model = moefied()
    pruned = gmoe.prune(model, images(8), keep=[2, 3])
    assert [len(layer.kept) for layer in pruned.layers] == [2, 3]
    pruned = gmoe.prune(model, images(8), keep=1)
    assert [len(layer.kept) for layer in pruned.layers] == [1, 1]


@pytest.mark.parametrize("keep", [0, 9, 0.0, 1.5, 0.05, [2], [2, 0], True, "all"])
def test_a_keep_out_of_range_is_refused_and_changes_nothing(keep: Any) -> None:
    model = moefied()
    expected = model(images())
    with pytest.raises((ValueError, TypeError), match="keep"):
        gmoe.prune(model, images(), keep=keep)
    assert_same(model(images()), expected)


def test_a_shared_router_and_its_layers_shrink_together() -> None:
    torch.manual_seed(0)
    model = moved(gmoe.GNNMoE(WIDTH, 6, 3, 3, conv="sage", num_experts=EXPERTS).double())
    assert model.shared_router is not None
    expected = model(X, EDGES)
    pruned = gmoe.prune(model, (X, EDGES))
    (report,) = pruned.layers
    assert report.names == ("convs.0", "convs.1")
    assert {conv.num_experts for conv in model.convs[:2]} == {len(report.kept)}
    assert model.shared_router.num_experts == len(report.kept) < EXPERTS
    assert_same(model(X, EDGES), expected)
    model.train()(X, EDGES).square().sum().backward()


def test_edge_weights_are_still_taken_when_no_expert_reads_them() -> None:
    torch.manual_seed(0)
    layer = MoEConv(["identity", "gcn", "mlp"], WIDTH, WIDTH, start="plain", router="uniform")
    layer = moved(layer.double())
    weight = torch.rand(EDGES.size(1), dtype=torch.float64)
    groups_of(layer)[0].keep((2,))
    assert_same(layer(X, EDGES, edge_weight=weight), layer.expert(0)(X, EDGES))


def test_balance_goes_on_after_pruning() -> None:
    """The bias of kept experts, and steps of training that move it."""
    torch.manual_seed(0)
    layer: Any = MoEConv(GCNConv, WIDTH, WIDTH, num_experts=EXPERTS).double()
    for _ in range(3):
        layer(X, EDGES)
    router: Any = layer.router
    bias_E = router.next_bias_E.clone()
    gmoe.prune(layer, (X, EDGES), keep=3)
    kept = layer.kept
    assert kept is not None
    assert torch.equal(router.next_bias_E, bias_E[list(kept)])
    layer.train()
    for _ in range(3):
        layer(X, EDGES).square().sum().backward()
    assert router.next_bias_E.isfinite().all()


class Mine(gmoe.Router):
    """Somebody's own."""

    def reset_parameters(self) -> None: ...

    def route(self, x_TD: Tensor, group: Any, edge_index: Any) -> gmoe.Routing:
        zeros_T1 = torch.zeros(len(x_TD), 1, dtype=torch.long)
        return gmoe.Routing.from_choices(
            zeros_T1, x_TD.new_ones(len(x_TD), 1), num_experts=self.num_experts
        )


def test_what_cannot_be_pruned_is_refused_and_left_as_it_was() -> None:
    experts = gmoe.MLPExperts(WIDTH, 6, WIDTH, num_experts=EXPERTS)
    slots = gmoe.SoftMoE(gmoe.SoftSlots(WIDTH, num_experts=EXPERTS), experts)
    mine = gmoe.MoE(Mine(WIDTH, num_experts=EXPERTS), experts)
    bound = moefied()
    parametrizations.weight_norm(bound.blocks[1].mlp.experts.down)
    without = MoEConv("gcn", WIDTH, WIDTH, router=None)
    assigned = gmoe.OracleRouter(WIDTH, num_experts=EXPERTS, assignment=torch.arange(NODES))
    oracle = gmoe.MoE(assigned, gmoe.MLPExperts(WIDTH, 6, WIDTH, num_experts=EXPERTS))
    with pytest.raises(ValueError, match="SoftSlots, of which no expert"):
        groups_of(slots)[0].keep((0, 1))
    with pytest.raises(ValueError, match="Mine, of which no expert"):
        gmoe.prune(mine, X.float())
    with pytest.raises(ValueError, match="parametrized"):
        gmoe.prune(bound, images(1), keep=2)
    with pytest.raises(ValueError, match="MoEConv without one router"):
        gmoe.prune(without, (X.float(), EDGES))
    with pytest.raises(ValueError, match=r"^keep: got an oracle"):
        gmoe.prune(oracle, X.float(), keep=2)
    with pytest.raises(ValueError, match=r"^model: got Linear without layers"):
        gmoe.prune(nn.Linear(2, 2), torch.zeros(1, 2))
    for layer in (slots, mine, oracle):
        assert len(layer.experts.up.weight) == EXPERTS


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
