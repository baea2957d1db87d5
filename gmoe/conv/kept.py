"""Results that a graph keeps from call to call, as long as what they were computed from stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kept:
    """A result that a graph keeps, and the tensors that it was computed from, with their versions."""

    sources: tuple[Tensor | None, ...]
    versions: tuple[int | None, ...]
    result: Any

    def is_fresh(self, sources: tuple[Tensor | None, ...]) -> bool:
        """True if the result was computed from these tensors, and none was written to since."""
        same = all(old is new for old, new in zip(self.sources, sources, strict=True))
        return same and self.versions == versions_of(sources)


def versions_of(tensors: tuple[Tensor | None, ...]) -> tuple[int | None, ...]:
    """How often each tensor was written to."""
    return tuple(None if value is None else value._version for value in tensors)


class lazy:  # noqa: N801
    """A property that its object keeps once it was computed.

    ``functools.cached_property`` has a lock in Python 3.11, at which ``torch.compile`` stops.
    """

    def __init__(self, method: Callable[[Any], Any]) -> None:
        self.method = method
        self.__doc__ = method.__doc__

    def __get__(self, instance: Any, _: type | None = None) -> Any:
        result = self.method(instance)
        setattr(instance, self.method.__name__, result)  # which Python finds before it asks here again
        return result


def once(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of :class:`gmoe.Graph` whose results the graph keeps, but where a gradient is part of them."""

    @wraps(method)
    def kept(self: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():  # which knows no versions: compiled code computes it anew
            return method(self, **options)
        sources = (self.edge_weight, self.edge_attr, self.matrix_values)
        given = [value for value in (*sources, *options.values()) if isinstance(value, Tensor)]
        key = method.__name__, *options.items()
        if any(value.requires_grad or value.is_inference() for value in given):
            # Optimizers may write to what they train without a trace in its version.
            self._kept.pop(key, None)
            return method(self, **options)
        known = self._kept.get(key)
        if known is None or not known.is_fresh(sources):
            self._check_args()  # a user may have set them anew
            with torch.inference_mode(False):  # for training too
                known = self._kept[key] = Kept(sources, versions_of(sources), method(self, **options))
        return known.result

    return kept
