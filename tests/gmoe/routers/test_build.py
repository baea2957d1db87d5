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


def test_arguments_are_passed_on() -> None:
    router = build_router("token_choice", 6, 4, 2, {"weight": "score", "z_coef": 0.5})
    assert isinstance(router, TokenChoice)
    assert (router.weight, router.z_coef) == ("score", 0.5)


def test_factories() -> None:
    assert build_router(TokenChoice, 6, 4, 3).k == 3
    assert build_router(partial(TokenChoice, weight="score"), 6, 4, 2).weight == "score"
    assert build_router(lambda dim, num_experts: UniformRouter(dim, num_experts), 6, 4, 2).k == 4
    assignment = torch.tensor([0, 3])
    assert isinstance(build_router(partial(OracleRouter, assignment=assignment), 6, 4, 1), OracleRouter)
    assert build_router("token_choice", 6, 4, 1) is not build_router("token_choice", 6, 4, 1)


def test_a_factory_that_takes_any_keyword_gets_k() -> None:
    def factory(dim: int, num_experts: int, **kwargs: Any) -> Router:
        return TokenChoice(dim, num_experts, **kwargs)

    assert build_router(factory, 6, 4, 2).k == 2


def test_an_instance_is_returned_as_it_is() -> None:
    router = TokenChoice(6, 4, k=2)
    assert build_router(router, 6, 4, 1) is router


def test_refusals() -> None:
    names = "'token_choice', 'expert_choice', 'attention_vote', 'multi_centroid', 'random', 'uniform'"
    with pytest.raises(ValueError, match=f"router: got 'hash', expected one of {names}"):
        build_router("hash", 6, 4, 1)
    with pytest.raises(ValueError, match="k: got 5, expected at most num_experts=4"):
        build_router("token_choice", 6, 4, 5)
    with pytest.raises(
        ValueError, match=r"router: got an instance for dim=6, num_experts=4, expected dim=6, num_exp.*=8"
    ):
        build_router(TokenChoice(6, 4), 6, 8, 1)
    with pytest.raises(ValueError, match=r"router: got an instance for dim=6, .* expected dim=7"):
        build_router(TokenChoice(6, 4), 7, 4, 1)
    with pytest.raises(ValueError, match=r"router_kwargs: got \{'weight': 'score'\} beside a router instance"):
        build_router(TokenChoice(6, 4), 6, 4, 1, {"weight": "score"})
    with pytest.raises(ValueError, match="router: got a factory that returned Linear, expected a Router"):
        build_router(torch.nn.Linear, 6, 4, 1)  # type: ignore[arg-type]


def test_the_nearest_name_is_suggested() -> None:
    with pytest.raises(ValueError, match=r"router: got 'token_choise', .*; did you mean 'token_choice'"):
        build_router("token_choise", 6, 4, 1)
    with pytest.raises(ValueError, match=r"router_kwargs: got .*; did you mean 'capacity_factor'"):
        build_router("expert_choice", 6, 4, 1, {"capacity": 1.0})
    with pytest.raises(ValueError, match=r"balance: got 'swich', .*; did you mean 'switch'"):
        build_router("token_choice", 6, 4, 1, {"balance": "swich"})
