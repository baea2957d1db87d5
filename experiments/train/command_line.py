"""What the command lines share: how they call a function, show help, and end by an error."""

from __future__ import annotations

import io
import re
import signal
import sys
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import redirect_stdout
from typing import Any, NoReturn, TypeVar

import tyro

T = TypeVar("T")
SPARSE = "Sparse (CSR tensor support is in beta|invariant checks are implicitly)"
"""What torch warns of at each matrix that PyG makes."""
EMPTY_BOX = re.compile(r"^╭[^\n]*\n(│ (?!-)[^\n]*\n)*╰[^\n]*\n?", re.MULTILINE)


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


def with_short_help(parse: Callable[[], T], options: Collection[str], more: str) -> T:
    """Return what ``parse`` returns; of a help that it prints, only the named options.

    ``options`` are without dashes; ``more`` stands below the help.
    """
    # tyro draws its boxes, in which shortened() finds the options, where the output is UTF-8
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    try:
        with redirect_stdout(printed):
            return parse()
    except SystemExit as stop:
        if not stop.code:
            printed.seek(0)
            text = shortened(printed.read(), options)
            if sys.stdout.encoding != "utf-8":
                text = text.translate(str.maketrans("╭╮╰╯│─", "     -"))
            print(text, more, sep="\n")
        raise


def shortened(text: str, options: Collection[str]) -> str:
    """A help text in tyro's boxes, with the named options only; a box without any goes."""
    kept = []
    is_wanted = True
    for line in text.splitlines():
        if flag := re.match(r"│ (?:-\w, )?--([\w-]+)", line):
            is_wanted = flag[1] in options
        elif not line.startswith("│"):  # around a box
            is_wanted = True
        if is_wanted:
            kept.append(line)
    return EMPTY_BOX.sub("", "\n".join(kept)).rstrip()
