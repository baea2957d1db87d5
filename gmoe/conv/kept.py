"""Results that a graph keeps from call to call, until their sources change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from gmoe._torch import version_of


@dataclass(frozen=True)
class Kept:
    """A result that a graph keeps.

    Args:
        sources: the tensors from which it was computed.
        versions: of these tensors at that time, see :func:`versions_of`.
        result: what was computed.
    """

    sources: tuple[Tensor | None, ...]
    versions: tuple[int | None, ...]
    result: Any

    def is_fresh(self, sources: tuple[Tensor | None, ...]) -> bool:
        """True if the result was computed from these tensors, and nobody wrote to them since."""
        are_same = all(old is new for old, new in zip(self.sources, sources, strict=True))
        return are_same and self.versions == versions_of(sources)


def versions_of(tensors: tuple[Tensor | None, ...]) -> tuple[int | None, ...]:
    """How often each tensor was written to, by torch's own count; ``None`` for ``None``."""
    return tuple(None if value is None else version_of(value) for value in tensors)


def once(method: Callable[..., Any]) -> Callable[..., Any]:
    """Make a method of :class:`gmoe.Graph` compute its result once for the same options.

    The graph keeps the result until its edge arguments change, unless a gradient flows through it.
    """

    @wraps(method)
    def compute_once(self: Any, **options: Any) -> Any:
        # Compiled code has no versions, and computes the result at each call.
        if torch.compiler.is_compiling():
            return method(self, **options)
        sources = (self.edge_weight, self.edge_attr, self.matrix_values)
        tensors = [value for value in (*sources, *options.values()) if isinstance(value, Tensor)]
        key = method.__name__, *options.items()
        if any(value.requires_grad or value.is_inference() for value in tensors):
            # An optimizer may write to what it trains without changing the version, and tensors of
            # inference mode have no version.
            self._kept.pop(key, None)
            return method(self, **options)
        kept = self._kept.get(key)
        if kept is None or not kept.is_fresh(sources):
            self._check_args()  # a user may have set other ones
            with torch.inference_mode(False):  # the result is for training too
                kept = Kept(sources, versions_of(sources), method(self, **options))
            self._kept[key] = kept
        return kept.result

    return compute_once
