"""Results that a graph keeps from call to call, until their sources change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from gmoe._torch import version_of

Result = TypeVar("Result")
Options = ParamSpec("Options")


@dataclass(frozen=True)
class KeptResult(Generic[Result]):
    """A result that a graph keeps.

    Args:
        sources: the tensors from which it was computed.
        versions: of these tensors at that time, see :func:`versions_of`.
        result: what was computed.
    """

    sources: tuple[Tensor | None, ...]
    versions: tuple[int | None, ...]
    result: Result

    def is_fresh(self, sources: tuple[Tensor | None, ...]) -> bool:
        """True if the result was computed from these tensors, and nobody wrote to them since."""
        are_same = all(old is new for old, new in zip(self.sources, sources, strict=True))
        return are_same and self.versions == versions_of(sources)


def versions_of(tensors: tuple[Tensor | None, ...]) -> tuple[int | None, ...]:
    """How often each tensor was written to, by torch's own count; ``None`` for ``None``."""
    return tuple(None if value is None else version_of(value) for value in tensors)


class Keeper(Protocol):
    """An object that keeps results: a :class:`gmoe.Graph`."""

    edge_weight: Tensor | None
    edge_attr: Tensor | None
    matrix_values: Tensor | None
    _kept: dict[tuple[object, ...], KeptResult[Any]]

    def _check_args(self) -> None:
        """Refuse edge arguments that do not fit the edges."""


Owner = TypeVar("Owner", bound=Keeper)


def once(
    method: Callable[Concatenate[Owner, Options], Result],
) -> Callable[Concatenate[Owner, Options], Result]:
    """Make a method of :class:`gmoe.Graph` compute its result once for the same options.

    The graph keeps the result until its edge arguments change, unless a gradient flows through it.
    """

    @wraps(method)
    def compute_once(self: Owner, /, *args: Options.args, **options: Options.kwargs) -> Result:
        # Compiled code has no versions, and computes the result at each call.
        if torch.compiler.is_compiling():
            return method(self, *args, **options)
        sources = (self.edge_weight, self.edge_attr, self.matrix_values)
        inputs = (*sources, *args, *options.values())
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        key = (method.__name__, *args, *options.items())
        if any(value.requires_grad or value.is_inference() for value in tensors):
            # An optimizer may write to what it trains without changing the version, and tensors of
            # inference mode have no version.
            self._kept.pop(key, None)
            return method(self, *args, **options)
        kept = self._kept.get(key)
        if kept is None or not kept.is_fresh(sources):
            self._check_args()  # a user may have set other ones
            with torch.inference_mode(False):  # the result is for training too
                kept = KeptResult(sources, versions_of(sources), method(self, *args, **options))
            self._kept[key] = kept
        return kept.result

    return compute_once
