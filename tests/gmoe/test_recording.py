"""Decisions that are recorded inside models."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gmoe import MultiCentroid, Routing, TokenChoice, aux_loss, record_routing


class Model(nn.Module):
    """Two routers, perhaps under checkpointing."""

    def __init__(self, use_reentrant: bool | None = None) -> None:
        super().__init__()
        self.routers = nn.ModuleList(
            TokenChoice(4, num_experts=n, balance="switch") for n in (3, 4)
        )
        self.use_reentrant = use_reentrant

    def route(self, x: Tensor) -> None:
        """Has nothing to do with ours."""

    def step(self, router: nn.Module, x: Tensor) -> Tensor:
        return x * router(x).to_dense().sum(dim=1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        for router in self.routers:
            if self.use_reentrant is None:
                x = self.step(router, x)
            else:
                x = checkpoint(self.step, router, x, use_reentrant=self.use_reentrant)
        return x


def test_routings_are_recorded_in_order_while_the_block_lasts() -> None:
    model, x = Model(), torch.randn(6, 4)
    with record_routing(model) as routings, record_routing(model.routers[1]) as inner:
        model(x)
        assert [routing.num_experts for routing in routings] == [3, 4]
        model(x[:2])
    model(x)
    assert [routing.num_tokens for routing in routings] == [6, 6, 2, 2]
    assert [routing.num_tokens for routing in inner] == [6, 2]
    assert not any(module._forward_hooks for module in model.modules())


def test_a_copy_made_inside_the_block_records_only_while_it_lasts() -> None:
    model = TokenChoice(4, num_experts=2)
    with record_routing(model) as routings:
        twin = copy.deepcopy(model)
        twin(torch.randn(3, 4))
    assert len(routings) == 1
    twin(torch.randn(3, 4))
    assert len(routings) == 1


def test_a_block_that_recorded_nothing_is_refused() -> None:
    for model in (Model(), nn.Linear(4, 4)):
        with (
            pytest.raises(RuntimeError, match="record_routing: nothing was recorded"),
            record_routing(model),
        ):
            pass


def test_each_thread_records_its_own() -> None:
    model, together = Model(), threading.Barrier(3)

    def call(num_tokens: int, record: bool) -> list[int]:
        recording: AbstractContextManager[list[Routing]] = (
            record_routing(model) if record else nullcontext([])
        )
        with recording as routings:
            together.wait(10)
            model(torch.randn(num_tokens, 4))
            together.wait(10)
        return [routing.num_tokens for routing in routings]

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(call, (3, 5, 7), (True, True, False))) == [[3, 3], [5, 5], []]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputation_is_not_recorded_and_a_reentrant_one_warns(use_reentrant: bool) -> None:
    model, x = Model(use_reentrant), torch.randn(6, 4, requires_grad=True)
    with record_routing(model) as routings:
        loss = model(x).sum()
        warns = (
            pytest.warns(UserWarning, match="reentrant checkpointing")
            if use_reentrant
            else nullcontext()
        )
        with warns:
            loss = loss + aux_loss(routings)
        loss.backward()
    assert len(routings) == 2


def test_a_compiled_model_is_recorded_unless_it_was_traced_before() -> None:
    torch.compiler.reset()
    compiled: Any = torch.compile(MultiCentroid(4, num_experts=3), backend="eager")
    with record_routing(compiled) as routings:
        compiled(torch.randn(6, 4))
    assert len(routings) == 1
    torch.compiler.reset()
    compiled = torch.compile(nn.Sequential(TokenChoice(4, num_experts=3)), backend="eager")
    compiled(torch.randn(6, 4))
    with (
        pytest.raises(RuntimeError, match="compiled and called before the block"),
        record_routing(compiled),
    ):
        compiled(torch.randn(6, 4))
