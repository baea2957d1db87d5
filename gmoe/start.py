"""How a layer with experts starts: as copies of a dense layer, beside one, or by itself.

Shapes: E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch

from gmoe._checks import check_choice
from gmoe.routers import ROUTERS, Router, RouterLike, build_router

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
    shared_transform: bool = False,
    router: RouterLike | None = None,
    k: int = 1,
    router_kwargs: Mapping[str, object] | None = None,
) -> Start:
    """Decide how a layer starts: the only place that knows what ``None`` means.

    ``None`` is ``"shared"``, unless it is to follow a router: then it is ``"copies"`` if that
    router is sure to give weights that sum to 1, at the FLOPs of the dense layer. A factory of your
    own is not called to find out: beside it, ``None`` is ``"shared"``.

    Args:
        start: what the caller said.
        kinds: the kind of each expert, if they are convs. Different ones cannot be copies.
        shared_transform: see :class:`gmoe.MoEConv`; copies would not start as the dense layer.
        router: the router that ``None`` follows; ``None`` if it follows none.
        k, router_kwargs: of that router.

    Raises:
        ValueError: an unknown start, or copies that cannot be; and as
            :func:`gmoe.routers.build_router`.
    """
    can_be_copies = not shared_transform and all(kind == kinds[0] for kind in kinds)
    if start == "copies" and not can_be_copies:
        raise ValueError(
            "start: got 'copies' for several kinds or a shared transform, expected 'shared' or "
            "'plain'"
        )
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
    kwargs = _kwargs_by_name("copies", router, k, router_kwargs)
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

    With ``start="copies"``, a router that a name builds has weights that sum to 1, and token choice
    does not balance its load: experts without tokens cost nothing there, since all began as the
    same layer. Where nothing is gained by several experts, it may leave all tokens to one, which is
    the dense layer. An argument in ``kwargs`` goes first; a class, a factory or an instance is left
    as it is.

    Raises:
        ValueError: ``start="copies"``, and a router whose weights need not sum to 1 for each token;
            and as :func:`gmoe.routers.build_router`.
    """
    kwargs = _kwargs_by_name(start, router, k, kwargs)
    built = build_router(router, dim, num_experts=num_experts, k=k, kwargs=kwargs)
    if start == "copies" and not built.sums_to_one:
        raise ValueError(
            f"start: got 'copies' with {type(built).__name__}(k={built.k}, "
            f"weight={built.weight!r}), expected a router whose weights of a token sum to 1 "
            "(weight='straight_through' at k=1, 'normalized' above, no capacity, tokens that "
            "choose), or start='shared'"
        )
    return built


def _kwargs_by_name(
    start: Start,
    router: RouterLike,
    k: int,
    kwargs: Mapping[str, object] | None,
) -> Mapping[str, object] | None:
    """Return a router's arguments, with the defaults that a layer gives to one given by name."""
    if not isinstance(kwargs, Mapping | None):  # build_router refuses it
        return kwargs
    kwargs = dict(kwargs or {})
    defaults: dict[str, Any] = {}
    if start == "copies" and router in ("token_choice", "multi_centroid") and k == 1:
        defaults["weight"] = "straight_through"
    # The noise is that of the balanced router, which explores. Explicit arguments about balance or
    # noise are passed through unchanged.
    if start == "copies" and router == "token_choice" and kwargs.keys().isdisjoint(OF_BALANCE):
        defaults |= {"balance": None, "noise": True}
    return defaults | kwargs


def saved_by_name(
    start: Start, k: int, router_kwargs: Mapping[str, object] | None
) -> dict[str, Any]:
    """Return the classes of routers that come back as they were if their name is saved.

    Among copies, a name has defaults that its class has not.
    """
    return {
        name: router
        for name, router in ROUTERS.items()
        if _kwargs_by_name(start, name, k, router_kwargs) == (router_kwargs or {})
    }


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
