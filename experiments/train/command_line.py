"""What the command lines share: how they call a function, and end by an error."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import tyro

from experiments.train.checks import check_choice

SPARSE = "Sparse (CSR tensor support is in beta|invariant checks are implicitly)"
"""What torch warns of at each matrix that PyG makes."""


def fail(error: Exception, where: str = "") -> NoReturn:
    """End the command with an error of whoever called it."""
    print(f"error: {error}{where}", file=sys.stderr)
    sys.exit(2)


def stop() -> NoReturn:
    """End the command as somebody wished who pressed Ctrl-C."""
    print("stopped", file=sys.stderr)
    sys.exit(128 + signal.SIGINT)


def program(
    name: str, function: Callable[..., Any], about: str | None, extra: str = "experiments"
) -> Callable[..., Any]:
    """Return the entry point of ``python -m experiments.NAME``.

    It calls a function with the options of the command line. ``extra`` has all packages that it
    needs.
    """

    def main(args: Sequence[str] | None = None) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", SPARSE)
                return tyro.cli(
                    function, args=args, prog=f"python -m experiments.{name}", description=about
                )
        except ModuleNotFoundError as error:
            fail(error, where=f"; all that experiments need: pip install -e '.[{extra}]'")
        except (ValueError, OSError, ImportError) as error:
            fail(error)
        except KeyboardInterrupt:
            stop()

    return main


def chosen(
    kind: str, known: Mapping[str, tuple[str, str]], about: str | None, args: Sequence[str] | None
) -> tuple[str, str, list[str]]:
    """The command that the first argument names, where it is, and the arguments behind.

    ``known`` has a line of help and the place of each. Ends with the list of them if asked to.
    """
    name, *rest = (sys.argv[1:] if args is None else args) or ["--help"]
    if name in ("-h", "--help"):
        print(about, *(f"  {one:<12}{line}" for one, (line, _) in known.items()), sep="\n")
        sys.exit()
    try:
        check_choice(kind, name, known)
    except ValueError as error:
        fail(error)
    return name, known[name][1], rest
