"""Changes of a module after it was built, one at a time: what a user may do to any layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from gmoe._verify import is_option

Apply = Callable[[Any], None]

WORDS = ("add", "sum", "mean", "max", "zeros")
"""Values of options that are words; one that a module does not know makes it fail."""

FLOWS = ("source_to_target", "target_to_source")


class Change(NamedTuple):
    """A change, and what it does."""

    label: str
    apply: Apply


class Doubled(nn.Module):
    """A part of a module, and twice its output."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * self.part(*args, **kwargs)


class Biased(nn.Linear):
    """A linear layer that adds one."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input) + 1


def changes_of(module: nn.Module) -> Iterator[Change]:
    """All changes of a module that this file knows; not all of them leave one that runs."""
    for path, part in module.named_modules():
        at = path or "the module"
        for key, value in vars(part).items():
            if is_option(key):
                for other in _others(value):
                    yield Change(f"{at}.{key} = {other!r}", _setting(path, key, other))
        for key, _ in part.named_parameters(recurse=False):
            for label, apply in PARAMETER_CHANGES.items():
                yield Change(f"{at}.{key}: {label}", _at(path, key, apply))
        for key, _ in part.named_buffers(recurse=False):
            yield Change(f"{at}.{key}: moved", _at(path, key, _move_buffer))
        for key, _ in part.named_children():
            for label, replace in PART_CHANGES.items():
                yield Change(f"{at}.{key}: {label}", _replacing(path, key, replace))
        yield Change(f"{at}: hooked", _at(path, None, _hook))
        yield Change(f"{at}: of another forward", _at(path, None, _patch))
    yield from _ties(module)


def _others(value: object) -> list[object]:
    """Other values that an option may have."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, 0]
    if isinstance(value, float):
        return [2 * value + 0.5]
    if isinstance(value, str):
        return [word for word in (FLOWS if value in FLOWS else WORDS) if word != value]
    if isinstance(value, list):
        return [[other] * len(value) for item in value[:1] for other in _others(item)]
    if callable(value) and not isinstance(value, type):
        return [F.relu6, torch.tanh]
    return []


def _setting(path: str, key: str, value: object) -> Apply:
    def apply(module: Any) -> None:
        setattr(module.get_submodule(path), key, value)

    return apply


def _at(path: str, key: str | None, change: Callable[..., None]) -> Apply:
    def apply(module: Any) -> None:
        part = module.get_submodule(path)
        change(part) if key is None else change(part, key)

    return apply


def _replacing(path: str, key: str, replace: Callable[[Any], nn.Module]) -> Apply:
    def apply(module: Any) -> None:
        part = module.get_submodule(path)
        part._modules[key] = replace(part._modules[key])

    return apply


def _ties(module: nn.Module) -> Iterator[Change]:
    named = list(module.named_parameters())
    for place, (name, parameter) in enumerate(named):
        for other, value in named[:place]:
            if value.shape == parameter.shape:
                yield Change(f"{name} is {other}", _tie(name, other))


def _tie(name: str, other: str) -> Apply:
    def apply(module: Any) -> None:
        path, _, key = name.rpartition(".")
        setattr(module.get_submodule(path), key, module.get_parameter(other))

    return apply


# what is done to a parameter ----------------------------------------------------------------------


@torch.no_grad()
def _fill(part: Any, key: str, value: float) -> None:
    getattr(part, key).fill_(value)


def _freeze(part: Any, key: str) -> None:
    getattr(part, key).requires_grad_(False)


def _make_buffer(part: Any, key: str) -> None:
    value = getattr(part, key).detach().clone()
    delattr(part, key)
    part.register_buffer(key, value)


def _parametrize(part: Any, key: str) -> None:
    parametrizations.weight_norm(part, key)


def _remove(part: Any, key: str) -> None:
    setattr(part, key, None)


PARAMETER_CHANGES: dict[str, Callable[[Any, str], None]] = {
    "zeros": lambda part, key: _fill(part, key, 0.0),
    "ones": lambda part, key: _fill(part, key, 1.0),
    "frozen": _freeze,
    "a buffer": _make_buffer,
    "parametrized": _parametrize,
    "removed": _remove,
}


@torch.no_grad()
def _move_buffer(part: Any, key: str) -> None:
    buffer = getattr(part, key)
    if buffer.is_floating_point():
        buffer += 0.5


# what is done to a part ---------------------------------------------------------------------------


def _with_own_class(part: nn.Module) -> nn.Module:
    if isinstance(part, nn.Linear):
        part.__class__ = Biased
        return part
    return Doubled(part)


PART_CHANGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "doubled": Doubled,
    "nothing": lambda _: nn.Identity(),
    "of its own class": _with_own_class,
    "an activation behind it": lambda part: nn.Sequential(part, nn.Tanh()),
    "a norm before it": lambda part: nn.Sequential(nn.LayerNorm(8), part),
    "a ReLU6": lambda _: nn.ReLU6(),
}


def _hook(part: nn.Module) -> None:
    part.register_forward_hook(lambda _module, _args, out: 2 * out if out is not None else out)


def _patch(part: Any) -> None:
    forward = type(part).forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        return 2 * forward(part, *args, **kwargs)

    part.forward = doubled
