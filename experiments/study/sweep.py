"""Run a study: ``python -m experiments.sweep STUDY [options]``.

    python -m experiments.sweep mine.py:STUDY --runs runs/again --results again
    python -m experiments.sweep grid --preset minesweeper --routers random --experts 4 8 --ks 1 2
    python -m experiments.sweep grid --preset cora --routers token_choice --jobs 8
    python -m experiments.sweep routers --router mine.py:MyRouter --columns mosaic facebook
    python -m experiments.sweep forces --data forces.npz --budget 1

``FILE.py:NAME`` (or ``package.module:NAME``) is a study of your own, which
``docs/tutorials/command-line.md`` shows how to write. ``grid`` is a preset over routers, numbers of
experts and experts per token. Every cell is a run folder; finished cells are skipped and an
unfinished one goes on, so that a study may be cut off at any time and started again. After every
cell, ``results/STUDY/COLUMN/ROW.json`` holds it; what is there is finished also where the run
folder is gone. A cell that cannot be run is named at the end, and the exit status is then 1.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from experiments.show.cells import read_prices, read_study, study_tables
from experiments.study import routers
from experiments.study.running import (
    ForcesConfig,
    SweepConfig,
    affordable,
    held_cells,
    refusal,
    run_cells,
)
from experiments.study.studies import Study, grid
from experiments.train.checks import check, check_first
from experiments.train.command_line import fail
from experiments.train.config import RunConfig
from experiments.train.signals import interrupt
from experiments.train.user_code import load_object

PROG = "python -m experiments.sweep"


@dataclass(frozen=True, kw_only=True)
class GridConfig(SweepConfig):
    """Rows of a preset, and where they go."""

    data_root: Path = Path("data")
    """Root folder of the data; of the preset `graph`, your own file."""
    preset: str = ""
    """The preset."""
    routers: tuple[str, ...] = (
        "random",
        "uniform",
        "token_choice",
        "expert_choice",
        "multi_centroid",
    )
    """The routers: some of these, attention_vote, oracle, and of images soft_slots. A dense model,
    and one four times as wide, are always there."""
    experts: tuple[int, ...] = (8,)
    """Numbers of experts, E."""
    ks: tuple[int, ...] = (1, 2)
    """Experts per token, K; of an E, larger ones are left out."""
    seeds: tuple[int, ...] | None = None
    """The seeds; by default those of the preset."""


@dataclass(frozen=True, kw_only=True)
class CellsConfig(SweepConfig):
    """Cells of a study, and where they go."""

    columns: tuple[str, ...] = ()
    """Data sets; by default all."""
    rows: tuple[str, ...] = ()
    """Models and controls; by default all."""
    price: bool = False
    """Run nothing: time what each cell would cost, in hours of a core, and count FLOPs.
    results/STUDY/prices.json keeps it, for --budget and for the tables."""


@dataclass(frozen=True, kw_only=True)
class RoutersConfig(CellsConfig):
    """Cells of the table of routers, and where they go."""

    data_root: Path = Path("data")
    """Folder of cifar10, imagenette2-160, pacs-64, heterophilous, facebook.npz and planted.
    Each is as its loader reads it."""
    router: str | None = None
    """Your own router, `FILE.py:Class` or `package.module:Class`: a row of its own, beside a dense
    model of equal FLOPs, token choice and a frozen random router.
    Columns are by default those that need no files."""
    conv: str | None = None
    """Your own conv, named likewise, in place of the column's; with --router or by itself."""
    k: int | None = None
    """With --router or --conv: experts per token of the row and its controls, by default 1."""


STUDIES: dict[str, tuple[str, SweepConfig | ForcesConfig]] = {
    "grid": ("A preset over routers, numbers of experts and experts per token.", GridConfig()),
    "routers": (
        "One table: the same routers on images and on graphs, a cell a file.",
        RoutersConfig(),
    ),
    "forces": (
        "Forces of molecules by experts of each element, beside dense models and controls.",
        ForcesConfig(),
    ),
}


def sweep_study(
    study: Study, config: SweepConfig, columns: Sequence[str] = (), rows: Sequence[str] = ()
) -> tuple[str, dict[str, str]]:
    """Run the cells that have no file: the tables, and by cell why it could not be run."""
    from experiments.train.results import write_json

    folder = config.results / study.name
    cells = study.cells(columns, rows)
    hours = {cell: price["hours"] for cell, price in read_prices(folder).items()}
    cells = affordable(cells, hours, config.budget, folder)
    write_json(folder / "study.json", study.described())

    def label(cell: str, _: RunConfig) -> dict[str, Any]:
        return {"label": study.rows[cell.partition("/")[2]].label}

    failed = run_cells(study.name, cells, config, label)
    return study_tables(read_study(folder)), failed


def sweep_grid(config: GridConfig) -> tuple[str, dict[str, str]]:
    """Run a grid over a preset."""
    changes: dict[str, Any] = {"data_root": config.data_root}
    if config.seeds is not None:
        changes["seeds"] = config.seeds
    study = grid(config.preset, config.routers, config.experts, config.ks, **changes)
    return sweep_study(study, config)


