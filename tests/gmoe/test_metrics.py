"""RoutingStats counts as a slow loop does.

``test_distributed.py`` has several processes. Shapes: T tokens, E experts.
"""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gmoe import ROUTERS, Routing, RoutingStats, build_router


def counted_slowly(routings: list[Routing]) -> dict[str, Any]:
    """Of the routings of one layer, pair by pair and token by token."""
    pairs = [
        pair for r in routings for pair in zip(r.expert.tolist(), r.weight.tolist(), strict=True)
    ]
    weights = [
        [weight for e, weight in pairs if e == expert] for expert in range(routings[0].num_experts)
    ]
    tokens, dropped = sum(r.num_tokens for r in routings), sum(int(r.dropped) for r in routings)
    covered, entropy = sum(len(set(r.token.tolist())) for r in routings), 0.0
    for row in [row for r in routings for row in r.scores.tolist()]:
        entropy -= sum(score / sum(row) * math.log(score / sum(row)) for score in row if score > 0)
    return {
        "load": [len(mine) / max(len(pairs), 1) for mine in weights],
        "weight": [sum(mine) / max(len(mine), 1) for mine in weights],
        "coverage": covered / tokens if tokens else 1.0,
        "experts_per_token": len(pairs) / max(tokens, 1),
        "entropy": entropy / max(tokens, 1),
        "dropped": dropped / max(dropped + len(pairs), 1),
        "dead": weights.count([]),
    }


def check(found: dict[str, Tensor], expected: dict[str, Any]) -> None:
    """Of one expert, numbers."""
    assert list(found) == list(expected)
    for name, value in expected.items():
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        assert found[name].tolist() == pytest.approx(value, abs=1e-5), name


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(list(ROUTERS)),
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    experts=st.integers(1, 3),
    capacity=st.booleans(),
)
def test_counts_as_a_slow_loop_does(
    name: str, sizes: list[int], experts: int, capacity: bool
) -> None:
    """Two layers, of other numbers of experts."""
    options = {"capacity_factor": 0.5} if capacity and name == "token_choice" else {}
    routers = [
        build_router(name, 4, num_experts=number, k=1, kwargs=options) for number in (experts, 2)
    ]
    stats, steps = (
        RoutingStats(num_experts=[experts, 2]),
        [[router(torch.randn(size, 4)) for router in routers] for size in sizes],
    )
    for routings in steps:
        stats.update(routings)
    for kept in (stats, pickle.loads(pickle.dumps(stats))):
        for layer, found in enumerate(kept.compute()):
            check(found, counted_slowly([routings[layer] for routings in steps]))
    stats.reset()
    assert stats.load.sum() == 0


@pytest.mark.parametrize("experts", [(), 0, (2, -1), 4.0], ids=str)
def test_bad_numbers_of_experts(experts: Any) -> None:
    with pytest.raises(ValueError, match=r"num_experts: got (no layers|0|-1|4\.0)"):
        RoutingStats(num_experts=experts)
    assert RoutingStats(num_experts=np.int64(4)).num_experts == (4,)


def test_other_layers_are_refused() -> None:
    routing = build_router("token_choice", 4, num_experts=3, k=1)(torch.randn(5, 4))
    for experts, routings in ((3, [routing, routing]), (4, routing)):
        with pytest.raises(ValueError, match=r"routings: got layers of \(3,"):
            RoutingStats(num_experts=experts).update(routings)
    by_type: Any = {"paper": routing}
    with pytest.raises(ValueError, match=r"^routings: got a dictionary, expected its values"):
        RoutingStats(num_experts=3).update(by_type)
    with pytest.raises(ValueError, match="model: got Linear without a router"):
        RoutingStats.of(nn.Linear(2, 2))
