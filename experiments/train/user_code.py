"""Code that the user names: found, and refused where a file names it."""

from __future__ import annotations

import importlib.util
import pkgutil
import re
import sys
import traceback
from collections.abc import Collection
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from experiments.train.config import RunConfig


def load_object(option: str, name: str) -> Any:
    """What ``package.module:name`` or ``FILE.py:name`` names."""
    where, _, attribute = name.rpartition(":")
    try:
        if not where.endswith(".py"):
            return pkgutil.resolve_name(name)
        return getattr(_load_file(Path(where).resolve()), attribute)
    except (ImportError, AttributeError, FileNotFoundError) as error:
        raise ValueError(
            f"{option}: got {name!r}, which cannot be imported ({error}); modules are found in the "
            f"working directory and in PYTHONPATH, and FILE.py:{attribute} takes a file"
        ) from error
    except Exception as error:  # whatever the user's file does
        raise ValueError(f"{option}: got {name!r}, which raised {raised(error, name)}") from error


def load_conv(name: str) -> Any:
    """The class or function that ``FILE.py:name`` names; a name that gmoe knows stays a name."""
    return load_object("conv", name) if ":" in name else name


def code_of(config: RunConfig) -> list[str]:
    """The names of the user's code in a configuration."""
    return [name for _, name in _named(config) if name is not None and ":" in name]


def file_of(name: str) -> str:
    """The file that holds what ``package.module:name`` or ``FILE.py:name`` names.

    A module's is known once it is imported.
    """
    where = name.rpartition(":")[0]
    if where.endswith(".py"):
        return str(Path(where).resolve())
    return str(getattr(sys.modules.get(where), "__file__", where))


def frames_of(error: Exception, *names: str) -> list[traceback.FrameSummary]:
    """The lines of the user's code that an exception passed through, the innermost last."""
    files = {file_of(name) for name in names}
    return [one for one in traceback.extract_tb(error.__traceback__) if one.filename in files]


def raised(error: Exception, *names: str) -> str:
    """An exception of the user's code in one line, with the line of it that led there."""
    place = [*traceback.extract_tb(error.__traceback__)[-1:], *frames_of(error, *names)][-1]
    return f"{type(error).__name__}: {error} ({place.filename}, line {place.lineno})"


def check_trusted(config: RunConfig, file: Path, given: Collection[str] = ()) -> None:
    """Refuse code that a file names, wherever it lies, but for options that are ``given``.

    Somebody else may have written the file, and the code would run with all rights of the user.
    """
    for option, name in _named(config):
        if name is not None and ":" in name and option not in given:
            got = f"{name!r}, code that {file} names"
            raise ValueError(f"{option}: got {got}, expected --trust after you read that code")


def _named(config: RunConfig) -> list[tuple[str, str | None]]:
    """The options that may name code of the user, each with its value."""
    return [
        ("router", config.router),
        ("equal_to", config.equal_to),
        ("model", config.model),
        ("data", config.data),
        *(("conv", conv) for conv in config.convs()),
    ]


@cache
def _load_file(path: Path) -> ModuleType:
    """The module in a file, which runs once."""
    name = re.sub(r"\W", "_", str(path))
    spec: Any = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
