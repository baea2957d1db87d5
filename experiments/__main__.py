"""The commands: ``python -m experiments`` lists them, and ``python -m experiments.NAME --help`` explains one."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experiments.options import fail, unknown_name

COMMANDS = {
    "train": "Train a preset, or your own data, router or model.",
    "sweep": "Run a study, or a grid of your own.",
    "report": "Make one HTML page from finished runs.",
    "patches": "Draw which expert takes which patch of your images.",
    "benchmark": "Time layers, routers, and training.",
    "convert": "Bring a large graph into a folder to train from disk.",
    "planted": "Write a planted graph in OGB's layout, where OGB's own cannot be had.",
}


def main(args: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = list(sys.argv[1:] if args is None else args)
    if args and args[0] in COMMANDS:
        fail(ValueError(f"{args[0]}: is started by python -m experiments.{args[0]}"))
    if args and args[0] not in ("-h", "--help"):
        fail(ValueError(unknown_name("command", args[0], COMMANDS)))
    for name, line in COMMANDS.items():
        print(f"python -m experiments.{name:<10} {line}")


if __name__ == "__main__":
    main()
