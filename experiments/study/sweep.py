"""Run a study: ``python -m experiments.sweep STUDY [options]``.

    python -m experiments.sweep mine.py:STUDY --runs runs/again --results again
    python -m experiments.sweep routers --router mine.py:MyRouter --columns mosaic digits
    python -m experiments.sweep width --columns packages --price
    python -m experiments.sweep forces --data forces.npz

``FILE.py:NAME`` (or ``package.module:NAME``) is a study of your own, which
``docs/tutorials/command-line.md`` shows how to write. Every cell is a run folder; finished cells
are skipped and an unfinished one goes on, so that a study may be cut off at any time and started
again. After every cell, ``results/STUDY/COLUMN/ROW.json`` holds it; what is there is finished also
where the run folder is gone. A cell that cannot be run is named at the end, and the exit status is
then 1.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Collection, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from experiments.show.cells import read_prices, read_study, study_tables
from experiments.study import routers
from experiments.study.running import (
    ForcesConfig,
    Once,
    SweepConfig,
    affordable,
    commits_of,
    held_cells,
    run_cells,
)
from experiments.study.studies import Study
from experiments.train.checks import check, check_first
from experiments.train.command_line import fail
from experiments.train.config import RunConfig
from experiments.train.signals import interrupt
from experiments.train.user_code import load_object

PROG = "python -m experiments.sweep"


@dataclass(frozen=True, kw_only=True)
class RoutersConfig(SweepConfig):
    """Cells of the table of routers, and where they go."""

    data_root: Path = Path("data")
    """Root folder of the data."""
    router: str | None = None
    """A row of your own: FILE.py:Class or package.module:Class, a subclass of gmoe.Router.
    Beside it token choice, a frozen random router, and a dense model of equal FLOPs. Without
    --columns, on digits-graph."""
    k: int = 1
    """Experts per token."""


STUDIES: dict[str, tuple[str, SweepConfig | ForcesConfig]] = {
    "routers": (
        "One table: the same routers on images and on graphs, a cell a file.",
        RoutersConfig(),
    ),
    "width": (
        "Dense models and experts at several widths, on large graphs: who wins at a cost.",
        SweepConfig(),
    ),
    "forces": (
        "Forces of molecules of four theories, by experts, dense models and controls.",
        ForcesConfig(),
    ),
}


def sweep_study(study: Study, config: SweepConfig) -> tuple[str, dict[str, str]]:
    """Run the cells that have no file: the tables, and by cell why it could not be run.

    The table of a column is shown so far behind each of its cells, too.
    """
    from experiments.train.results import write_json

    folder = config.results / study.name
    asked = study.cells(config.columns, config.rows)
    hours = {cell: price["hours"] for cell, price in read_prices(folder).items()}
    cells = affordable(asked, hours, config.budget, folder)
    held = held_cells(cells, folder)
    missing = [cell for cell in cells if cell not in held]
    if left := len(asked) - len(cells):
        print(f"{left} cells are beyond the budget, or have no price of --price", file=sys.stderr)
    commits = commits_of(missing, folder, config.mix_commits)
    write_json(folder / "study.json", study.described() | {"commits": commits})
    if missing:
        print(foretold(missing, hours), file=sys.stderr, flush=True)

    def finished(cell: str) -> None:
        if cell != missing[-1]:  # behind which all tables follow
            column = cell.partition("/")[0]
            print(tables_of(folder, asked, [column]), file=sys.stderr, flush=True)

    labels = {name: row.label for name, row in study.rows.items()}
    failed = run_cells(study.name, cells, config, labels, finished)
    return tables_of(folder, asked), failed


def tables_of(folder: Path, asked: Collection[str], only: Sequence[str] = ()) -> str:
    """The tables of a study; of what was not run, only the cells that were asked for."""
    study = read_study(folder)
    study["prices"] = {cell: price for cell, price in study["prices"].items() if cell in asked}
    return study_tables(study, only)


def price_missing(cells: dict[str, RunConfig], folder: Path) -> None:
    """Price the cells that have neither a file nor a price."""
    from experiments.study.price import price_cells

    known = {*read_prices(folder), *held_cells(cells, folder)}
    if todo := {cell: config for cell, config in cells.items() if cell not in known}:
        price_cells(todo, folder)


def foretold(cells: Sequence[str], hours: dict[str, float]) -> str:
    """How many cells are to run, and how long that takes."""
    if any(cell not in hours for cell in cells):
        return f"{len(cells)} cells to run; --price says how long they take"
    minutes = 60 * sum(hours[cell] for cell in cells)
    return f"{len(cells)} cells to run, about {minutes:.1f} minutes of a core"


def parse(args: Sequence[str]) -> tuple[str, SweepConfig | ForcesConfig]:
    """The study that the command line names, and where it goes."""
    if args and (args[0] in STUDIES or ":" in args[0]):
        study, *rest = args
        about, config = STUDIES.get(study, ("A study of your own.", SweepConfig()))
        # a command of its own, so that its errors lead to its own help
        given: dict[str, Any] = {"prog": f"{PROG} {study}", "description": about}
        return study, tyro.cli(type(config), args=rest, default=config, **given)
    if args and {"-h", "--help"}.isdisjoint(args):
        check_first("study", args, [*STUDIES, "FILE.py:NAME"])
    tyro.extras.overridable_config_cli(STUDIES, args=args, prog=PROG, description=__doc__)
    raise AssertionError("the help, or what is missing, has ended the command")


def run_study(name: str, config: SweepConfig | ForcesConfig) -> tuple[str, dict[str, str]]:
    """Run the study that the command line named: its table, and by cell why it could not be run."""
    if isinstance(config, ForcesConfig):
        from experiments.study.forces import run_forces  # torch, which help does without

        return run_forces(config)
    study: Any
    is_legal = config.budget is None or (config.budget > 0 and not config.price)
    got = f"{config.budget} with price={config.price}"
    check(is_legal, "budget", got, "core-hours above 0, without --price")
    if isinstance(config, RoutersConfig):
        study = routers.table(config.data_root, config.router, config.k)
        if config.router is not None:
            config = replace(config, columns=config.columns or ("digits-graph",))
            if not config.price:
                price_missing(study.cells(config.columns, config.rows), config.results / study.name)
    else:
        study = load_object("study", "experiments.study.width:WIDTH" if name == "width" else name)
        check(isinstance(study, Study), "study", repr(name), "an experiments.study.studies.Study")
    if config.price:
        from experiments.study.price import price_cells  # torch

        cells = study.cells(config.columns, config.rows)
        return price_cells(cells, config.results / study.name)
    return sweep_study(study, config)


def main(args: Sequence[str] | None = None) -> None:
    """Entry point."""
    try:
        study, config = parse(sys.argv[1:] if args is None else args)
    except ValueError as error:
        fail(error)
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        with redirect_stdout(Once(sys.stdout)):
            table, failed = run_study(study, config)
    except KeyboardInterrupt as stopped:
        print("stopped; the same command continues", file=sys.stderr)
        sys.exit(128 + getattr(stopped, "number", signal.SIGINT))
    except (ValueError, OSError) as error:
        fail(error)
    finally:
        signal.signal(signal.SIGTERM, before)
    print(table)
    for reason in dict.fromkeys(failed.values()):
        cells = ", ".join(cell for cell, why in failed.items() if why == reason)
        print(f"{cells}: {reason}", file=sys.stderr)
    if failed:
        sys.exit(1)
