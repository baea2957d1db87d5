"""What a model was built with, and of which parts: names and numbers, and no code."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from numbers import Integral, Real
from typing import Any

from torch import nn

BY_HAND = (
    "no code runs from a file: torch.save(model.state_dict(), path), and to load it, build the "
    "model in the same way and call load_state_dict"
)
"""What to do with a model that cannot be saved."""


@dataclass(frozen=True)
class Recorded:
    """The arguments of a call, kept by what it built.

    They are names and numbers only, so that a model stays as light and as picklable as it is.

    Args:
        values: by name, as JSON gives them back: tuples are lists, known classes are their names.
        unsavable: why the other arguments have no such form, by name.
    """

    values: dict[str, Any]
    unsavable: dict[str, str]

    @classmethod
    def of(cls, given: Mapping[str, object], known: Mapping[str, object]) -> Recorded:
        """Write arguments as JSON holds them, as far as it can.

        Args:
            given: the arguments, by name.
            known: classes and factories that stand in a file by their names.
        """

        def encode(value: object) -> str | int | float | dict[str, Any]:
            if isinstance(value, Real):  # a number of NumPy's
                return int(value) if isinstance(value, Integral) else float(value)
            for name, registered in known.items():
                if value is registered:
                    return name
            if is_dataclass(value) and not isinstance(value, type):
                return {one.name: getattr(value, one.name) for one in fields(value) if one.init}
            raise TypeError(
                getattr(value, "__qualname__", f"an instance of {type(value).__name__}")
            )

        values = {}
        unsavable = {}
        for name, value in given.items():
            try:
                values[name] = json.loads(json.dumps(value, default=encode, allow_nan=False))
            except (TypeError, ValueError) as error:
                unsavable[name] = (
                    f"{name}: got {error}, expected names, numbers, lists or dicts of them, or a "
                    "class that has a name, to be saved"
                )
        return cls(values, unsavable)


@dataclass(frozen=True)
class AsBuilt:
    """What a module was made of, to tell later what somebody changed in it.

    Args:
        parts: the class of each part by its path, and the shape of each tensor by its name.
        options: the numbers, words, functions, and tuples of them, that the parts keep as
            attributes, by their paths.
    """

    parts: dict[str, object]
    options: dict[str, object]

    @classmethod
    def of(cls, module: nn.Module) -> AsBuilt:
        """Look at a module and all of its parts."""
        parts: dict[str, object] = {}
        options: dict[str, object] = {}
        for path, part in module.named_modules():
            parts[path] = type(part).__name__
            for name, value in vars(part).items():
                if name.startswith("_") or name == "training":
                    continue
                if inspect.isroutine(value):
                    value = value.__qualname__
                if isinstance(value, tuple | list):
                    value = tuple(value)
                    is_option = all(map(_is_plain, value))
                else:
                    is_option = _is_plain(value)
                if is_option:
                    options[f"{path}.{name}".lstrip(".")] = value
        for name, tensor in module.state_dict(keep_vars=True).items():
            parts[name] = tuple(getattr(tensor, "shape", ()))
        return cls(parts, options)

    def check(self, module: nn.Module, name: str, advice: str = BY_HAND) -> None:
        """Refuse a module that is not as it was built.

        An option that either of the two lacks is not compared.

        Args:
            module: the module.
            name: what its paths start with in a message.
            advice: what to do with a module that was changed (default: how it is saved).

        Raises:
            ValueError: a part or a tensor that is new, gone or another; an option that changed.
        """
        now = AsBuilt.of(module)
        for path in self.parts | now.parts:
            got, before = now.parts.get(path), self.parts.get(path)
            if got != before:
                where = f"{name}.{path}".strip(".")
                raise ValueError(
                    f"model: got {where}, {got or 'gone'}, expected {before or 'none'}, as it was "
                    f"built; {advice}"
                )
        for option, value in now.options.items():
            before = self.options.get(option, value)
            if not _is_same(value, before):
                raise ValueError(
                    f"{option}: got {value!r} of {name or 'the model'}, expected {before!r}, with "
                    f"which it was built: give it when you build the model, or {advice}"
                )


def _is_plain(value: object) -> bool:
    """True for a number or a word, or nothing."""
    return isinstance(value, Real | str | None)


def _is_same(value: object, before: object) -> bool:
    """True for equal words, and for numbers that are equal but for rounding.

    Routers that were pruned in steps have other factors than those pruned at once, by rounding.
    """
    if isinstance(value, Real) and isinstance(before, Real):
        return math.isclose(value, before, rel_tol=1e-9)
    return type(value) is type(before) and value == before


def given_to(call: Callable[..., object], local_names: Mapping[str, Any]) -> dict[str, object]:
    """Pick the arguments of a call out of its ``locals()``.

    A constructor asks once its defaults are resolved: a file then says what was built, whatever the
    defaults are when it is read.

    Args:
        call: the class or function.
        local_names: its ``locals()``; names that are no arguments are left out.
    """
    given: dict[str, object] = {}
    for one in inspect.signature(call).parameters.values():
        if one.kind is one.VAR_KEYWORD:
            given |= local_names[one.name]
        else:
            given[one.name] = local_names[one.name]
    return given
