"""Every public layer keeps the contract, clause by clause; see ``contract.py``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from gmoe import MLPExperts, MoE, Router, RoutingStats
from gmoe.routers import build_router
from tests.contract import (
    CASES,
    CLAUSES,
    GROUPS,
    Case,
    assert_alike,
    assert_compiles,
    host_syncs,
)

UNBROKEN = ("token_choice", "multi_centroid", "random", "uniform", "linear", "shared")
"""``MoE`` with these is one graph for ``torch.compile``."""

# Without a GPU its cases are not collected: they are as many as those of the CPU.
GPUS = [pytest.param("cuda", marks=pytest.mark.gpu)] * torch.cuda.is_available()
each_device = pytest.mark.parametrize("device", ["cpu", *GPUS])


def named(*names: str) -> list[Case]:
    return [case for case in CASES if case.name.removeprefix("MoE ") in names]


def label(value: Any) -> str:
    return value.name if isinstance(value, Case) else getattr(value, "__name__", str(value))


@each_device
@pytest.mark.parametrize(
    ("clause", "case"),
    [(clause, case) for clause in CLAUSES for case in CASES if clause.__name__ not in case.exempt],
    ids=label,
)
def test_contract(clause: Callable[[Case, str], None], case: Case, device: str) -> None:
    clause(case, device)


def test_exemptions_name_clauses() -> None:
    assert {name for case in CASES for name in case.exempt} <= {
        clause.__name__ for clause in CLAUSES
    }


@pytest.mark.parametrize("case", CASES, ids=label)
def test_no_parameter_is_a_scalar(case: Case) -> None:
    """FSDP2 refuses them."""
    assert all(parameter.dim() > 0 for parameter in case.make().parameters())


REENTRANT = (
    "token_choice bias",
    "expert_choice threshold",
    "MoEConv gcn",
    "GNNMoE",
    "GNNMoE shared router",
    "GNNMoE copies",
)


@pytest.mark.parametrize("case", named(*REENTRANT), ids=label)
def test_counters_advance_once_under_reentrant_checkpointing(case: Case) -> None:
    """Of the other checkpointing see ``is_checkpointed``."""
    layer = case.make()
    twin = copy.deepcopy(layer)
    for seed in range(2):
        (x, *rest), kwargs = case.call().args, case.call().kwargs
        x.requires_grad_()
        torch.manual_seed(seed)
        layer(x, *rest, **kwargs).sum().backward()
        torch.manual_seed(seed)
        checkpoint(partial(twin, **kwargs), x, *rest, use_reentrant=True).sum().backward()
    for one, other in zip(twin.modules(), layer.modules(), strict=True):
        if isinstance(one, Router):  # batch norm's statistics move with every forward
            assert_alike(dict(one.named_buffers()), dict(other.named_buffers()))


QUICK_TO_COMPILE = ("MoE linear",)
"""What the default tests compile as one graph, beside token choice by inductor."""


def assert_compiles_whole(case: Case, backend: str, **calls: Any) -> None:
    """The same in one graph."""
    import torch._inductor.config as inductor  # slow to import

    config: Any = inductor
    with config.patch(fallback_random=True):  # or noise would be drawn by kernels of its own
        assert_compiles(case, backend=backend, fullgraph=True, **calls)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case.name in QUICK_TO_COMPILE else pytest.mark.slow)
        for case in named(*UNBROKEN)
    ],
    ids=label,
)
def test_compiles_in_one_graph(case: Case) -> None:
    assert_compiles_whole(case, "aot_eager")


@pytest.mark.parametrize("case", named("token_choice"), ids=label)
def test_inductor_takes_the_balance_of_its_own_step(case: Case) -> None:
    """Compiled code recomputes in the backward what it can.

    If the balance has moved on by then, the gradient is wrong, silently. Two steps of one size are
    compiled once; the next test has other sizes.
    """
    assert_compiles_whole(case, "inductor", calls=(GROUPS, GROUPS))


@pytest.mark.slow
@pytest.mark.parametrize("case", named(*UNBROKEN), ids=label)
def test_inductor_compiles_in_one_graph(case: Case) -> None:
    assert_compiles_whole(case, "inductor")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=label)
def test_compiles_in_pieces(case: Case) -> None:
    assert_compiles(case, backend="eager")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "router", ["token_choice", "expert_choice", "attention_vote", "multi_centroid", "random"]
)
def test_a_forward_on_groups_of_one_size_waits_for_nothing(router: str) -> None:
    layer = MoE(
        build_router(router, 64, num_experts=4, k=1), MLPExperts(64, 128, 64, num_experts=4)
    ).cuda()
    x, stats = torch.randn(3, 17, 64, device="cuda"), RoutingStats(num_experts=4).cuda()
    try:
        torch.cuda.set_sync_debug_mode("error")
        with torch.autocast("cuda", torch.bfloat16):
            _, routing = layer(x, return_routing=True)
        stats.update(routing)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_token_choice_waits_for_nothing_on_ragged_groups() -> None:
    assert set(
        host_syncs(named("token_choice", "multi_centroid", "random", "linear")).values()
    ) == {0}
