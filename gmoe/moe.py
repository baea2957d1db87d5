"""MoE: a router and its experts. Shapes: T tokens, D width, E experts, K experts a token, P pairs."""

from __future__ import annotations

import sys
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, overload

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from gmoe.experts import Experts
from gmoe.routing.router import Router, in_backward
from gmoe.routing.routing import Routing

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
        - ``x``: (..., T, D); leading dimensions are pools. ``pool`` and ``edge_index`` as in :class:`Router`.
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
        pool: Tensor | None = ...,
        edge_index: Tensor | None = ...,
        *,
        return_routing: Literal[False] = ...,
    ) -> Tensor: ...
    @overload
    def forward(
        self, x: Tensor, pool: Tensor | None = ..., edge_index: Tensor | None = ..., *, return_routing: Literal[True]
    ) -> tuple[Tensor, Routing]: ...
    def forward(
        self,
        x: Tensor,
        pool: Tensor | None = None,
        edge_index: Tensor | None = None,
        *,
        return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, Routing]:
        """Route and run; see the class."""
        routing: Routing = self.router(x, pool, edge_index)
        y_TO = self.experts.mix(x.reshape(-1, x.size(-1)), routing)
        y = y_TO.view(*x.shape[:-1], y_TO.size(-1))
        return (y, routing) if return_routing else y


@contextmanager
def record(model: nn.Module) -> Iterator[list[Routing]]:
    """Collect the :class:`Routing` of every router in ``model``, in the order of execution, for as long as it lasts.

    For models that cannot pass routings on, such as torchvision's ViT. Hooks on the routers; what activation
    checkpointing recomputes in the backward pass is not recorded again.

    Args:
        model: any model that holds routers.

    Raises:
        RuntimeError: a forward of ``model`` recorded nothing, or none took place (a model that ``torch.compile`` has
            traced before the block does not see the hooks); or a layer runs under *reentrant*
            checkpointing, which would cut the auxiliary losses off from the parameters (use ``use_reentrant=False``).

    Example:
        >>> with record(vit) as routings:
        ...     loss = F.cross_entropy(vit(images), labels)
        >>> loss = loss + gmoe.aux_loss(routings)
    """
    routings: list[Routing] = []
    before: list[int] = []

    def keep(_: nn.Module, __: Any, routing: Routing) -> None:
        if in_backward():
            return
        compiling = torch.compiler.is_compiling()  # which does not trace into reentrant checkpoints
        if not compiling and not torch.is_grad_enabled() and _in_reentrant_checkpoint():
            raise RuntimeError(
                "record: a MoE layer runs under reentrant checkpointing, which loses the gradients of its auxiliary "
                "losses; use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            )
        routings.append(routing)

    def start(_: nn.Module, __: Any) -> None:
        before.append(len(routings))

    def end(_: nn.Module, __: Any, ___: Any) -> None:
        if len(routings) == before.pop():
            raise RuntimeError(
                "record: a forward of the model recorded no routing; does it hold a MoE layer? (a model that was "
                "compiled and called before the block does not see the hooks: enter the block first)"
            )

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, Router):
                stack.callback(module.register_forward_hook(keep).remove)
        stack.callback(model.register_forward_pre_hook(start).remove)
        if not isinstance(model, Router):
            stack.callback(model.register_forward_hook(end).remove)
        yield routings
        if not routings:
            raise RuntimeError("record: nothing was recorded; run the model inside the block")


def _in_reentrant_checkpoint() -> bool:
    reentrant = torch.utils.checkpoint.CheckpointFunction.forward.__code__
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is reentrant:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
