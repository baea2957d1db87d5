"""Call any model on a batch, and compare what comes out before and after a change of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from gmoe._torch import is_compiler_loaded

Batch: TypeAlias = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""What a model is called with: a tensor, a tuple of arguments, or a dictionary of them by name."""

Data: TypeAlias = Batch | Iterable[Batch]
"""A batch, or several of them, such as a list or a loader."""


def arguments_of(batch: Any, name: str = "data") -> tuple[tuple[Any, ...], dict[str, Any]]:
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


def batches_of(data: Data, name: str = "data") -> list[Any]:
    """The batches of the data; one batch by itself becomes a list of it.

    They are read once: an iterator has no second time, and a loader may give others then.

    Raises:
        ValueError: none, or what is no data.
    """
    if not isinstance(data, Iterable):
        got = type(data).__name__
        raise ValueError(f"{name}: got {got}, expected a batch, or several, such as a list")
    if hasattr(data, "stores"):  # PyG's data would be read attribute by attribute
        arguments_of(data, name)  # which refuses it
    batches = [data] if isinstance(data, Tensor | tuple | Mapping) else list(data)
    if not batches:
        raise ValueError(f"{name}: got none, expected at least one batch")
    return batches


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


def outputs_of(model: nn.Module, data: Data, name: str = "data") -> list[Tensor]:
    """All tensors of floats that a model gives for the data, in evaluation and without gradients.

    Each batch starts from the same seed: a few models draw numbers in evaluation, too.

    Args:
        model: the model.
        data: what it is called with.
        name: of the argument, for an error.

    Raises:
        ValueError: the model gives no floats.
    """
    found: list[Tensor] = []
    with evaluating(model), torch.random.fork_rng(devices=[]):
        for batch in batches_of(data, name):
            args, kwargs = arguments_of(batch, name)
            torch.default_generator.manual_seed(0)
            found += _floats(model(*args, **kwargs))
    if not found:
        raise ValueError(
            f"{name}: got some for which the model returns no floats, expected a model that does"
        )
    return found


def _floats(value: Any) -> Iterator[Tensor]:
    """The tensors of floats in tensors, dictionaries and sequences of them."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _floats(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _floats(item)


def finite(value: Tensor) -> Tensor:
    """The entries that are neither infinite nor NaN, as a vector."""
    return value[value.isfinite()]


def _difference(before: Tensor, after: Tensor) -> Tensor:
    """The difference, in double precision: zero where both are the same infinity.

    A model may mask logits by an infinite number.
    """
    one, other = before.double(), after.to(before.device).double()
    return torch.where(one == other, 0.0, one - other)


def relative_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The norm of the difference of outputs over their norm before, infinities left out."""
    if [value.shape for value in before] != [value.shape for value in after]:
        return math.inf
    pairs = zip(before, after, strict=True)
    change = math.hypot(*(float(_difference(one, other).norm()) for one, other in pairs))
    scale = math.hypot(*(float(finite(one).double().norm()) for one in before))
    if not math.isfinite(change):
        return math.inf
    if change == 0.0:
        return 0.0
    return change / scale if scale > 0.0 else math.inf
