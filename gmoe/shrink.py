"""Take experts away from a layer: out of its stack, and from those that its router may choose.

:func:`gmoe.prune` says which ones, :func:`gmoe.load` repeats it. For a class of your own, register
what it has to do: ``@gmoe.shrink.keep_experts.register`` on ``def _(part: YourClass, kept)``. For a
router that chooses among ``self.of_alive(scores)``, register ``gmoe.Router.keep``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from typing import Any

from torch.nn.utils.parametrize import is_parametrized

from gmoe.experts import Experts, LinearExperts, MLPExperts
from gmoe.routers import ROUTERS, OracleRouter, Router

Kept = Sequence[int]
"""The numbers of the experts that stay, ascending; they are numbered anew."""


@singledispatch
def keep_experts(part: Any, kept: Kept) -> None:
    """Take all other experts away from a router or from experts, in place.

    Raises:
        ValueError: a class for which nobody registered what to do.
    """
    raise _refused(part)


def _refused(part: Any) -> ValueError:
    return ValueError(
        f"model: got {type(part).__name__}, of which no expert can be taken away, expected routers "
        "and experts of gmoe; of a class of your own, register "
        "gmoe.shrink.keep_experts; call gmoe.restack before, if parts are nn.Linears"
    )


def shrink(part: Any, kept: Kept) -> None:
    """:func:`keep_experts`, but nothing is known of a subclass of a router or of experts.

    It may compute something else, of weights that its base does not have.

    Raises:
        ValueError: see :func:`keep_experts`.
    """
    is_own = isinstance(part, Router | Experts) and type(part) not in keep_experts.registry
    if is_own and not is_parametrized(part):  # of which take() says more
        raise _refused(part)
    keep_experts(part, kept)


# experts ------------------------------------------------------------------------------------------


@keep_experts.register
def _linear_experts(experts: LinearExperts, kept: Kept) -> None:
    experts.keep(kept)


@keep_experts.register
def _mlp_experts(experts: MLPExperts, kept: Kept) -> None:
    shrink(experts.up, kept)
    shrink(experts.down, kept)
    experts.num_experts = len(kept)


# routers ------------------------------------------------------------------------------------------

_ROUTERS: Sequence[Any] = (*ROUTERS.values(), OracleRouter)
for _router in _ROUTERS:
    keep_experts.register(_router, _router.keep)
