"""Command lines of dataclasses: what is unknown is refused in one line, with what was probably meant.

Imports nothing heavy, so that help and errors come at once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any, NoReturn, TypeVar

import tyro
from rich.console import Console
from rich.markup import escape

T = TypeVar("T")


def nearest(name: str, known: Iterable[str], before: str, after: str = "") -> str:
    """A part of an error: what was probably meant, or nothing."""
    dashes = "-" * (len(name) - len(name.lstrip("-")))  # which all options share
    near = get_close_matches(name.lstrip("-"), [one.lstrip("-") for one in known], n=1, cutoff=0.7)
    return f"{before}did you mean {dashes}{near[0]}?{after}" if near else ""


def unknown_name(what: str, name: str, known: Iterable[str], more: str = "") -> str:
    """The error of a name that is none of those known."""
    known = list(known)
    return f"{what}: got {name!r}{nearest(name, known, ' (', ')')}, expected one of {', '.join(known)}{more}"


def parse(
    kind: type[T], args: Sequence[str] | None, prog: str, about: str | None = None, default: T | None = None
) -> T:
    """:func:`tyro.cli`; an option that there is not is a ``ValueError`` of one line."""
    config, unknown = tyro.cli(
        kind,
        prog=prog,
        description=about,
        args=sys.argv[1:] if args is None else args,
        config=(tyro.conf.AvoidSubcommands,),
        default=tyro.MISSING_NONPROP if default is None else default,
        return_unknown_args=True,
    )
    if unknown:
        name = next((arg for arg in unknown if arg.startswith("-")), unknown[0]).partition("=")[0]
        raise ValueError(f"{name}: unknown option of {prog.split()[-1]}{nearest(name, _options(config), ', ')}")
    return config


def choose(configs: Mapping[str, tuple[str, T]], args: Sequence[str], prog: str, what: str, about: str) -> T:
    """A configuration by name, each with a line of help, and what options change; errors as :func:`parse`."""
    if args and args[0] in configs:
        line, config = configs[args[0]]
        return parse(type(config), args[1:], f"{prog} {args[0]}", line, config)
    if args and args[0] not in ("-h", "--help"):
        raise ValueError(unknown_name(what, args[0], configs))
    return tyro.extras.overridable_config_cli(dict(configs), args=args, prog=prog, description=about)


def _options(config: Any, prefix: str = "--") -> Iterator[str]:
    for option in fields(config):
        name, value = f"{prefix}{option.name.replace('_', '-')}", getattr(config, option.name)
        if is_dataclass(value):
            yield from _options(value, prefix if option.name == "options" else f"{name}.")
        else:
            yield name


def fail(error: Exception, where: str = "") -> NoReturn:
    """End the command with an error of whoever called it."""
    Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}{where}", highlight=False)
    sys.exit(2)
