"""``python -m experiments.convert NAME [options]``: tables become data to train from."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from experiments.train.command_line import chosen

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
    _, module, rest = chosen("command", COMMANDS, __doc__, args)
    # The chosen one alone: forces import torch, which help on molecules does without.
    import_module(f"experiments.convert.{module}").main(rest)


if __name__ == "__main__":
    main()
