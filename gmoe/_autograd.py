"""What our autograd functions have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._compile import _disable_dynamo as untraced  # torch.compiler.disable, which imports the compiler
from torch.autograd.function import once_differentiable

__all__ = ["first_order", "untraced"]


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A ``backward`` that has no gradient of its own, and says so: torch's ``once_differentiable`` alone lets
    ``torch.autograd.grad(..., create_graph=True)`` go on with parts of the second-order gradient missing.

    Raises:
        RuntimeError: in a backward pass with ``create_graph=True``.
    """
    once = once_differentiable(backward)

    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph: got True, expected False, since gmoe's layers can be differentiated once only"
            )
        return once(ctx, *grads)

    return checked
