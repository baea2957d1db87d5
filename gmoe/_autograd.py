"""Helpers of the autograd functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

untraced = torch._compile._disable_dynamo  # torch.compiler.disable, which imports the compiler

UNSUPPORTED = (
    "torch.jit.trace, torch.export, torch.func transforms (grad, vmap, jvp, …) and batches of gradients "
    "(vectorize=True) are not supported by gmoe's layers; use torch.compile, or keep the module in Python"
)

in_transform = torch._C._are_functorch_transforms_active
"""True inside a transform of ``torch.func``."""


def is_watched() -> bool:
    """True under fake tensors, and where operators are counted, as FLOPs are; never in compiled code."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A ``backward`` that has no gradient of its own, and says so: torch's ``once_differentiable`` alone lets
    ``torch.autograd.grad(..., create_graph=True)`` go on with parts of the second-order gradient missing.

    Raises:
        RuntimeError: in a backward pass with ``create_graph=True``.
    """
    once = once_differentiable(backward)

    def checked(ctx: Any, *grads: Any) -> Any:
        refuse_second_order()
        # with which torch's kernels may crash
        if not torch.compiler.is_compiling() and any(map(torch._C._functorch.is_legacy_batchedtensor, grads)):
            raise RuntimeError(UNSUPPORTED)
        return once(ctx, *grads)

    return checked


def refuse_second_order(*_: Any) -> None:
    """In a backward pass, or as the hook of a tensor: refuse ``create_graph=True``."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph: got True, expected False, since gmoe's layers can be differentiated once only"
        )


def refuse_transforms() -> None:
    """Say in one sentence what a layer on a graph cannot be put into.

    Raises:
        RuntimeError: inside ``torch.jit.trace``, ``torch.export`` or a transform of ``torch.func``.
    """
    exported = torch.compiler.is_exporting()  # which fixes shapes that follow the data
    if exported or (not torch.compiler.is_compiling() and (torch._C._is_tracing() or in_transform())):
        raise RuntimeError(UNSUPPORTED)
