"""What the command lines share: how they call a function, and how they end by an error."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import tyro


def fail(error: Exception, where: str = "") -> NoReturn:
    """End the command with an error of whoever called it."""
    print(f"error: {error}{where}", file=sys.stderr)
    sys.exit(2)


def program(name: str, function: Callable[..., Any], about: str | None) -> Callable[..., Any]:
    """The entry point of ``python -m experiments.NAME``: calls a function with the options of the command line."""

    def main(args: Sequence[str] | None = None) -> Any:
        try:
            return tyro.cli(
                function, args=args, prog=f"python -m experiments.{name}", description=about
            )
        except ModuleNotFoundError as error:
            fail(error, where="; all that experiments need: pip install -e '.[convert]'")
        except (ValueError, OSError, ImportError) as error:
            fail(error)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)

    return main
