"""Convs without the experts that were taken away give what they gave."""

from __future__ import annotations

import pytest
import torch

from gmoe import MoEConv
from tests.helpers.equal import assert_same
from tests.helpers.shrunk import (
    BY_TOKEN,
    CONVS,
    EDGES,
    EXPERTS,
    NODES,
    WIDTH,
    X,
    assert_has,
    conv_layer,
    moved,
    pruned_on,
)

ROUTED = [(router, k) for router in BY_TOKEN for k in (1, 2)]

DEAD = [
    *((conv, "shared", "token_choice", 1) for conv in CONVS),
    # Differences from a base are kept as weights are, of a map, a network and attention.
    *((conv, "copies", "token_choice", 1) for conv in ("gcn", "gin", "gat")),
    ("gat", "plain", "token_choice", 1),
    # What a router learns and how many it picks.
    *(("gat", "shared", *routed) for routed in ROUTED[1:]),
    ("several kinds", "shared", *ROUTED[-1]),
]


@pytest.mark.parametrize(("conv", "start", "router", "k"), DEAD)
def test_without_dead_experts_a_conv_gives_the_same(
    conv: str, start: str, router: str, k: int
) -> None:
    layer = conv_layer(CONVS[conv], start, router, k, **BY_TOKEN[router])
    x = X[: NODES // k + 1]  # too few tokens for all experts
    edges = EDGES[:, EDGES.amax(dim=0) < len(x)]
    expected = layer(x, edges)
    experts = [layer.expert(index)(x, edges) for index in range(EXPERTS)]

    (kept,) = pruned_on(layer, x, edges).values()
    assert k <= len(kept) < EXPERTS
    assert_has(layer, len(kept))
    assert_same(layer(x, edges), expected)
    for number, expert in enumerate(kept):
        assert_same(layer.expert(number)(x, edges), experts[expert])

    # What stays is trained, all of it.
    layer.train()(x, edges).square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.experts.parameters())


def test_edge_weights_are_still_taken_when_no_expert_reads_them() -> None:
    torch.manual_seed(0)
    layer = MoEConv(["graph", "gcn", "sage"], WIDTH, WIDTH, start="plain", router="random")
    layer = moved(layer.double())
    weight = torch.rand(EDGES.size(1), dtype=torch.float64)
    layer.keep((2,))
    assert_same(layer(X, EDGES, edge_weight=weight), layer.expert(0)(X, EDGES))
