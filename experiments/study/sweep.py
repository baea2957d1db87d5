"""Run a study, a fixed list of variants: ``python -m experiments.sweep STUDY [options]``.

    python -m experiments.sweep mosaic --runs runs/again --results again
    python -m experiments.sweep grid --preset minesweeper --routers random --experts 4 8 --ks 1 2
    python -m experiments.sweep grid --preset cora --routers token_choice --jobs 8
    python -m experiments.sweep routers --router mine.py:MyRouter --columns mosaic facebook

``grid`` is a study of your own: a preset over routers, numbers of experts and experts per
token. Every variant is a run folder; finished variants are skipped and an unfinished one goes
on, so that a study may be cut off at any time and started again. After every variant,
``results/STUDY.json`` holds all that is finished; what it holds is finished also where the run
folder is gone. A variant that cannot be run is named at the end, and the exit status is then 1.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import tyro
from filelock import FileLock

from experiments.show.tables import study_table
from experiments.study.routers import cell_tables, cells, read_cells
from experiments.study.studies import RECORDED, Study, grid, recorded
from experiments.train.checks import check, check_first
from experiments.train.command_line import fail
from experiments.train.config import RunConfig
from experiments.train.files import read_json
from experiments.train.signals import interrupt
from experiments.train.user_code import code_of, raised

Results: TypeAlias = dict[str, dict[str, Any]]
"""By column and run, the summary."""

PROG = "python -m experiments.sweep"


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Where a study goes."""

    runs: Path | None = None
    """Folder of the run folders; by default runs/STUDY, or runs/grid-PRESET."""
    results: Path = Path("results")
    """Folder of the result files."""
    data_root: Path = Path("data")
    """Root folder of the data, in which facebook.npz lies.
    Of a grid over `graph`, your own file."""
    jobs: int = 1
    """Seeds of variants that are trained at once, each in a process.
    They share torch's threads."""
    progress: bool = True
    """Report progress: a bar, or where the output is a file, a line every few epochs."""


@dataclass(frozen=True, kw_only=True)
class GridConfig(SweepConfig):
    """Variants of a preset, and where they go."""

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
class RoutersConfig(SweepConfig):
    """Cells of the table of routers, and where they go."""

    data_root: Path = Path("data")
    """Folder of cifar10, imagenette2-160, pacs-64, heterophilous, facebook.npz and planted.
    Each is as its loader reads it."""
    columns: tuple[str, ...] = ()
    """Data sets; by default all."""
    rows: tuple[str, ...] = ()
    """Routers and controls; by default all."""
    router: str | None = None
    """Your own router, `FILE.py:Class` or `package.module:Class`: a row of its own, beside a dense
    model of equal FLOPs, token choice and a frozen random router.
    Columns are by default those that need no files."""
    conv: str | None = None
    """Your own conv, named likewise, in place of the column's; with --router or by itself."""
    k: int | None = None
    """With --router or --conv: experts per token of the row and its controls, by default 1."""


@dataclass(frozen=True, kw_only=True)
class ColumnsConfig(SweepConfig):
    """Columns of a study of starts, curves, molecules or unseen graphs, and where they go."""

    data_root: Path = Path("data")
    """Folder of planetoid, heterophilous and facebook.npz, of ogbg_mol..., or of
    chameleon_filtered.npz and tolokers.npz, each as its loader reads it."""
    columns: tuple[str, ...] = ()
    """Data sets; by default all."""


STUDIES: dict[str, tuple[str, SweepConfig]] = {
    name: (line, SweepConfig()) for name, line in RECORDED.items()
}
STUDIES["grid"] = ("A preset over routers, numbers of experts and experts per token.", GridConfig())
STUDIES["map"] = (
    "When experts pay: regimes, labels, and how a regime shows; with an oracle and controls.",
    SweepConfig(),
)
STUDIES["routers"] = (
    "One table: the same routers on images and on graphs, a cell a file.",
    RoutersConfig(),
)

STUDIES["starts"] = (
    "Experts that begin as copies of one layer, at the dense FLOPs: seeds 3 to 12.",
    ColumnsConfig(),
)
STUDIES["curves"] = (
    "Test scores over FLOPs: dense models and two shapes of experts by width.",
    ColumnsConfig(),
)
STUDIES["molecules"] = (
    "Experts on OGB's molecules, by atom and by molecule, beside GMoE rebuilt.",
    ColumnsConfig(),
)
STUDIES["unseen"] = (
    "The recipe for your own graph on two graphs on which nothing was chosen.",
    ColumnsConfig(),
)


