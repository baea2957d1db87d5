"""``python -m experiments.convert NAME [options]``: tables become data to train from."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from experiments.train.checks import check_choice
from experiments.train.command_line import fail

COMMANDS: dict[str, tuple[str, str]] = {
    "molecules": ("OGB's molecule sets; RDKit reads the SMILES.", "smiles"),
    "packages": ("Debian's package graph, of 50 sections.", "packages"),
    "synsets": ("WordNet's synsets, of 45 lexicographer files.", "synsets"),
    "definitions": ("What Python packages define and use.", "definitions"),
    "forces": ("Configurations with energies and forces, by xTB.", "forces"),
}
"""By the name of the command line: a line of help, and the module."""


def main(args: Sequence[str] | None = None) -> None:
    """Entry point."""
    given = sys.argv[1:] if args is None else args
    name, *rest = given or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__, *(f"  {name:<12}{line}" for name, (line, _) in COMMANDS.items()), sep="\n")
        sys.exit()
    try:
        check_choice("command", name, COMMANDS)
    except ValueError as error:
        fail(error)
    # The chosen one alone: forces import torch, which help on molecules does without.
    import_module(f"experiments.convert.{COMMANDS[name][1]}").main(rest)


if __name__ == "__main__":
    main()
