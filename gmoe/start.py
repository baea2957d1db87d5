"""How a layer with experts starts: as copies of a dense layer, beside one, or by itself.

Shapes: E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch

from gmoe._checks import check_choice
from gmoe.routers import (
    ROUTERS,
    MultiCentroid,
    Router,
    RouterLike,
    TokenChoice,
    build_router,
)

Start: TypeAlias = Literal["copies", "shared", "plain"]
"""How a layer with experts starts.

- ``"copies"``: all experts start as one dense layer, and nothing runs beside them. The first
  forward is the dense layer's, since a token's weights sum to 1: other routers are refused.
- ``"shared"``: a shared expert, which is the dense layer, runs on every token; what the routed
  experts add starts at zero.
- ``"plain"``: independent experts, and nothing beside them.
"""

OF_BALANCE = ("balance", "balance_coef", "bias_rate", "noise")
"""Arguments of token choice that say how its load is kept even, or how it explores."""


def resolved_start(
    start: Start | None,
    kinds: Sequence[object] = (),
    *,
    router: RouterLike | None = None,
    k: int = 1,
    router_kwargs: Mapping[str, object] | None = None,
) -> Start:
    """Decide how a layer starts: the only place that knows what ``None`` means.

    ``None`` is ``"shared"``, unless it is to follow a router: then it is ``"copies"`` if that
    router is sure to give weights that sum to 1, at the FLOPs of the dense layer. A class or
    factory of your own is not called to find out: beside it, ``None`` is ``"shared"``.

    Args:
        start: what the caller said.
        kinds: the kind of each expert, if they are convs. Different ones cannot be copies.
        router: the router that ``None`` follows; ``None`` if it follows none.
        k, router_kwargs: of that router.

    Raises:
        ValueError: an unknown start, or copies that cannot be; and as
            :func:`gmoe.routers.build_router`.
    """
    can_be_copies = all(kind == kinds[0] for kind in kinds)
    if start == "copies" and not can_be_copies:
        raise ValueError("start: got 'copies' for several kinds, expected 'shared' or 'plain'")
    if start is not None:
        check_choice("start", start, Start)
        return start
    if router is None or not can_be_copies:
        return "shared"
    return "copies" if _sums_to_one(router, len(kinds), k, router_kwargs) else "shared"


def _sums_to_one(
    router: RouterLike,
    num_experts: int,
    k: int,
    router_kwargs: Mapping[str, object] | None,
) -> bool:
    """True if a router is sure to give each token weights that sum to 1."""
    if isinstance(router, Router):
        return router.sums_to_one
    if router not in [*ROUTERS, *ROUTERS.values()]:  # a factory: to call it may have effects
        return False
    kwargs = _with_defaults("copies", router, k, router_kwargs)
    # Whether the weights sum to 1 follows from the options: any width will do, without values.
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        built = build_router(router, dim=1, num_experts=num_experts, k=k, kwargs=kwargs)
    return built.sums_to_one


def build_layer_router(
    start: Start,
    router: RouterLike,
    dim: int,
    num_experts: int,
    k: int,
    kwargs: Mapping[str, object] | None,
) -> Router:
    """Build the router of a layer, by defaults that suit how the layer starts.

    With ``start="copies"``, token choice and centroids have weights that sum to 1, by name or by
    class, and token choice does not balance its load: experts without tokens cost nothing there,
    since all began as the same layer. Where nothing is gained by several experts, it may leave all
    tokens to one, which is the dense layer. An argument in ``kwargs`` goes first. A class or
    factory of your own is called as it is, and an instance is not changed.

    Raises:
        ValueError: ``start="copies"``, and a router whose weights need not sum to 1 for each token;
            and as :func:`gmoe.routers.build_router`.
    """
    kwargs = _with_defaults(start, router, k, kwargs)
    built = build_router(router, dim, num_experts=num_experts, k=k, kwargs=kwargs)
    if start == "copies" and not built.sums_to_one:
        raise ValueError(
            f"start: got 'copies' with {type(built).__name__}(k={built.k}, "
            f"weight={built.weight!r}), expected a router whose weights of a token sum to 1 "
            "(weight='straight_through' at k=1, 'normalized' above, no capacity, tokens that "
            "choose), or start='shared'"
        )
    return built


def _with_defaults(
    start: Start,
    router: RouterLike,
    k: int,
    kwargs: Mapping[str, object] | None,
) -> Mapping[str, object] | None:
    """Return a router's arguments, with the defaults that a layer gives to those of gmoe."""
    if not isinstance(kwargs, Mapping | None):  # build_router refuses it
        return kwargs
    given = dict(kwargs or {})
    if isinstance(router, str):
        router = ROUTERS.get(router, router)  # build_router refuses others
    if start != "copies" or router not in (TokenChoice, MultiCentroid):
        return given
    defaults: dict[str, Any] = {"weight": "straight_through"} if k == 1 else {}
    # The noise is that of the balanced router, which explores. Explicit arguments about balance or
    # noise are passed through unchanged.
    if router is TokenChoice and given.keys().isdisjoint(OF_BALANCE):
        defaults |= {"balance": None, "noise": True}
    return defaults | given


@contextmanager
def drawn_apart(from_dense: bool) -> Iterator[None]:
    """Keep torch's global generators untouched inside, so that dense layers get the same values.

    Experts and routers are drawn in here, from a seed of their own: with the same global seed, the
    dense layers that follow are those of a model without experts.

    Args:
        from_dense: the layer starts as a dense one, which was drawn before. A plain layer
            (``False``) draws from the global generators.
    """
    if not from_dense:
        yield
        return
    device = torch.get_default_device()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seed = int(torch.randint(2**62, (), device="cpu"))
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        yield
