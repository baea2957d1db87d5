"""Routers by name."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import gmoe
from gmoe import ROUTERS, OracleRouter, Router, SoftSlots, TokenChoice, UniformRouter
from gmoe.routers import build_router


@pytest.mark.parametrize("name", ROUTERS)
def test_by_name(name: str) -> None:
    router = build_router(name, 6, num_experts=4, k=2)
    assert type(router) is ROUTERS[name]
    assert (router.dim, router.num_experts, router.k) == (6, 4, 4 if name == "uniform" else 2)


def test_every_public_router_has_a_name() -> None:
    public = [getattr(gmoe, name) for name in gmoe.__all__]
    routers = {
        c for c in public if isinstance(c, type) and issubclass(c, Router) and c is not Router
    }
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
    assert [build_router(name, 6, num_experts=4, k=k, kwargs=kwargs).weight for k in (1, 2)] == [
        at_one,
        at_two,
    ]


def test_factories_and_instances() -> None:
    def uniform(dim: int, num_experts: int) -> Router:
        return UniformRouter(dim, num_experts=num_experts)

    def chosen(dim: int, **kwargs: Any) -> Router:
        return TokenChoice(dim, **kwargs)

    by_score = partial(TokenChoice, weight="score")
    assert build_router(TokenChoice, 6, num_experts=4, k=3).k == 3
    assert build_router(by_score, 6, num_experts=4, k=2).weight == "score"
    assert build_router(uniform, 6, num_experts=4, k=2).k == 4
    assert build_router(chosen, 6, num_experts=4, k=2).k == 2
    router = TokenChoice(6, num_experts=4, k=2)
    assert build_router(router, 6, num_experts=4, k=1) is router


FOUR = TokenChoice(6, num_experts=4)


@pytest.mark.parametrize(
    ("message", "router", "changes"),
    [
        *(
            ("router: got", router, {})
            for router in ("hash", SoftSlots, SoftSlots(6, num_experts=4), 3, torch.nn.Linear)
        ),
        (
            r"router_kwargs: got {} .*, expected arguments of \(dim\)",
            lambda dim: TokenChoice(dim, num_experts=4),
            {},
        ),
        ("router: got a factory that returned dict", lambda *_, **options: options, {}),
        ("router: got", FOUR, {"num_experts": 8}),
        ("router: got", FOUR, {"dim": 7}),
        ("k: got 3, expected none beside a router instance of k=1", FOUR, {"k": 3}),
        *(
            (
                f"{name}: got {value!r}, expected the default beside choice='tokens'",
                "multi_centroid",
                {"kwargs": {name: value}},
            )
            for name, value in (
                ("capacity_factor", 0.5),
                ("inference", "threshold"),
            )
        ),
        ("k: got", "token_choice", {"k": 5}),
        ("router_kwargs", "expert_choice", {"kwargs": {"k": 2}}),
        ("router_kwargs", "expert_choice", {"kwargs": 3}),
        ("router_kwargs", FOUR, {"kwargs": {"weight": "score"}}),
        ("router: got 'token_choise'.* did you mean 'token_choice'", "token_choise", {}),
        (
            "router_kwargs: got .*'capacity'.*, expected .*capacity_factor",
            "expert_choice",
            {"kwargs": {"capacity": 1.0}},
        ),
    ],
)
def test_refusals(message: str, router: Any, changes: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"dim": 6, "num_experts": 4, "k": 1, **changes}
    with pytest.raises(ValueError, match=f"^{message}"):
        build_router(router, **arguments)


class MySlots(SoftSlots):
    """Soft routing, by a class of one's own."""


@pytest.mark.parametrize("router", [MySlots, MySlots(4, num_experts=2)])
def test_soft_routing_of_ones_own_is_for_soft_layers(router: Any) -> None:
    with pytest.raises(ValueError, match=r"^router: got SoftSlots, expected another"):
        build_router(router, 4, num_experts=2, k=1)
