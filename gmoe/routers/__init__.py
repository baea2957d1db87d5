"""Routers: which expert handles which token. They import torch only."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

from gmoe._checks import check, check_choice
from gmoe.routers.attention_vote import AttentionVote
from gmoe.routers.base import Router, Weighting
from gmoe.routers.baselines import OracleRouter, RandomRouter, UniformRouter
from gmoe.routers.by_type import ByType
from gmoe.routers.expert_choice import ExpertChoice
from gmoe.routers.from_call import DEFAULT_EXPERTS, FromCall
from gmoe.routers.from_input import FromInput
from gmoe.routers.groups import Groups
from gmoe.routers.multi_centroid import MultiCentroid
from gmoe.routers.soft import SoftRouting, SoftSlots
from gmoe.routers.token_choice import TokenChoice

__all__ = [
    "DEFAULT_EXPERTS",
    "ROUTERS",
    "AttentionVote",
    "ByType",
    "ExpertChoice",
    "FromCall",
    "FromInput",
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
]

RouterLike: TypeAlias = str | Router | Callable[..., Router]
"""A name of :data:`ROUTERS`; a class or factory
``router(dim, num_experts=num_experts, k=k, **kwargs)``; or an instance.
"""

ROUTERS: dict[str, Callable[..., Router]] = {
    "token_choice": TokenChoice,
    "expert_choice": ExpertChoice,
    "attention_vote": AttentionVote,
    "multi_centroid": MultiCentroid,
    "random": RandomRouter,
    "uniform": UniformRouter,
}
"""Routers that a name can build.

:class:`OracleRouter` needs the assignment, so it takes a factory; the slots of :class:`SoftSlots`
are for :class:`gmoe.SoftMoE`.
"""


def build_router(
    router: RouterLike,
    dim: int,
    *,
    num_experts: int,
    k: int,
    kwargs: Mapping[str, object] | None = None,
) -> Router:
    """Build a layer's router from a name, a factory or an instance.

    Args:
        router: a name of ``gmoe.ROUTERS``, a class or factory
            ``router(dim, num_experts=num_experts, k=k, **kwargs)``, or an instance.
        dim: width of the tokens.
        num_experts: E.
        k: experts per token, passed if the router has such a parameter and no ``partial`` binds it;
            an instance keeps its own.
        kwargs: further arguments of the router.

    Raises:
        ValueError: an unknown name, or an argument that the router does not take; an instance of
            other ``dim``, ``num_experts`` or ``k`` (but for 1), or with ``kwargs``; K > E.
    """
    check(isinstance(kwargs, Mapping | None), "router_kwargs", repr(kwargs), "a dictionary")
    kwargs = dict(kwargs or {})
    router = read_router(router)
    is_soft = isinstance(router, type) and issubclass(router, SoftSlots)
    is_soft = is_soft or isinstance(router, SoftSlots)
    check(not is_soft, "router", "SoftSlots", "another: its slots are for gmoe.SoftMoE")
    if isinstance(router, Router):
        check(not kwargs, "router_kwargs", kwargs, "none beside a router instance")
        got = f"an instance for dim={router.dim}, num_experts={router.num_experts}"
        is_fitting = (router.dim, router.num_experts) == (dim, num_experts)
        check(is_fitting, "router", got, f"dim={dim}, num_experts={num_experts}")
        # Layers pass 1 by default.
        check(k in (1, router.k), "k", k, f"none beside a router instance of k={router.k}")
        return router
    if isinstance(router, str):
        check_choice("router", router, ROUTERS)
        router = ROUTERS[router]
    is_other_class = isinstance(router, type) and not issubclass(router, Router)
    is_factory = callable(router) and not is_other_class
    check(is_factory, "router", repr(router), "a name, a factory or an instance")
    signature = inspect.signature(router)
    parameters = signature.parameters
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    is_bound = isinstance(router, partial) and "k" in router.keywords
    # Uniform and oracle routers have no k.
    takes_k = (takes_any or "k" in parameters) and not is_bound
    options = {"num_experts": num_experts} | ({"k": k} if takes_k else {})
    try:
        signature.bind(dim, **options, **kwargs)
    except TypeError as error:
        raise ValueError(
            f"router_kwargs: got {kwargs!r} ({error}), expected arguments of {signature}"
        ) from error
    built = router(dim, **options, **kwargs)
    got = f"a factory that returned {type(built).__name__}"
    check(isinstance(built, Router), "router", got, "a Router")
    return built


def read_router(router: Any) -> Any:
    """A :class:`FromCall` from its arguments, as a file has it; anything else stays as it is."""
    if not isinstance(router, Mapping):
        return router
    return FromInput(**router) if "dim" in router else ByType(**router)
