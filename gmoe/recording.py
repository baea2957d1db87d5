"""Record the decisions of routers inside models that cannot pass them on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from gmoe._checks import check_module
from gmoe._torch import in_backward, untraced
from gmoe.routing import Routing


@contextmanager
def record_routing(model: nn.Module) -> Iterator[list[Routing]]:
    """Record the :class:`Routing` of every router in ``model`` inside the block, in order.

    For models that cannot pass routings on, such as torchvision's ViT. It records only the thread
    that entered the block, and not what activation checkpointing recomputes.

    Args:
        model: any model that holds routers.

    Raises:
        RuntimeError: nothing was recorded in the block (also of a model that ``torch.compile``
            traced before it).

    Example:
        >>> with record_routing(vit) as routings:
        ...     loss = F.cross_entropy(vit(images), labels)
        >>> loss = loss + gmoe.aux_loss(routings)
    """
    check_module("model", model)
    routings: list[Routing] = []
    thread = threading.get_ident()
    is_open = True

    @untraced
    def keep(_: nn.Module, __: Any, routing: Routing) -> None:
        # A user's own module may have a method `route` that gives something else. A copy of the
        # model that is made inside the block keeps the hook.
        if not isinstance(routing, Routing) or threading.get_ident() != thread or not is_open:
            return
        # In a backward pass, checkpointing runs the forward again.
        if not in_backward():
            routings.append(routing)

    with ExitStack() as stack:
        for module in model.modules():
            if hasattr(type(module), "route"):  # a router, or what stands in for one
                stack.callback(module.register_forward_hook(keep).remove)
        try:
            yield routings
        finally:
            is_open = False
        if not routings:
            raise RuntimeError(
                "record_routing: nothing was recorded; run a model that holds MoE layers inside "
                "the block (one that was compiled and called before the block does not see the "
                "hooks: enter the block first)"
            )
