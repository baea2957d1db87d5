"""The command line of machines whose cases are numbers."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from typing import NamedTuple


class Numbers(NamedTuple):
    """What a command line asks for."""

    numbers: range
    only: tuple[str, ...]
    """Names to which the cases are limited; none if they are not."""

    @property
    def is_alone(self) -> bool:
        """One number is shown with all that came of it."""
        return len(self.numbers) == 1


def parse(
    machine: str, about: str | None, every: int, names: Collection[str], arguments: Sequence[str]
) -> Numbers:
    """Read ``[FIRST [LAST]] [NAME ...]``: one number, a range, or all from 0 to ``every``."""
    parser = argparse.ArgumentParser(prog=f"python -m tools.trust {machine}", description=about)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    about_first = "one number, or where a range begins; needed before names"
    parser.add_argument("first", nargs="?", type=int, help=about_first)
    parser.add_argument("last", nargs="?", type=int, help="the number behind the range")
    # Some names have commas.
    listed = ", ".join(map(repr, names))
    parser.add_argument("only", nargs="*", metavar="NAME", help=listed)
    args = parser.parse_args(arguments)
    if unknown := sorted({*args.only} - {*names}):
        parser.error(f"NAME: got {unknown}, expected some of {sorted(names)}")
    if args.first is None:
        return Numbers(range(every), ())
    last = args.first + 1 if args.last is None else args.last
    if not 0 <= args.first < last:
        parser.error(f"FIRST, LAST: got {args.first} and {last}, expected 0 <= FIRST < LAST")
    return Numbers(range(args.first, last), tuple(args.only))
