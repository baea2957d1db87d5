"""Routers: which expert handles which token. They import torch only."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

from gmoe._checks import check_choice
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
    if not isinstance(kwargs, Mapping | None):
        raise ValueError(f"router_kwargs: got {kwargs!r}, expected a dictionary of arguments")
    kwargs = dict(kwargs or {})
    router = read_router(router)
    is_soft = isinstance(router, type) and issubclass(router, SoftSlots)
    if is_soft or isinstance(router, SoftSlots):
        raise ValueError("router: got SoftSlots, expected another: its slots are for gmoe.SoftMoE")

    if isinstance(router, Router):
        if kwargs:
            raise ValueError(f"router_kwargs: got {kwargs} beside a router instance, expected none")
        if (router.dim, router.num_experts) != (dim, num_experts):
            raise ValueError(
                f"router: got an instance for dim={router.dim}, "
                f"num_experts={router.num_experts}, expected dim={dim}, num_experts={num_experts}"
            )
        if k not in (1, router.k):  # 1 is what layers pass by default
            raise ValueError(f"k: got {k} beside a router instance of k={router.k}, expected none")
        return router

    if isinstance(router, str):
        check_choice("router", router, ROUTERS)
        router = ROUTERS[router]
    is_other_class = isinstance(router, type) and not issubclass(router, Router)
    if not callable(router) or is_other_class:
        raise ValueError(f"router: got {router!r}, expected a name, a factory or an instance")
    signature = inspect.signature(router)

    def takes(name: str) -> bool:
        return any(
            parameter.name == name or parameter.kind is parameter.VAR_KEYWORD
            for parameter in signature.parameters.values()
        )

    if not takes("num_experts"):
        raise ValueError(
            f"router: got a factory of {signature}, expected one of (dim, num_experts=num_experts)"
        )
    is_bound = isinstance(router, partial) and "k" in router.keywords
    # Uniform and oracle routers have no k.
    k_argument = {"k": k} if takes("k") and not is_bound else {}
    try:
        signature.bind(dim, num_experts=num_experts, **k_argument, **kwargs)
    except TypeError as error:
        raise ValueError(
            f"router_kwargs: got {kwargs!r} ({error}), expected arguments of {signature}"
        ) from error
    built = router(dim, num_experts=num_experts, **k_argument, **kwargs)
    if not isinstance(built, Router):
        raise ValueError(
            f"router: got a factory that returned {type(built).__name__}, expected a Router"
        )
    return built


def read_router(router: Any) -> Any:
    """A :class:`FromCall` from its arguments, as a file has it; anything else stays as it is."""
    if not isinstance(router, Mapping):
        return router
    return FromInput(**router) if "dim" in router else ByType(**router)
