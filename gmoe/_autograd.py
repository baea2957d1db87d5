"""Helpers of autograd functions and compiled code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from gmoe._torch import in_backward, in_transform, is_batched, is_tracing, untraced
from gmoe.portable import exported_as

UNSUPPORTED = (
    "torch.jit.trace, torch.func transforms (grad, vmap, jvp, …) and batches of gradients "
    "(vectorize=True) are not supported by gmoe's layers; use torch.compile, torch.export, or keep "
    "the module in Python"
)

LIBRARY = torch.library.Library("gmoe", "DEF")
"""Where torch finds the operators of :func:`operator`."""

LEAST_NORM = 1e-12
"""The smallest norm that a row is divided by, as in ``torch.nn.functional.normalize``."""

Value = TypeVar("Value")


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on; torch has none for the meta device, and fails if it is asked."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


class lazy(Generic[Value]):  # noqa: N801
    """A property that is computed once, and then kept by its object.

    Not ``functools.cached_property``: in Python 3.11 it takes a lock, which ``torch.compile``
    cannot trace.
    """

    def __init__(self, method: Callable[[Any], Value]) -> None:
        self.method = method
        self.__doc__ = method.__doc__

    def __get__(self, instance: object, _: type | None = None) -> Value:
        if instance is None:  # asked of the class, as a property gives itself
            return self  # type: ignore[return-value]
        result = self.method(instance)
        # From now on, Python finds the attribute of the instance, and does not ask here again. Not
        # by setattr, which frozen dataclasses refuse.
        object.__setattr__(instance, self.method.__name__, result)
        return result


def opaque(fake: Callable[..., object]) -> Callable[[Callable[..., Value]], Callable[..., Value]]:
    """Make a kernel an operator of torch, which compilers do not look into.

    Args:
        fake: called like the kernel, gives empty results of the right shapes.
    """

    def register(kernel: Callable[..., Value]) -> Callable[..., Value]:
        name = kernel.__name__.lstrip("_")
        schema = torch.library.infer_schema(kernel, mutates_args=())
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        # Not by torch.library.custom_op: its wrappers take 15 us a call, as long as a product. Of
        # them the kernel needs one: where a graph breaks, the compiler must not look inside it.
        LIBRARY.impl(name, untraced(kernel), "CompositeExplicitAutograd")
        torch.library.register_fake(f"gmoe::{name}", fake, lib=LIBRARY)
        dispatched: Callable[..., Value] = getattr(torch.ops.gmoe, name).default
        return dispatched

    return register


def operator(
    fake: Callable[..., object], portable: Callable[..., Any] | None = None
) -> Callable[[Callable[..., Value]], Callable[..., Value]]:
    """Make a kernel an operator of torch, in whose place an exported model has a portable form.

    Plain tensors go to the kernel itself: torch's dispatcher takes longer than the products of a
    small graph. Other runtimes do not know gmoe's operators.

    Args:
        fake: called like the kernel, gives empty results of the right shapes.
        portable: called like the kernel, gives the same results by plain operators of torch, on
            sizes that are not known. ``None`` (default) is the kernel, if it does so itself.
    """

    def register(kernel: Callable[..., Value]) -> Callable[..., Value]:
        dispatched = opaque(fake)(kernel)

        @exported_as(portable or kernel)
        def run_traced(*inputs: object) -> Value:
            return dispatched(*inputs)

        def run(x: Tensor, *inputs: object) -> Value:
            has_values = type(x) in (Tensor, nn.Parameter) and not x.is_meta
            if has_values and not torch.compiler.is_compiling() and not is_tracing():
                return kernel(x, *inputs)
            return run_traced(x, *inputs)

        return run

    return register


@opaque(fake=lambda like: like.new_empty((), dtype=torch.bool))
def outside_backward(like: Tensor) -> Tensor:
    """A truth value on the device of ``like``: whether this runs outside of a backward pass.

    Compiled code asks :func:`in_backward` once, when it is traced; this asks at each run.
    """
    return torch.full((), not in_backward(), device=like.device)


def unbatched(backward: Callable[..., Value]) -> Callable[..., Value]:
    """A ``backward`` that takes one gradient: a batch of them can crash torch's kernels.

    Write it closed under differentiation, since ``create_graph=True`` differentiates it again: of
    plain operators and of functions that have such a backward themselves, or by
    :func:`gradients_of`.

    Raises:
        RuntimeError: for a batch of gradients.
    """

    def checked(ctx: object, *grads: Tensor) -> Value:
        if not torch.compiler.is_compiling() and any(map(is_batched, grads)):
            raise RuntimeError(UNSUPPORTED)
        return backward(ctx, *grads)

    return checked


def gradients_of(
    plain: Callable[..., Tensor],
    values: Sequence[Tensor | None],
    needs: Sequence[bool],
    grad: Tensor,
) -> tuple[Tensor | None, ...]:
    """The gradients of a kernel in a backward pass that is differentiated itself.

    A kernel's own backward works in place, block by block, and cannot be differentiated. In a pass
    with ``create_graph=True``, differentiate its plain form on the inputs that were saved.

    Args:
        plain: the kernel's function by operators that can be differentiated twice.
        values: the inputs.
        needs: which of them need a gradient.
        grad: the gradient of the output.

    Returns:
        A gradient for each value, ``None`` for those that need none.
    """
    # A new view of each, so that a value that was computed from another one does not pass its
    # gradient on here.
    views = [value if value is None else value.view_as(value) for value in values]
    wanted = [
        view for view, needed in zip(views, needs, strict=True) if needed and view is not None
    ]
    found = iter(torch.autograd.grad(plain(*views), wanted, grad, create_graph=True))
    return tuple(next(found) if needed else None for needed in needs)


def row_norms(x: Tensor) -> Tensor:
    """(..., 1) the Euclidean norms of rows (..., D); that of a row of zeros counts as 1.

    So a row of zeros that is divided by its norm stays one, and its gradients are finite, the
    second ones too: those of ``vector_norm`` and of ``F.normalize`` are NaN there.
    """
    square = x.square().sum(dim=-1, keepdim=True)
    return square.masked_fill(square == 0, 1.0).sqrt().clamp(min=LEAST_NORM)


def refuse_second_order(_: Tensor) -> None:
    """Refuse a backward pass that is differentiated itself, as a hook of a sparse matrix's values.

    The gradients of torch's sparse matrices have none, and torch does not say so: a part of the
    second gradient would be missing.

    Raises:
        RuntimeError: in a backward pass with ``create_graph=True``.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph: got True with a sparse matrix whose values need a gradient, expected "
            "edge_index of shape (2, number of edges) and edge_weight"
        )


def refuse_transforms(*, traces: bool = True) -> None:
    """Refuse what a layer cannot be put into.

    Args:
        traces: refuse ``torch.jit.trace``, too, which layers on tokens take (default ``True``).

    Raises:
        RuntimeError: inside a trace or a transform of ``torch.func``.
    """
    if not torch.compiler.is_compiling() and (in_transform() or (traces and is_tracing())):
        raise RuntimeError(UNSUPPORTED)
