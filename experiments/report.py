"""One page from finished runs: ``python -m experiments.report RUN... --out DIR [--data-root DIR]``.

    python -m experiments.train digits --router expert_choice --out runs/digits
    python -m experiments.report runs/digits --out runs/report

Writes ``index.html``, one file that holds all that it shows. Maps of patches and of nodes need the data of the run;
without them they are left out, and the page says so. A run folder that is broken or not finished is named, the report
of the others is made all the same, and the exit status is then 1.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape

from experiments.config import fail


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Which runs, and where the page goes."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders."""
    out: Path = Path("runs/report")
    """Folder of the page."""
    data_root: Path | None = None
    """Root folder of the data; of a user's own graph its file or folder, or the folder that holds it. By default where
    each run was trained on them."""


def main(args: Sequence[str] | None = None) -> None:
    """Entry point."""
    try:
        config = tyro.cli(ReportConfig, args=args, prog="python -m experiments.report", description=__doc__)
        from experiments.report_page import report  # and so torch, which --help does without

        path, failed = report(config.runs, config.out, config.data_root)
    except (ValueError, OSError) as error:
        fail(error)
    print(f"written to {path}")
    for reason in failed:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]left out:[/] {escape(reason)}", highlight=False)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
