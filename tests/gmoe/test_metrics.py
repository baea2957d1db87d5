"""RoutingStats counts what a slow loop counts, over updates and over processes. Shapes: T tokens, E experts."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, multiprocessing, nn

import gmoe
from gmoe import ROUTERS, MLPExperts, MoE, Router, Routing, RoutingStats, build_router


def counted_slowly(routings: list[Routing]) -> dict[str, Any]:
    """Of the routings of one layer, token by token and pair by pair."""
    experts = routings[0].num_experts
    load, weight = [0] * experts, [0.0] * experts
    tokens = covered = dropped = 0
    entropy = 0.0
    for routing in routings:
        has = set()
        for token, expert, w in zip(
            routing.token.tolist(), routing.expert.tolist(), routing.weight.tolist(), strict=True
        ):
            load[expert] += 1
            weight[expert] += w
            has.add(token)
        tokens += routing.num_tokens
        covered += len(has)
        dropped += int(routing.dropped)
        for row in routing.scores.tolist():
            total = sum(row)
            entropy -= sum(s / total * math.log(s / total) for s in row if s > 0)
    pairs = sum(load)
    return {
        "load": [count / max(pairs, 1) for count in load],
        "weight": [total / max(count, 1) for total, count in zip(weight, load, strict=True)],
        "coverage": covered / tokens if tokens else 1.0,
        "experts_per_token": pairs / max(tokens, 1),
        "entropy": entropy / max(tokens, 1),
        "dropped": dropped / max(dropped + pairs, 1),
        "dead": load.count(0),
    }


def check(found: dict[str, Tensor], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].tolist() == pytest.approx(value, abs=1e-5), name


@pytest.mark.parametrize("name", ROUTERS)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=3), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_counts_as_a_slow_loop_does(name: str, sizes: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    router = build_router(name, 4, 3, 2)
    stats = RoutingStats(3)
    routings = [router(torch.randn(size, 4)) for size in sizes]
    for routing in routings:
        stats.update(routing)
    (found,) = stats.compute()
    check(found, counted_slowly(routings))


def test_layers_of_other_sizes_and_a_models_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        MoE(build_router("token_choice", 4, 2, 1), MLPExperts(4, 5, 4, num_experts=2)),
        MoE(build_router("expert_choice", 4, 5, 2), MLPExperts(4, 5, 4, num_experts=5)),
    )
    stats = RoutingStats.of(model)
    assert stats.num_experts == (2, 5)
    kept: list[list[Routing]] = []
    for _ in range(3):
        with gmoe.record_routing(model) as routings:
            model(torch.randn(2, 7, 4))
        stats.update(routings)
        kept.append(routings)
    for layer, found in enumerate(stats.compute()):
        check(found, counted_slowly([routings[layer] for routings in kept]))
    stats.reset()
    assert stats.load.sum() == 0


def test_one_expert_has_scalars() -> None:
    stats = RoutingStats([1, 3])
    stats.update([build_router(name, 4, e, 1)(torch.randn(5, 4)) for name, e in (("expert_choice", 1), ("random", 3))])
    for copy in (stats, pickle.loads(pickle.dumps(stats))):
        for _ in range(2):  # computed, and remembered
            one, three = copy.compute()
            assert [one[name].shape for name in ("load", "weight")] == [(), ()]
            assert [three[name].shape for name in ("load", "weight")] == [(3,), (3,)]
            assert one["coverage"].shape == ()


@pytest.mark.parametrize(
    ("experts", "message"),
    [((), "num_experts: got no layers"), (0, "num_experts: got 0"), ((2, -1), "num_experts: got -1")],
)
def test_bad_numbers_of_experts(experts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoutingStats(experts)


def test_other_layers_are_refused() -> None:
    router: Router = build_router("token_choice", 4, 3, 1)
    routing = router(torch.randn(5, 4))
    with pytest.raises(ValueError, match=r"routings: got layers of \(3, 3\) experts, expected \(3,\)"):
        RoutingStats(3).update([routing, routing])
    with pytest.raises(ValueError, match=r"routings: got layers of \(3,\) experts, expected \(4,\)"):
        RoutingStats(4).update(routing)
    with pytest.raises(ValueError, match="model: got Linear without a router"):
        RoutingStats.of(nn.Linear(2, 2))


def _one_of_two(rank: int, meeting: str, out: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    torch.manual_seed(0)
    router = build_router("token_choice", 4, 3, 1).eval()
    parts = torch.randn(10, 4).split([3, 7])  # the ranks see other numbers of tokens
    stats = RoutingStats(3)
    stats.update(router(parts[rank]))
    torch.save(stats.compute(), f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ranks_are_summed(tmp_path: Path) -> None:
    multiprocessing.spawn(_one_of_two, (str(tmp_path / "meeting"), str(tmp_path)), nprocs=2)  # type: ignore[attr-defined]
    torch.manual_seed(0)
    router = build_router("token_choice", 4, 3, 1).eval()
    expected = counted_slowly([router(part) for part in torch.randn(10, 4).split([3, 7])])
    for rank in range(2):
        check(torch.load(tmp_path / f"{rank}.pt")[0], expected)