def sweep_routers(config: RoutersConfig) -> tuple[str, dict[str, str]]:
    """Run the cells of the table of routers that have no file."""
    check(config.k is None, "k", config.k, "none without --router or --conv")
    cells = routers.cells(config.columns, config.rows, config.data_root)
    failed = run_cells("routers", cells, config, measured_cell)
    return routers.cell_tables(routers.read_table(config.results / "routers")), failed


def measured_cell(_: str, config: RunConfig) -> dict[str, Any]:
    """What a cell of the table of routers holds beside the summary of its run."""
    from experiments.study.measured import measured

    return measured(config)


def sweep_own(config: RoutersConfig) -> tuple[str, dict[str, str]]:
    """Run a user's row of the table, and then the controls that it lacks.

    Controls of a column are left out if the row could not be run there. Returns the comparison,
    and by cell why it could not be run.
    """
    from experiments.study import own_router

    check(not config.rows, "rows", ", ".join(config.rows), "none with --router or --conv")
    own = own_router.own_row(config.router, config.conv, config.k)
    every = own_router.own_cells(own, config.columns, config.data_root)
    folder = config.results / "routers"
    failed = dict[str, str]()

    def run_rows(*rows: str) -> None:
        """Run what is missing of some rows; a cell that holds another recipe is named."""
        todo = {
            f"{column}/{row}": cells_of[row]
            for column, cells_of in every.items()
            for row in rows
            if row == own.row or f"{column}/{own.row}" not in failed
        }
        held = held_cells(todo, folder)
        for cell, described in held.items():
            # The name of the file tells the code: it may have been moved since.
            moved = {name: getattr(todo[cell], name, None) for name in ("router", "equal_to")}
            code = {name: value for name, value in moved.items() if value and ":" in value}
            held[cell] = described | code
            if own.conv is not None:
                held[cell] |= {"conv": [own.conv]}
            if why := refusal(cell, todo.pop(cell), held[cell], folder):
                failed[cell] = why
        failed.update(run_cells("routers", todo, config, measured_cell))

    run_rows(own.row)
    run_rows(*(control for control in own_router.CONTROLS if control != own.row))
    cells = own_router.read_row(own, folder)
    other = [column for column in every if own_router.costs_other_flops(own, cells.get(column, {}))]
    every = {column: every[column] for column in other}
    run_rows(own.matched)
    cells = own_router.read_row(own, folder)
    for column, rows in cells.items():
        cells[column] = {row: cell for row, cell in rows.items() if f"{column}/{row}" not in failed}
    cells = {column: rows for column, rows in cells.items() if own.row in rows}
    compared, missing = own_router.compare(own, cells)
    lines = [own_router.row_table(own, compared), *missing, *own_router.strangers(own, cells)]
    if compared:
        lines += [f"written to {path}" for path in own_router.write_row(own, compared, folder)]
    return "\n".join(lines), failed


def parse(args: Sequence[str]) -> tuple[str, SweepConfig | ForcesConfig]:
    """The study that the command line names, and where it goes."""
    if args and (args[0] in STUDIES or ":" in args[0]):
        study, *rest = args
        about, config = STUDIES.get(study, ("A study of your own.", CellsConfig()))
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
    if isinstance(config, RoutersConfig):
        is_own = config.router is not None or config.conv is not None
        check(not is_own or not config.price, "price", True, "no router or conv of your own")
        if config.price:
            cells = routers.cells(config.columns, config.rows, config.data_root)
            return priced(cells, config.results / "routers")
        return sweep_own(config) if is_own else sweep_routers(config)
    if isinstance(config, GridConfig):
        return sweep_grid(config)
    assert isinstance(config, CellsConfig)
    study = load_object("study", name)
    check(isinstance(study, Study), "study", repr(name), "an experiments.study.studies.Study")
    if config.price:
        return priced(study.cells(config.columns, config.rows), config.results / study.name)
    return sweep_study(study, config, config.columns, config.rows)


def priced(cells: dict[str, RunConfig], folder: Path) -> tuple[str, dict[str, str]]:
    """What cells would cost, in place of running them."""
    from experiments.study.price import price_cells

    return price_cells(cells, folder), {}


def main(args: Sequence[str] | None = None) -> None:
    """Entry point."""
    try:
        study, config = parse(sys.argv[1:] if args is None else args)
    except ValueError as error:
        fail(error)
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        table, failed = run_study(study, config)
    except KeyboardInterrupt as stopped:
        print("stopped; the same command continues", file=sys.stderr)
        sys.exit(128 + getattr(stopped, "number", signal.SIGINT))
    except (ValueError, OSError) as error:
        fail(error)
    finally:
        signal.signal(signal.SIGTERM, before)
    print(table)
    for cell, reason in failed.items():
        print(f"{cell}: {reason}", file=sys.stderr)
    if failed:
        sys.exit(1)
