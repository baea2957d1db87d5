"""Tables from result files: rewrite those of the docs, or with ``--check`` only compare.

A table stands between ``<!-- KIND: NAME -->`` and ``<!-- end -->``; it is generated from
``results/NAME.json``, or a folder.
``<!-- benchmark: NAME -->`` is what ``experiments.benchmark`` wrote, and
``<!-- presets: NAME -->`` has runs of ``experiments.train``, each beside its dense model.
``<!-- cells: routers -->`` is the table of ``experiments.sweep routers``.
``<!-- study: NAME -->`` is what ``experiments.sweep FILE.py:STUDY`` wrote into ``results/NAME``, a
table a column, ``<!-- study: NAME: COLUMN -->`` a column of it.
``<!-- front: width -->`` is what ``experiments.study.width`` found: scores, costs, and experts
beside the dense curve. ``<!-- pays: width -->`` is what experts and four times the width gain, by
graph.
``<!-- forces: forces -->`` is what ``experiments.sweep forces`` wrote, and what it did not run.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import tyro

from experiments.benchmark.tables import benchmark_table
from experiments.show.cells import read_study, study_tables
from experiments.show.tables import preset_table
from experiments.study.forces import forces_tables, read_forces
from experiments.study.front import front_tables, pays_table, read_front, what_pays
from experiments.study.routers import cell_tables, read_table
from experiments.train.checks import check, check_choice
from experiments.train.files import RESULTS, read_json, replacing

MAKERS: dict[str, Callable[..., str]] = {
    "presets": preset_table,
    "cells": cell_tables,
    "study": study_tables,
    "front": front_tables,
    "pays": pays_table,
    "forces": forces_tables,
    "benchmark": benchmark_table,
}
"""What makes a table, by its mark."""
FOLDERS: dict[str, Callable[[Path], Any]] = {
    "cells": read_table,
    "study": read_study,
    "front": read_front,
    "pays": lambda folder: what_pays(folder.parent),
    "forces": read_forces,
}
"""What reads the results of a mark that lie in a folder; others are a file."""
MARKED = re.compile(
    rf"(<!-- (?P<kind>{'|'.join(MAKERS)}): (?P<study>[\w-]+)"
    r"(?:: (?P<variants>[\w/ -]+?))? -->\n).*?(<!-- end -->)",
    re.DOTALL,
)
OTHERS = ("end", "figure", "breaks")
"""The marks that other commands fill in."""


def check_marks(page: str) -> None:
    """Refuse a mark that nothing fills in, and one without an end: both would stay as they are."""
    words = re.findall(r"<!-- (\w+)", page)
    for word, following in pairwise([*words, ""]):
        check_choice("mark", word, (*MAKERS, *OTHERS))
        check(word == "end" or following == "end", "mark", word, "<!-- end --> behind it")


def render(page: str, results: Path = RESULTS) -> str:
    """The page with all its tables generated anew."""
    check_marks(page)

    def table(match: re.Match[str]) -> str:
        kind = match["kind"]
        path = results / match["study"]
        if kind not in FOLDERS:
            path = path.with_suffix(".json")
        only = [] if match["variants"] is None else [match["variants"].split()]
        try:
            content = FOLDERS[kind](path) if kind in FOLDERS else read_json(path, dict[str, Any])
            made = MAKERS[kind](content, *only)
        except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"{path}: lacks what the mark '{kind}' shows ({error!r})") from error
        return f"{match[1]}{made}\n{match[5]}"

    return MARKED.sub(table, page)


def update(pages: tuple[Path, ...] = (), check: bool = False) -> None:
    """Generate the tables of pages anew.

    Args:
        pages: the pages; by default the README and all of docs.
        check: only compare; exit 1 where one is out of date.
    """
    for page in pages or [RESULTS.parent / "README.md", *(RESULTS.parent / "docs").rglob("*.md")]:
        try:
            new = render(old := page.read_text())
            if new != old and not check:
                with replacing(page) as fresh:
                    fresh.write_text(new)
        except (OSError, ValueError) as error:
            sys.exit(f"error: {page}: {error}")
        if new != old and check:
            sys.exit(f"{page} is out of date: run python -m experiments.tables")


def main(args: Sequence[str] | None = None) -> None:
    """Entry point."""
    tyro.cli(update, args=args, prog="python -m experiments.tables", description=__doc__)
