"""What somebody called a constructor with, as a file holds it: names and numbers, and no code."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from numbers import Integral, Real
from typing import Any


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


class BuildsItself:
    """A model that a file can build by itself: it knows its constructor's arguments.

    A constructor sets ``self.recorded = Recorded.of(given_to(Class, locals()), known)`` while its
    local names are still its arguments; so does a subclass with its own constructor.
    """

    recorded: Recorded

    @property
    def config(self) -> dict[str, Any]:
        """The arguments of the constructor, as in ``config.json``."""
        return self.recorded.values


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
