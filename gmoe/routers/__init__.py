"""Routers: which expert handles which token. Imports torch only."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

from gmoe._checks import check_choice, check_count, nearest
from gmoe.routers.attention_vote import AttentionVote
from gmoe.routers.base import Router, Weighting
from gmoe.routers.baselines import OracleRouter, RandomRouter, UniformRouter
from gmoe.routers.expert_choice import ExpertChoice
from gmoe.routers.groups import Groups
from gmoe.routers.multi_centroid import MultiCentroid
from gmoe.routers.soft import SoftRouting, SoftSlots
from gmoe.routers.token_choice import TokenChoice

__all__ = [
    "ROUTERS",
    "AttentionVote",
    "ExpertChoice",
    "Groups",
    "MultiCentroid",
    "OracleRouter",
    "RandomRouter",
    "Router",
    "RouterLike",
    "SoftRouting",
    "SoftSlots",
    "TokenChoice",
    "UniformRouter",
    "Weighting",
    "build_router",
]

RouterLike: TypeAlias = str | Router | Callable[..., Router]
"""A name of :data:`ROUTERS`; a class or factory ``router(dim, num_experts, k=k, **kwargs)``; an instance."""

ROUTERS: dict[str, Callable[..., Router]] = {
    "token_choice": TokenChoice,
    "expert_choice": ExpertChoice,
    "attention_vote": AttentionVote,
    "multi_centroid": MultiCentroid,
    "random": RandomRouter,
    "uniform": UniformRouter,
}
"""Routers that a name can build. :class:`OracleRouter` needs the assignment, so it takes a factory; the slots of
:class:`SoftSlots` are for :class:`gmoe.SoftMoE`."""


def build_router(
    router: RouterLike, dim: int, num_experts: int, k: int, kwargs: Mapping[str, Any] | None = None
) -> Router:
    """Build a layer's router from a name, a factory or an instance.

    Args:
        router: a name of ``gmoe.ROUTERS``, a class or factory ``router(dim, num_experts, k=k, **kwargs)``, or an
            instance.
        dim: width of the tokens.
        num_experts: E.
        k: experts per token, passed where the router has such a parameter and a ``partial`` does not bind it; an
            instance keeps its own.
        kwargs: further arguments of the router.

    Raises:
        ValueError: an unknown name, or an argument that the router does not take; an instance of other ``dim`` or
            ``num_experts``, or with ``kwargs``; K > E.
    """
    if not isinstance(kwargs, Mapping | None):
        raise ValueError(f"router_kwargs: got {kwargs!r}, expected a dictionary of arguments")
    kwargs = dict(kwargs or {})
    if router is SoftSlots or isinstance(router, SoftSlots):
        raise ValueError("router: got SoftSlots, expected another router: its slots are for gmoe.SoftMoE")
    if isinstance(router, Router):
        if kwargs:
            raise ValueError(f"router_kwargs: got {kwargs!r} beside a router instance, expected none")
        if (router.dim, router.num_experts) != (dim, num_experts):
            got = f"an instance for dim={router.dim}, num_experts={router.num_experts}"
            raise ValueError(f"router: got {got}, expected dim={dim}, num_experts={num_experts}")
        return router
    if isinstance(router, str):
        check_choice("router", router, ROUTERS)
        router = ROUTERS[router]
    if not callable(router):
        raise ValueError(f"router: got {router!r}, expected a name, a factory or an instance")
    check_count("k", k)
    if k > num_experts:
        raise ValueError(f"k: got {k}, expected at most num_experts={num_experts}")
    signature = inspect.signature(router)
    own_k = isinstance(router, partial) and "k" in router.keywords
    # uniform and oracle fix their own
    takes_k = any(p.name == "k" or p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    own = {"k": k} if takes_k and not own_k else {}
    try:
        signature.bind(dim, num_experts, **own, **kwargs)
    except TypeError as error:
        known = [name for name in signature.parameters if name not in ("dim", "num_experts", "k")]
        hint = nearest(next((name for name in kwargs if name not in known), ""), known)
        expected = f"some of {', '.join(known)} ({error}){hint}"
        raise ValueError(f"router_kwargs: got {kwargs!r}, expected {expected}") from error
    built = router(dim, num_experts, **own, **kwargs)
    if not isinstance(built, Router):
        raise ValueError(f"router: got a factory that returned {type(built).__name__}, expected a Router")
    return built
