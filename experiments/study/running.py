"""Run the cells of a study that have no file yet, and go on where it was cut off."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from experiments.show.cells import read_cells
from experiments.train.checks import check
from experiments.train.config import DATA_RECORDS, RunConfig
from experiments.train.files import read_json
from experiments.train.user_code import code_of, raised

FILES = ("dataset", "data_root", "routing", "checkpoint")
"""Options that say which files a cell reads."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Cells of a study, and where they go."""

    columns: tuple[str, ...] = ()
    """Data sets; by default all."""
    rows: tuple[str, ...] = ()
    """Models and controls; by default all."""
    price: bool = False
    """Run nothing: time what each cell would cost, in hours of a core, and count FLOPs.
    results/STUDY/prices.json keeps it, for --budget and for the tables."""
    runs: Path | None = None
    """Folder of the run folders; by default runs/STUDY."""
    results: Path = Path("results")
    """Folder of the result files: STUDY/COLUMN/ROW.json."""
    budget: float | None = None
    """Core-hours for the cells that have no file, by the prices that --price measured.
    What does not fit into the rest of it, or has no price, is left out; prices are printed."""
    mix_commits: bool = False
    """Go on with columns that another commit of this code began."""
    progress: bool = True
    """Report progress: a bar, or where the output is a file, a line every few epochs."""


@dataclass(frozen=True, kw_only=True)
class ForcesConfig:
    """The data, where the study goes, and for how long."""

    data: Path = Path("forces.npz")
    """The file that experiments.convert forces wrote."""
    columns: tuple[str, ...] = ("sources",)
    """What is asked of it: sources, sources-wide, sources-other, sources-alike, sources-three and
    then sources-tuned."""
    rows: tuple[str, ...] = ()
    """Models; by default all."""
    runs: Path = Path("runs/forces")
    """Folder of single runs: figures and weights."""
    results: Path = Path("results")
    """Folder of the result files: forces/COLUMN/ARM.json."""


def run_cells(
    name: str,
    cells: Mapping[str, RunConfig],
    config: SweepConfig,
    labels: Mapping[str, str],
    finished: Callable[[str], None] = lambda _: None,
) -> dict[str, str]:
    """Run the cells of a study that have no file, and return by cell why it could not be run.

    A cell's file holds the summary of its run, and the label of its row. ``finished`` is called
    with the name of each cell that is there from then on.

    Raises:
        ValueError: a file that holds a cell of another configuration.
    """
    from experiments.train.loop import run
    from experiments.train.progress import Progress
    from experiments.train.results import write_json

    folder = config.results / name
    runs = config.runs if config.runs is not None else Path("runs") / name
    held = held_cells(cells, folder)
    todo = dict[str, RunConfig]()
    for cell, given in cells.items():
        own = replace(given, out=runs / cell, resume=True, progress=config.progress)
        if cell not in held:
            todo[cell] = own
        elif why := refusal(cell, own, held[cell], folder):
            raise ValueError(why)
    epochs = {cell: len(own.seeds) * own.epochs for cell, own in todo.items()}
    progress = Progress(sum(epochs.values()), config.progress)

    def run_cell(cell: str, own: RunConfig) -> None:
        label = {"label": labels[cell.partition("/")[2]]}
        write_json(folder / f"{cell}.json", {**run(own, progress), **label})
        finished(cell)

    def leave_out(cell: str) -> None:
        progress.skip(epochs[cell])
        progress.finish(epochs[cell])

    return tried(todo, run_cell, leave_out)


def tried(
    cells: Mapping[str, RunConfig],
    call: Callable[[str, RunConfig], None],
    leave_out: Callable[[str], None] = lambda _: None,
) -> dict[str, str]:
    """Call with each cell and its configuration, and return by cell why it could not be run.

    Data that one cell lacks are not looked for again: a download would fail as often as it is
    tried.
    """
    failed = dict[str, str]()
    lacking = dict[tuple[Any, ...], FileNotFoundError]()
    for cell, config in cells.items():
        files = tuple(getattr(config, name, None) for name in FILES)
        try:
            if files in lacking:
                raise lacking[files]
            call(cell, config)
        except Exception as error:  # of this cell; the others go on
            failed[cell] = why_not(error, config)
            leave_out(cell)
            if isinstance(error, FileNotFoundError) and not code_of(config):
                lacking[files] = error
    return failed


class Once(io.TextIOBase):
    """A file that writes a line once: what loaders say of a data set, they say for each cell."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.begun = ""
        self.said = set[str]()

    def write(self, text: str) -> int:
        *lines, self.begun = (self.begun + text).split("\n")
        for line in lines:
            if line not in self.said:
                self.said.add(line)
                print(line, file=self.file, flush=True)
        return len(text)


def why_not(error: Exception, config: RunConfig) -> str:
    """Why a cell cannot be run; a fault that is neither its options' nor its code's is raised."""
    if isinstance(error, ValueError | OSError):
        return str(error)
    if code := code_of(config):
        return raised(error, *code)
    raise error


def commits_of(missing: Iterable[str], folder: Path, mixes: bool) -> dict[str, str]:
    """By column, the commit that began it: this one, where a column has no cell yet.

    Of columns whose commit ``study.json`` does not hold, their first cell says it.

    Raises:
        ValueError: cells to run of a column that another commit began, unless it ``mixes``.
    """
    from experiments.train.results import commit

    study = folder / "study.json"
    commits: dict[str, str] = {}
    if study.exists():
        commits = read_json(study, dict[str, Any]).get("commits", {})
    own = commit().removesuffix("-dirty") or "unknown"
    for column in dict.fromkeys(cell.partition("/")[0] for cell in missing):
        cells = read_cells(folder, [column]).get(column, {})
        finished = [cell.get("environment", {}).get("commit") or own for cell in cells.values()]
        begun = commits.setdefault(column, [*finished, own][0])
        legal = f"{own[:10]}, which this is: check that one out, choose other folders by --results "
        legal += "and --runs, or ask for --mix-commits"
        got = f"{folder / column}, which commit {begun[:10]} began"
        check(mixes or begun == own, "results", got, legal)
    return commits


def held_cells(cells: Mapping[str, RunConfig], folder: Path) -> dict[str, Any]:
    """The configuration that each cell's file holds, by name, for cells that have a file."""
    paths = {cell: folder / f"{cell}.json" for cell in cells}
    return {
        cell: read_json(path, dict[str, Any])["config"]
        for cell, path in paths.items()
        if path.exists()
    }


def affordable(
    cells: Mapping[str, RunConfig], hours: Mapping[str, float], budget: float | None, folder: Path
) -> dict[str, RunConfig]:
    """The cells that are finished or fit into a budget, each into what those before it leave.

    A cell without a price was not timed, and fits into none.
    """
    if budget is None:
        return dict(cells)
    held = held_cells(cells, folder)
    left = budget
    taken = dict[str, RunConfig]()
    for cell, config in cells.items():
        price = 0.0 if cell in held else hours.get(cell, math.inf)
        if price <= left:
            taken[cell] = config
            left -= price
    return taken


def refusal(cell: str, own: RunConfig, held: Mapping[str, Any], folder: Path) -> str:
    """Why a file that is there is not that of a cell; empty if it is.

    Where the data are not here, they cannot differ.
    """
    from experiments.train.run_folder import differences_of

    for option, (other, value) in differences_of(own, held).items():
        if option in (*DATA_RECORDS, "weights") and value is None:
            continue
        there = f"{folder} holds {cell} with {option}={other!r}"
        return f"results: {there}, expected {value!r}; choose other folders by --results and --runs"
    return ""
