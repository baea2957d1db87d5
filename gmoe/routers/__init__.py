"""Routers: which expert handles which token. Imports torch only."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

from gmoe._checks import check, check_choice
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
    "Groups",
    "Router",
    "RouterLike",
    "SoftRouting",
    "SoftSlots",
    "Weighting",
    "build_router",
]
__all__ += ["AttentionVote", "ExpertChoice", "MultiCentroid", "TokenChoice"]
__all__ += ["OracleRouter", "RandomRouter", "UniformRouter"]

RouterLike: TypeAlias = str | Router | Callable[..., Router]
"""A name of :data:`ROUTERS`; a class or factory ``router(dim, num_experts, k=k, **kwargs)``; an
instance.
"""

ROUTERS: dict[str, Callable[..., Router]] = {
    "token_choice": TokenChoice,
    "expert_choice": ExpertChoice,
    "attention_vote": AttentionVote,
    "multi_centroid": MultiCentroid,
    "random": RandomRouter,
    "uniform": UniformRouter,
}
"""Routers that a name can build. :class:`OracleRouter` needs the assignment, so it takes a factory;
the slots of :class:`SoftSlots` are for :class:`gmoe.SoftMoE`.
"""


ALSO_CALLED = {"top_k": "token_choice", "topk": "token_choice", "switch": "token_choice"}
"""What else routers are called, and their names here."""


def build_router(
    router: RouterLike, dim: int, num_experts: int, k: int, kwargs: Mapping[str, Any] | None = None
) -> Router:
    """Build a layer's router from a name, a factory or an instance.

    Args:
        router: a name of ``gmoe.ROUTERS``, a class or factory
            ``router(dim, num_experts, k=k, **kwargs)``, or an instance.
        dim: width of the tokens.
        num_experts: E.
        k: experts per token, passed where the router has such a parameter and a ``partial`` does
            not bind it; an instance keeps its own.
        kwargs: further arguments of the router.

    Raises:
        ValueError: an unknown name, or an argument that the router does not take; an instance of
            other ``dim`` or ``num_experts``, or with ``kwargs``; K > E.
    """
    check(
        isinstance(kwargs, Mapping | None),
        "router_kwargs",
        repr(kwargs),
        "a dictionary of arguments",
    )
    kwargs = dict(kwargs or {})
    check(
        SoftSlots not in (router, type(router)),
        "router",
        "SoftSlots",
        "another: its slots are for gmoe.SoftMoE",
    )
    if isinstance(router, Router):
        check(not kwargs, "router_kwargs", f"{kwargs} beside a router instance", "none")
        got = f"an instance for dim={router.dim}, num_experts={router.num_experts}"
        fits = (router.dim, router.num_experts) == (dim, num_experts)
        check(fits, "router", got, f"dim={dim}, num_experts={num_experts}")
        return router
    if isinstance(router, str):
        check_choice("router", router, ROUTERS, ALSO_CALLED)
        router = ROUTERS[router]
    check(callable(router), "router", repr(router), "a name, a factory or an instance")
    signature = inspect.signature(router)
    # uniform and oracle do not
    takes_k = any(p.name == "k" or p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    bound = isinstance(router, partial) and "k" in router.keywords
    given = {"k": k} if takes_k and not bound else {}
    try:
        signature.bind(dim, num_experts, **given, **kwargs)
    except TypeError as error:
        raise ValueError(
            f"router_kwargs: got {kwargs!r} ({error}), expected arguments of {signature}"
        ) from error
    built = router(dim, num_experts, **given, **kwargs)
    check(
        isinstance(built, Router),
        "router",
        f"a factory that returned {type(built).__name__}",
        "a Router",
    )
    return built
