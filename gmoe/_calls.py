"""Call any model on a batch, in evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from gmoe._torch import is_compiler_loaded

Batch: TypeAlias = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""What a model is called with: a tensor, a tuple of arguments, or a dictionary of them by name."""


def arguments_of(batch: Any, name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call by position and by name; ``name`` is for an error."""
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, tuple | list):
        return tuple(batch), {}
    raise ValueError(
        f"{name}: got a batch of type {type(batch).__name__}, expected a tensor, a tuple of the "
        "model's arguments, or a dictionary of them by name; of PyG's data, (x, edge_index)"
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation inside the block, without gradients; its modes come back.

    A compiled model runs eagerly: compiled code does not call hooks that came after it.
    """
    # If the model is compiled, the compiler is loaded.
    stance = torch.compiler.set_stance("force_eager") if is_compiler_loaded() else nullcontext()
    modes = {part: part.training for part in model.modules()}
    try:
        with stance, torch.no_grad():
            model.eval()
            yield
    finally:
        for part, training in modes.items():
            part.training = training
