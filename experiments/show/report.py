"""One page from finished runs: ``python -m experiments.report RUN... --out DIR [--data-root DIR]``.

    python -m experiments.train digits --router expert_choice --out runs/digits
    python -m experiments.report runs/digits --out runs/report

Writes ``index.html``, one file that holds all that it shows. Maps of patches need the
data of the run; without them they are left out, and the page says so. A run folder that is
broken or not finished is named, the report of the others is made all the same, and the exit
status is then 1.
"""

from __future__ import annotations

import sys
from pathlib import Path

import tyro

from experiments.train.command_line import program
from experiments.train.files import check_finished


def report(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    out: Path = Path("runs/report"),
    data_root: Path | None = None,
    trust: bool = False,
) -> None:
    """Make the page, and say why runs were left out.

    Args:
        runs: run folders.
        out: folder of the page.
        data_root: root folder of the data; of your own graph its file or folder, or the folder
            that holds it. By default where each run was trained on them.
        trust: import the router, conv, model and data that a run's config.json names, where
            they are code. It can do whatever you can.
    """
    check_finished(*runs)
    from experiments.show.report_page import write_report  # and so torch, which --help does without

    left_out = write_report(runs, out / "index.html", data_root, trust=trust)
    for reason in left_out:
        print(f"left out: {reason}", file=sys.stderr)
    if left_out:
        sys.exit(1)


main = program("report", report, __doc__)
