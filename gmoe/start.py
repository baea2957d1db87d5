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


def check_start(start: Start | None) -> Start:
    """Return the start, ``"shared"`` for ``None``.

    Raises:
        ValueError: an unknown start.
    """
    if start is None:
        return "shared"
    check_choice("start", start, Start)
    return start


def start_of_convs(
    start: Start | None,
    kinds: Sequence[object],
    shared_transform: bool,
    router: RouterLike | None,
    k: int,
    router_kwargs: Mapping[str, object] | None,
) -> Start:
    """Return the start of experts that are convs; ``None`` follows the router.

    Copies cost the FLOPs of the dense layer, but need weights that sum to 1. So ``None`` is
    ``"copies"`` for a router that is sure to give these, and ``"shared"`` for all others. A factory
    of your own is not called to find out: beside it, ``None`` is ``"shared"``.

    Args:
        start: what the caller said.
        kinds: the kind of each expert. Different ones cannot be copies.
        shared_transform: see :class:`gmoe.MoEConv`; copies would not start as the dense layer.
        router, k, router_kwargs: of the layer; ``None`` if each call passes a routing.

    Raises:
        ValueError: an unknown start, or copies that cannot be; and as
            :func:`gmoe.routers.build_router`.
    """
    can_be_copies = not shared_transform and kinds.count(kinds[0]) == len(kinds)
    if start == "copies" and not can_be_copies:
        raise ValueError(
            "start: got 'copies' for several kinds or a shared transform, expected 'shared' or "
            "'plain'"
        )
    if start is not None or router is None or not can_be_copies:
        return check_start(start)
    if isinstance(router, Router):
        return "copies" if router.sums_to_one else "shared"
    if router not in [*ROUTERS, *ROUTERS.values()]:  # a factory: to call it may have effects
        return "shared"
    kwargs = _kwargs_for_copies(router, k, router_kwargs)
    # Whether the weights sum to 1 follows from the options: any width will do, without values.
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        built = build_router(router, dim=1, num_experts=len(kinds), k=k, kwargs=kwargs)
    return "copies" if built.sums_to_one else "shared"


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
    if start != "copies":
        return build_router(router, dim, num_experts=num_experts, k=k, kwargs=kwargs)
    built = build_router(
        router, dim, num_experts=num_experts, k=k, kwargs=_kwargs_for_copies(router, k, kwargs)
    )
    if not built.sums_to_one:
        raise ValueError(
            f"start: got 'copies' with {type(built).__name__}(k={built.k}, "
            f"weight={built.weight!r}), expected a router whose weights of a token sum to 1 "
            "(weight='straight_through' at k=1, 'normalized' above, no capacity, tokens that "
            "choose), or start='shared'"
        )
    return built


def _kwargs_for_copies(
    router: RouterLike, k: int, kwargs: Mapping[str, object] | None
) -> Mapping[str, object] | None:
    """Return a router's arguments, with the defaults that copies give to a router given by name."""
    if not isinstance(kwargs, Mapping | None):  # build_router refuses it
        return kwargs
    kwargs = dict(kwargs or {})
    defaults: dict[str, Any] = {}
    if router in ("token_choice", "multi_centroid") and k == 1:
        takes_more = kwargs.get("top_p") is not None
        defaults["weight"] = "normalized" if takes_more else "straight_through"
    # The noise is that of the balanced router, which explores; a caller who says anything of
    # balance or noise gets what the router makes of it.
    if router == "token_choice" and kwargs.keys().isdisjoint(OF_BALANCE):
        defaults |= {"balance": None, "noise": "spread"}
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
        if start != "copies" or _kwargs_for_copies(name, k, router_kwargs) == (router_kwargs or {})
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
