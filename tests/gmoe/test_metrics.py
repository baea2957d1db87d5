"""RoutingStats counts as a slow loop does.

``test_distributed.py`` has several processes. Shapes: T tokens, E experts.
"""

from __future__ import annotations

import math
import pickle
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gmoe import (
    ROUTERS,
    MLPExperts,
    MoE,
    Routing,
    RoutingStats,
    expert_health,
    record_routing,
)
from gmoe.metrics import ExpertHealth, HealthMonitor, LayerHealth
from gmoe.routers import build_router


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
    of_numpy: Any = np.int64(4)
    assert RoutingStats(num_experts=of_numpy).num_experts == (4,)


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


# health -------------------------------------------------------------------------------------------


def routed(expert_TK: list[list[int]], num_experts: int = 8) -> Routing:
    expert = torch.tensor(expert_TK)
    return Routing.from_choices(expert, torch.ones(expert.shape), num_experts=num_experts)


def test_health_on_numbers_worked_by_hand() -> None:
    # 3 of 4 tokens to the first of 4 experts, 1 to the last: shares 3/4 and 1/4, of 1/4 each
    health = expert_health(routed([[0], [0], [3], [0]], num_experts=4), ["blocks.1.mlp"])
    (layer,) = health.layers
    assert layer.load == (3.0, 0.0, 0.0, 1.0)
    assert (layer.dead, layer.experts_per_token) == (2, 1.0)
    assert health.figures() == {
        "experts/blocks.1.mlp/max_load": 3.0,
        "experts/blocks.1.mlp/min_load": 0.0,
        "experts/blocks.1.mlp/dead": 2.0,
        "experts/blocks.1.mlp/entropy": 0.0,
    }
    assert str(health).startswith("blocks.1.mlp: load 0.00 to 3.00 of the even share, 2 of 4 ")


@pytest.mark.parametrize(
    ("load", "k", "said"),
    [
        ([8, 0, 0, 0, 0, 0, 0, 0], 1, "1 of 8 experts has 100% of the load"),
        ([4, 4, 0, 0, 0, 0, 0, 0], 1, "2 of 8 experts have 100% of the load"),
        ([4, 4, 0, 0, 0, 0, 0, 0], 2, "2 of 8 experts have 100% of the load"),
        ([3.8, 0.2, 0, 0], 1, "1 of 4 experts has 95% of the load"),
        ([1, 1, 0, 0], 1, None),
        ([4, 3.5, 0.5, 0, 0, 0, 0, 0], 1, "2 of 8 experts have 94% of the load"),
        ([4, 3, 1, 0, 0, 0, 0, 0], 1, None),
        ([2.7, 2.7, 2.6, 0, 0, 0, 0, 0], 3, "3 of 8 experts have 100% of the load"),
        ([1, 1, 1, 1], 1, None),
        ([1, 1], 2, None),
        ([2, 0], 1, "1 of 2 experts has 100% of the load"),
        ([1], 1, None),
        ([0, 0, 0, 0], 0, None),
    ],
)
def test_advice_is_one_sentence_where_a_few_experts_have_the_load(
    load: list[float], k: float, said: str | None
) -> None:
    total = sum(load) or 1
    even = tuple(len(load) * part / total for part in load)
    layer = LayerHealth("a", even, sum(part == 0 for part in load), 0.0, k)
    advice = ExpertHealth((layer,)).advice
    if said is None:
        assert advice is None
        return
    assert advice is not None
    assert advice.startswith(f"{said} in a: balance them ")
    assert advice.count(". ") == 0
    assert "bias_rate" in advice
    assert str(ExpertHealth((layer,))).endswith(advice)
    assert "in a, and 1 more layers are alike:" in str(ExpertHealth((layer, layer)).advice)


def test_health_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^routings: got none, expected at least one"):
        expert_health([])
    with pytest.raises(ValueError, match=r"^names: got 2, expected 1"):
        expert_health(routed([[0]]), ["a", "b"])
    with pytest.raises(ValueError, match=r"^model: got Linear without a router"):
        HealthMonitor().watch(nn.Linear(2, 2))


class Twice(nn.Module):
    """A layer that runs twice, and one that runs again in the backward pass."""

    first: Any
    second: Any

    def __init__(self) -> None:
        super().__init__()
        for name in ("first", "second"):
            router = build_router("token_choice", 5, num_experts=4, k=1)
            self.add_module(name, MoE(router, MLPExperts(5, 6, 5, num_experts=4)))

    def forward(self, x: Tensor) -> Any:
        x = self.first(self.first(x))
        return checkpoint(self.second, x, use_reentrant=False)


def test_a_monitor_counts_each_call_in_training_once() -> None:
    torch.manual_seed(0)
    model: Any = Twice()
    monitor = HealthMonitor()
    monitor.watch(model)
    x = torch.randn(7, 5, requires_grad=True)
    with record_routing(model) as routings:
        model(x).sum().backward()
        model(x.detach().flip(1))  # weighs the other half where the first counts double
    model.eval()(x.flip(1))  # an evaluation does not count
    first, second = monitor.collect(advises=False).layers
    assert (first.name, second.name) == ("first", "second")
    for layer, recorded in (
        (first, [routings[place] for place in (0, 1, 3, 4)]),
        (second, [routings[place] for place in (2, 5)]),
    ):
        slow = counted_slowly(recorded)
        assert layer.load == pytest.approx([4 * share for share in slow["load"]], abs=1e-5)
    # From then on anew, and no more at all once it was removed.
    with record_routing(model.train()) as routings:
        model(x)
    (again, _) = monitor.collect(advises=False).layers
    slow = counted_slowly(routings[:2])
    assert again.load == pytest.approx([4 * share for share in slow["load"]], abs=1e-5)
    stats = [*monitor.stats.values()]
    monitor.remove()
    model(x)
    assert not any(one.update_called for one in stats)


def test_a_monitor_counts_its_own_thread_alone() -> None:
    """Replicas of ``DataParallel`` run in others, and would write to the same counts at once."""
    model: Any = Twice()
    monitor = HealthMonitor()
    monitor.watch(model)
    thread = threading.Thread(target=model, args=(torch.randn(7, 5),))
    thread.start()
    thread.join()
    assert not any(stats.update_called for stats in monitor.stats.values())
    model(torch.randn(7, 5))
    assert all(stats.update_called for stats in monitor.stats.values())
