"""Parts that GNNs are built from: activations, norms and residual maps.

Shapes: N nodes, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch_geometric.nn import BatchNorm, LayerNorm
from torch_geometric.nn.inits import reset
from torch_geometric.nn.resolver import activation_resolver, normalization_resolver

from gmoe._checks import check, check_choice, must_be_called

Residual: TypeAlias = Literal["none", "identity", "linear"]
Activation: TypeAlias = str | Callable[[Tensor], Tensor] | None
"""A name, a function or a module; ``None`` for none."""
Norm: TypeAlias = str | nn.Module | None
"""A name or a module; ``None`` for none."""


class Nodes(NamedTuple):
    """What is known of n nodes beside their features.

    Args:
        batch: (n,) the graph of each.
        batch_size: how many graphs there are.
        edge_index: the edges among them.
    """

    batch: Tensor | None = None
    batch_size: int | None = None
    edge_index: Tensor | None = None


def reset_parameters(model: nn.Module) -> None:
    """Draw all parameters anew."""
    for part in model.children():
        reset(part)


def activation_of(act: Activation) -> Callable[[Tensor], Tensor]:
    """Return the activation: by its name, or a function or module as it is; the identity for None.

    Raises:
        ValueError: what is none of them, or a name that PyTorch does not have.
    """
    if act is None:
        return nn.Identity()
    legal = "the name of one of PyTorch's activations, such as 'relu', a function or None"
    return _resolved("act", act, partial(activation_resolver, act), legal)


def norm_of(norm: Norm, width: int) -> nn.Module:
    """Return the norm: by its name, or a module as it is; the identity for ``None``.

    Raises:
        ValueError: what is none of them, or a name that is not one of PyG's norms of a width.
    """
    if norm is None:
        return nn.Identity()
    legal = "the name of one of PyG's norms of a width, such as 'batch_norm', a module or None"
    found: nn.Module = _resolved("norm", norm, partial(normalization_resolver, norm, width), legal)
    return found


def _resolved(name: str, value: object, resolve: Callable[[], Any], legal: str) -> Any:
    """What PyG finds for the argument ``name``, which has to be callable, and no class."""
    try:
        found = resolve()
    except (TypeError, ValueError):  # nobody's name, or of what takes other arguments
        found = None
    check(callable(found) and not isinstance(found, type), name, repr(value), legal)
    return found


def residual_of(residual: Residual, width: int, out: int) -> nn.Module | None:
    """Return the map from a hidden layer's input (N, width) to what is added to its output.

    ``None`` if nothing is added. Raw features are wide: a linear map of them would cost as much as
    the conv, so that only ``"linear"`` has one.
    """
    check_choice("residual", residual, Residual)
    if residual == "linear":
        return nn.Linear(width, out)
    return nn.Identity() if residual == "identity" and width == out else None


def activated(x: Tensor, act: Any, dropout: nn.Module) -> Tensor:
    """(N, D) the dropout of an activation.

    On a CPU a mask of truth values is slow to store, most of all in compiled code: plain ReLU and
    dropout are one function there, which keeps its output alone.
    """
    if type(dropout) is nn.Dropout and dropout.training and dropout.p < 1:
        is_relu = type(act) is nn.ReLU and x.device.type == "cpu"
        gains = dropout.p > 0 or torch.compiler.is_compiling()
        if is_relu and gains and not any(map(must_be_called, (act, dropout))):
            return _DroppedReLU.apply(x, dropout.p)
    dropped: Tensor = dropout(act(x))
    return dropped


class _DroppedReLU(torch.autograd.Function):
    """(N, D) dropout of a ReLU, of the same random numbers as ``nn.Dropout``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        y = x.relu()
        ctx.scale = 1 / (1 - p)
        if p:
            y = y * torch.empty_like(y).bernoulli_(1 - p).mul_(ctx.scale)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (y,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(grads[0] * ctx.scale, y, 0.0), None


def is_by_row(norm: nn.Module) -> bool:
    """True if a norm treats each row by itself in evaluation."""
    plain = norm.module if isinstance(norm, BatchNorm) else norm
    if isinstance(plain, nn.Identity | nn.LayerNorm):
        return True
    if isinstance(plain, LayerNorm):
        return plain.mode == "node"
    return isinstance(plain, nn.BatchNorm1d) and plain.track_running_stats
