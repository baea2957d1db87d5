"""Routers by name."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import gmoe
from gmoe import ROUTERS, OracleRouter, Router, SoftSlots, TokenChoice, UniformRouter, build_router


@pytest.mark.parametrize("name", ROUTERS)
def test_by_name(name: str) -> None:
    router = build_router(name, 6, 4, 2)
    assert type(router) is ROUTERS[name]
    assert (router.dim, router.num_experts) == (6, 4)
    assert router.k == (4 if name == "uniform" else 2)
    assert router(torch.randn(5, 6)).to_dense().shape == (5, 4)


def test_every_public_router_has_a_name() -> None:
    public = [getattr(gmoe, name) for name in gmoe.__all__]
    routers = {c for c in public if isinstance(c, type) and issubclass(c, Router) and c is not Router}
    assert routers == {*ROUTERS.values(), OracleRouter, SoftSlots}


@pytest.mark.parametrize(
    ("name", "kwargs", "at_one", "at_two"),
    [
        ("token_choice", {}, "score", "normalized"),
        ("random", {}, "straight_through", "normalized"),
        ("multi_centroid", {}, "score", "normalized"),
        ("multi_centroid", {"choice": "experts"}, "score", "score"),
        ("expert_choice", {}, "score", "score"),
        ("attention_vote", {}, "score", "score"),
        ("token_choice", {"weight": "score"}, "score", "score"),
    ],
)
def test_default_weights(name: str, kwargs: dict[str, Any], at_one: str, at_two: str) -> None:
    assert [build_router(name, 6, 4, k, kwargs).weight for k in (1, 2)] == [at_one, at_two]


def test_factories() -> None:
    assert build_router(TokenChoice, 6, 4, 3).k == 3
    assert build_router(partial(TokenChoice, weight="score"), 6, 4, 2).weight == "score"
    assert build_router(lambda dim, num_experts: UniformRouter(dim, num_experts), 6, 4, 2).k == 4
    assignment = torch.tensor([0, 3])
    assert isinstance(build_router(partial(OracleRouter, assignment=assignment), 6, 4, 1), OracleRouter)
    assert build_router("token_choice", 6, 4, 1) is not build_router("token_choice", 6, 4, 1)


def test_a_factory_that_takes_any_keyword_gets_k() -> None:
    assert build_router(lambda dim, num_experts, **kwargs: TokenChoice(dim, num_experts, **kwargs), 6, 4, 2).k == 2


def test_an_instance_is_returned_as_it_is() -> None:
    router = TokenChoice(6, 4, k=2)
    assert build_router(router, 6, 4, 1) is router


ALL = "'token_choice', 'expert_choice', 'attention_vote', 'multi_centroid', 'random', 'uniform'"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("hash", 6, 4, 1), f"router: got 'hash', expected one of {ALL}"),
        ((SoftSlots, 6, 4, 1), r"router: got SoftSlots, .*gmoe\.SoftMoE"),
        ((SoftSlots(6, 4), 6, 4, 1), r"router: got SoftSlots, .*gmoe\.SoftMoE"),
        ((3, 6, 4, 1), "router: got 3, expected a name, a factory or an instance"),
        (("token_choice", 6, 4, 5), "k: got 5, expected at most num_experts=4"),
        ((TokenChoice(6, 4), 6, 8, 1), r"router: got an instance for dim=6, num_experts=4, expected .*num_experts=8"),
        ((TokenChoice(6, 4), 7, 4, 1), r"router: got an instance for dim=6, .* expected dim=7"),
        ((TokenChoice(6, 4), 6, 4, 1, {"weight": "score"}), r"router_kwargs: got \{'weight': 'score'\} beside"),
        ((torch.nn.Linear, 6, 4, 1), "router: got a factory that returned Linear, expected a Router"),
        (("token_choice", 6, 4, 1, {"k": 2}), "router_kwargs: got .*'k'"),
        (("token_choise", 6, 4, 1), r"router: got 'token_choise', .*; did you mean 'token_choice'"),
        (("expert_choice", 6, 4, 1, {"capacity": 1.0}), r"router_kwargs: got .*; did you mean 'capacity_factor'"),
        (("token_choice", 6, 4, 1, {"balance": "swich"}), r"balance: got 'swich', .*; did you mean 'switch'"),
    ],
)
def test_refusals(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_router(*args)