def make_study(name: str, config: SweepConfig) -> tuple[str, Study]:
    """The name of a study's files, and the study."""
    if not isinstance(config, GridConfig):
        return name, recorded(name, config.data_root)
    changes: dict[str, Any] = {"data_root": config.data_root}
    if config.seeds is not None:
        changes["seeds"] = config.seeds
    return f"grid-{config.preset}", grid(
        config.preset, config.routers, config.experts, config.ks, **changes
    )


def sweep(name: str, study: Study, config: SweepConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """Run what is not finished: the study's results, and by variant why it could not be run."""
    from experiments.train.results import write_json

    path = config.results / f"{name}.json"
    finished = dict[str, dict[str, Any]]()
    labels = {variant.name: variant.label for variant in study.variants}

    def read_finished() -> None:
        """Add what the file holds, to which another command may add, too."""
        known = read_json(path, dict[str, Any])["variants"] if path.exists() else []
        finished.update({variant["variant"]: variant for variant in known})

    def collect() -> dict[str, Any]:
        """In the order of the study, and then what the file holds of others."""
        variants = [
            finished[variant]
            for variant in dict.fromkeys([*labels, *finished])
            if variant in finished
        ]
        return {"study": name, **vars(study), "variants": variants}

    def finish(variant: str, _: RunConfig, summary: Any) -> None:
        with changing(path):
            read_finished()
            finished[variant] = {"variant": variant, "label": labels[variant], **summary}
            write_json(path, collect())

    read_finished()
    configs = {variant.name: variant.config for variant in study.variants}
    failed = run_all(
        name, configs, {name: run["config"] for name, run in finished.items()}, path, config, finish
    )
    return collect(), failed


@contextmanager
def changing(path: Path) -> Iterator[None]:
    """Let one command at a time add to a file; others wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        yield


def sweep_cells(config: RoutersConfig) -> tuple[str, dict[str, str]]:
    """Run the cells that have no file: the table, and by cell why it could not be run."""
    check(config.k is None, "k", config.k, "none without --router or --conv")
    folder = config.results / "routers"
    todo = cells(config.columns, config.rows, config.data_root)
    failed = run_cells(todo, held_cells(todo, folder), config)
    return cell_tables(read_cells(folder)), failed


def held_cells(todo: Mapping[str, RunConfig], folder: Path) -> dict[str, Any]:
    """Of the cells that have a file, by name, the configuration that it holds."""
    paths = {cell: folder / f"{cell}.json" for cell in todo}
    return {
        cell: read_json(path, dict[str, Any])["config"]
        for cell, path in paths.items()
        if path.exists()
    }


def run_cells(
    todo: Mapping[str, RunConfig], held: Mapping[str, Any], config: RoutersConfig
) -> dict[str, str]:
    """Run the cells of the table of routers that are not held: by cell why it could not be run."""
    from experiments.study.measured import measured
    from experiments.train.results import write_json

    folder = config.results / "routers"

    def finish(cell: str, own: RunConfig, summary: Any) -> None:
        write_json(folder / f"{cell}.json", {**summary, **measured(own)})

    return run_all("routers", todo, held, folder, config, finish)


def sweep_own(config: RoutersConfig) -> tuple[str, dict[str, str]]:
    """Run a user's row of the table, and then the controls that it lacks.

    Controls of a column are left out if the row could not be run there. Returns the comparison,
    and by cell why it could not be run.
    """
    from experiments.study import own_router

    check(not config.rows, "rows", ", ".join(config.rows), "none with --router or --conv")
    own = own_router.own_row(config.router, config.conv, config.k)
    every = own_router.own_cells(own, config.columns, config.data_root)
    folder, failed = config.results / "routers", dict[str, str]()

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
        failed.update(run_cells(todo, {}, config))

    run_rows(own.row)
    run_rows(*(control for control in own_router.CONTROLS if control != own.row))
    found = own_router.read_row(own, folder)
    other = [column for column in every if own_router.costs_other_flops(own, found.get(column, {}))]
    every = {column: every[column] for column in other}
    run_rows(own.matched)
    found = own_router.read_row(own, folder)
    for column, rows in found.items():
        found[column] = {row: cell for row, cell in rows.items() if f"{column}/{row}" not in failed}
    found = {column: rows for column, rows in found.items() if own.row in rows}
    compared, missing = own_router.compare(own, found)
    lines = [own_router.row_table(own, compared), *missing, *own_router.strangers(own, found)]
    if compared:
        lines += [f"written to {path}" for path in own_router.write_row(own, compared, folder)]
    return "\n".join(lines), failed


def sweep_starts(config: ColumnsConfig) -> tuple[str, dict[str, str]]:
    """Run what has no file of the study's second stage.

    Returns the table, and by arm why it could not be run.
    """
    from experiments.study.starts import confirmed, confirmed_table, read_confirmed

    todo = confirmed(config.columns, config.data_root)
    _, failed = run_columns("starts-confirmed", todo, config)
    return confirmed_table(read_confirmed(config.results / "starts-confirmed")), failed


def sweep_curves(config: ColumnsConfig) -> tuple[str, dict[str, str]]:
    """Run the points that have no file: the table, and by point why it could not be run."""
    from experiments.study.curves import points, table

    results, failed = run_columns("curves", points(config.columns, config.data_root), config)
    return table(results), failed


def sweep_molecules(config: ColumnsConfig) -> tuple[str, dict[str, str]]:
    """Run the arms that have no file: the table, and by arm why it could not be run."""
    from experiments.study.molecules import COLUMNS, runs, table

    todo = runs(config.columns, config.data_root)
    results, failed = run_columns("molecules", todo, config, tuple(COLUMNS))
    return table(results), failed


def sweep_unseen(config: ColumnsConfig) -> tuple[str, dict[str, str]]:
    """Run the arms that have no file: the table, and by arm why it could not be run."""
    from experiments.study.unseen import COLUMNS, runs, table

    todo = runs(config.columns, config.data_root)
    results, failed = run_columns("unseen", todo, config, tuple(COLUMNS))
    return table(results), failed


def run_columns(
    name: str,
    todo: Mapping[str, RunConfig],
    config: SweepConfig,
    columns: Sequence[str] | None = None,
) -> tuple[Results, dict[str, str]]:
    """Run what has no file ``COLUMN/RUN.json``: all results, and by run why it could not be run.

    ``columns`` are those of the study, where they are not those of the starts.
    """
    from experiments.study.starts import read_results
    from experiments.train.results import write_json

    folder = config.results / name
    known = {
        f"{column}/{run}": summary["config"]
        for column, runs in read_results(folder, columns).items()
        for run, summary in runs.items()
    }

    def finish(cell: str, _: RunConfig, summary: Any) -> None:
        left_out = ("curve", "routing")  # long, and in the run folder
        kept = {part: value for part, value in summary.items() if part not in left_out}
        write_json(folder / f"{cell}.json", kept)

    failed = run_all(name, todo, known, folder, config, finish)
    return read_results(folder, columns), failed


def sweep_map(config: SweepConfig) -> tuple[str, dict[str, str]]:
    """Run the places of the map that its file lacks.

    Returns the table, and by place why it could not be run.
    """
    from experiments.study.regime_map import AXES, map_table, places, read_map
    from experiments.train.results import environment, write_json

    path = config.results / "regime-map-concept.json"
    found = read_map(path)
    done = [{axis: entry[axis] for axis in AXES} for entry in found["places"]]
    todo = {
        "-".join(map(str, place.values())): (place, own)
        for place, own in places()
        if place not in done
    }

    def finish(name: str, _: RunConfig, summary: Any) -> None:
        figures = {
            "test": summary["test"]["values"],
            "flops": summary["flops"],
            "hidden": summary["hidden"],
        }
        nmi = [layer["nmi"]["mean"] for layer in summary["routing"]]
        place = todo[name][0]
        with changing(path):  # of another command, which may have run the same place
            there = [
                entry for entry in read_map(path)["places"] if not place.items() <= entry.items()
            ]
            found["places"] = [*there, place | figures | {"nmi": nmi}]
            write_json(path, found | {"environment": environment()})

    failed = run_all(
        "regime-map", {name: own for name, (_, own) in todo.items()}, {}, path, config, finish
    )
    return map_table(found), failed


def run_all(
    name: str,
    variants: Mapping[str, RunConfig],
    known: Mapping[str, Any],
    where: Path,
    config: SweepConfig,
    finish: Callable[[str, RunConfig, Any], None],
) -> dict[str, str]:
    """Run the variants that are not known, by name, and hand each summary on; by name why one
    could not be run.

    A known one with another configuration is a ``ValueError``; ``where`` holds them.
    """
    from experiments.train.jobs import train_apart
    from experiments.train.loop import run
    from experiments.train.progress import Progress

    folder = config.runs if config.runs is not None else Path("runs") / name
    todo, failed = [], dict[str, str]()
    for variant, given in variants.items():
        own = replace(
            given, out=folder / variant, resume=True, progress=config.progress, jobs=config.jobs
        )
        if variant not in known:
            todo.append((variant, own))
            continue
        if why := refusal(variant, own, known[variant], where):
            raise ValueError(why)
    progress = Progress(
        sum(len(own.seeds) * own.epochs for _, own in todo), config.progress and config.jobs == 1
    )
    with closing(train_apart([own for _, own in todo])) as ready:
        for place, why in ready:
            variant, own = todo[place]
            try:
                if why:
                    raise ValueError(why)
                finish(variant, own, run(own, progress))
            except Exception as error:  # of this variant; the others go on
                is_told, code = isinstance(error, ValueError | OSError), code_of(own)
                if not is_told and not code:
                    raise
                failed[variant] = str(error) if is_told else raised(error, *code)
                progress.skip(len(own.seeds) * own.epochs)
                progress.finish(len(own.seeds) * own.epochs)
    return failed


def refusal(variant: str, own: RunConfig, held: Mapping[str, Any], where: Path) -> str:
    """Why a result that is there is not that of a variant; empty if it is.

    Where the data are not here, they cannot differ.
    """
    from experiments.train.run_folder import differences_of

    for option, (other, value) in differences_of(own, held).items():
        if option in ("digest", "contents") and value is None:
            continue
        there = f"{where} holds {variant} with {option}={other!r}"
        return f"results: {there}, expected {value!r}; choose other folders by --results and --runs"
    return ""


def parse(args: Sequence[str]) -> tuple[str, SweepConfig]:
    """The study that the command line names, and where it goes."""
    if args and args[0] in STUDIES:
        study, *rest = args
        about, config = STUDIES[study]
        # a command of its own, so that its errors lead to its own help
        given: dict[str, Any] = {"prog": f"{PROG} {study}", "description": about}
        return study, tyro.cli(type(config), args=rest, default=config, **given)
    if args and {"-h", "--help"}.isdisjoint(args):
        check_first("study", args, STUDIES)
    tyro.extras.overridable_config_cli(STUDIES, args=args, prog=PROG, description=__doc__)
    raise AssertionError("the help, or what is missing, has ended the command")


def main(args: Sequence[str] | None = None) -> None:
    """Entry point."""
    try:
        study, config = parse(sys.argv[1:] if args is None else args)
    except ValueError as error:
        fail(error)
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        if isinstance(config, RoutersConfig):
            is_own = config.router is not None or config.conv is not None
            table, failed = sweep_own(config) if is_own else sweep_cells(config)
        elif isinstance(config, ColumnsConfig):
            of_columns = {
                "starts": sweep_starts,
                "curves": sweep_curves,
                "molecules": sweep_molecules,
                "unseen": sweep_unseen,
            }
            table, failed = of_columns[study](config)
        elif study == "map":
            table, failed = sweep_map(config)
        else:
            results, failed = sweep(*make_study(study, config), config)
            table = study_table(results)
    except KeyboardInterrupt as stopped:
        print("stopped; the same command continues", file=sys.stderr)
        sys.exit(128 + getattr(stopped, "number", signal.SIGINT))
    except (ValueError, OSError) as error:
        fail(error)
    finally:
        signal.signal(signal.SIGTERM, before)
    print(table)
    for variant, reason in failed.items():
        print(f"{variant}: {reason}", file=sys.stderr)
    if failed:
        sys.exit(1)
