"""MoE: a router and its experts. Shapes: T tokens, D width, E experts, K experts a token, P pairs."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Literal, overload

from torch import Tensor, nn

from gmoe.experts import Experts
from gmoe.routers import Router
from gmoe.routing import Routing

_OWNERS: weakref.WeakKeyDictionary[Router, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()


def _holder(router: Router) -> nn.Module | None:
    """The living module that holds ``router``."""
    reference = _OWNERS.get(router)
    return None if reference is None else reference()


def claim_router(router: Router, owner: nn.Module) -> None:
    """Make ``owner`` the one module that holds ``router``.

    Raises:
        ValueError: another module, still alive, holds it.
    """
    holder = _holder(router)
    if holder is not None and holder is not owner:
        raise ValueError(
            "router: got an instance that another layer holds already, expected one of its own for each layer (pass a "
            "name or a factory where several layers are built)"
        )
    _OWNERS[router] = weakref.ref(owner)


class MoELayer(nn.Module, ABC):
    """What all layers with experts have in common, in an image model or a graph model: a router of their own, or none.

    Args:
        router: the router, which no other layer may hold; ``None`` where calls bring their :class:`Routing`.
        num_experts: E.
        k: experts per token where there is no router.

    Raises:
        ValueError: the router belongs to another layer.
    """

    def __init__(self, router: Router | None, num_experts: int, k: int = 1) -> None:
        super().__init__()
        if router is not None:
            claim_router(router, self)
        self.router = router
        self.num_experts = num_experts
        self.k = k
        self._experts_per_token = float(k)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.router is not None and _holder(self.router) is None:  # a deep copy holds the copied router
            claim_router(self.router, self)

    @property
    def experts_per_token(self) -> float:
        """Average number of experts of a token, by construction."""
        return self._experts_per_token if self.router is None else self.router.experts_per_token

    def follow(self, router: Router) -> None:
        """Note that calls will bring the decisions of ``router``, which another module holds: its K counts."""
        self.k = router.k
        self._experts_per_token = router.experts_per_token

    @abstractmethod
    def routed_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of all E experts, of which a token meets ``experts_per_token / E``."""


class MoE(MoELayer):
    r"""A layer of experts behind a router: :math:`y_t = \sum_e w_{te} f_e(x_t)`.

    A token without an expert gets zero; the model around adds the residual.

    Args:
        router: decides who goes where; belongs to this layer alone.
        experts: the stacked experts, as many as the router knows.

    Shapes:
        - ``x``: (..., T, D); leading dimensions are pools. ``batch`` and ``edge_index`` as in :class:`Router`.
        - returns (..., T, O), and the :class:`Routing` too with ``return_routing=True``. Losses are in the routing:
          ``loss = task + gmoe.aux_loss(routing)``.

    Raises:
        ValueError: E or D of router and experts differ, or the router belongs to another layer.

    Example:
        >>> layer = MoE(ExpertChoice(128, 8, k=1), MLPExperts(128, 512, 128, num_experts=8))
        >>> y = layer(x)
    """

    router: Router

    def __init__(self, router: Router, experts: Experts) -> None:
        if router.num_experts != experts.num_experts or router.dim != experts.in_features:
            raise ValueError(
                f"experts: got num_experts={experts.num_experts}, in_features={experts.in_features}, expected those of "
                f"the router, num_experts={router.num_experts}, dim={router.dim}"
            )
        super().__init__(router, experts.num_experts, router.k)
        self.experts = experts

    def reset_parameters(self) -> None:
        """Draw router and experts anew."""
        self.router.reset_parameters()
        self.experts.reset_parameters()

    def routed_parameters(self) -> Iterator[nn.Parameter]:
        return self.experts.parameters()

    @overload
    def forward(
        self,
        x: Tensor,
        batch: Tensor | None = ...,
        edge_index: Tensor | None = ...,
        *,
        return_routing: Literal[False] = ...,
    ) -> Tensor: ...
    @overload
    def forward(
        self, x: Tensor, batch: Tensor | None = ..., edge_index: Tensor | None = ..., *, return_routing: Literal[True]
    ) -> tuple[Tensor, Routing]: ...
    def forward(
        self,
        x: Tensor,
        batch: Tensor | None = None,
        edge_index: Tensor | None = None,
        *,
        return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, Routing]:
        """Route and run; see the class."""
        routing: Routing = self.router(x, batch, edge_index)
        y_TO = self.experts.mix(x.reshape(-1, x.size(-1)), routing)
        y = y_TO.view(*x.shape[:-1], y_TO.size(-1))
        return (y, routing) if return_routing else y
