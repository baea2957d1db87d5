"""Forces by experts: ``python -m experiments.sweep forces --data forces.npz --columns sources``.

PyG's ``SchNet`` on configurations that ``experiments.convert forces`` writes: one model for four
theories, two of which label few molecules. All arms have the same steps, batches and sweep: three
step sizes with the first seed, up to two more as long as the best is at an end, and validation (the
error of forces) chooses among them. The other seeds train with that one. The test parts are read
once for each seed, with the chosen step size.

Arms (:mod:`experiments.study.potentials`) and their order were fixed before the first result. A
dense model of equal FLOPs is no arm: experts by element take the dense model's FLOPs.

Changes are paired by seed, and have an interval over seeds. Of the main figure there is another,
over the molecules of the test: each has the sum of its errors, the mean over seeds.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from tqdm import tqdm

import gmoe
from experiments.show.cells import read_cells
from experiments.show.tables import Line, markdown
from experiments.study.potentials import BEST, OF_SOURCES, SOURCES, TUNED, Arm
from experiments.study.running import ForcesConfig
from experiments.train.build import num_parameters
from experiments.train.checks import check, check_choice
from experiments.train.data.forces import PARTS, Configurations, read_configurations
from experiments.train.files import read_json, replacing
from experiments.train.potential import Recipe, residuals, train
from experiments.train.results import environment, spread, write_json
from experiments.train.scores import Difference, shown

RATES = (4e-3, 8e-3, 1.6e-2)
"""Step sizes of the sweep, to begin with."""
MOST_RATES = 5
TESTS = PARTS[2:]
"""The parts that are read once; a file need not have the last two."""
RELATIVES = ((2, 1), (3, 1))
"""Pairs of sources whose difference is looked at: IPEA1 and GFN2 are relatives of GFN1."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A recipe, with its seeds and arms."""

    recipe: Recipe
    seeds: tuple[int, ...]
    arms: Mapping[str, Arm]
    controls: tuple[str, ...]
    """Arms that others are shown beside."""
    asked: tuple[int, ...]
    """The sources that the question is about: those that label few molecules."""
    told_as: tuple[int, int] | None = None
    """A source that is new, and a relative that models are told in its place."""
    after: str = ""
    """The column whose models are trained further."""


def _sources(asked: tuple[int, ...], width: int = 32, **changes: Any) -> Column:
    """One model for four theories; a batch has more of the rich ones."""
    column = Column(
        recipe=Recipe(
            width=width,
            steps=3_000,
            of_sources=tuple(2 if source in asked else 6 for source in range(SOURCES)),
        ),
        seeds=(0, 1, 2, 3, 4),
        arms=OF_SOURCES,
        controls=("embedded", "wider"),
        asked=asked,
    )
    return replace(column, **changes)


def _new(recipe: Recipe, arms: Mapping[str, Arm], after: str = "") -> Column:
    """GFN2 is new: models are told GFN1 in its place."""
    return _sources((3,), recipe=recipe, seeds=(0, 1, 2), arms=arms, told_as=(3, 1), after=after)


COLUMNS = {
    "sources": _sources((2, 3)),
    "sources-wide": _sources((2, 3), width=64, seeds=(0, 1, 2), arms=BEST),
    "sources-other": _sources((0, 1)),
    "sources-alike": _sources((2, 3)),
    "sources-three": _new(Recipe(width=32, steps=3_000, of_sources=(6, 6, 4, 0)), BEST),
    "sources-tuned": _new(
        Recipe(width=32, steps=500, of_sources=(0, 0, 0, 16)), TUNED, after="sources-three"
    ),
}
"""``sources-other`` is of a file in which other theories are poor, and ``sources-alike``, a
control, of one with four names for one theory; the others are of one file. ``sources-three`` does
not train on GFN2, of which ``sources-tuned`` has few molecules, then."""


# Runs ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Cell:
    """An arm on a column: its runs, each of which is a folder once it is finished."""

    column: str
    arm: str
    data: Configurations
    folder: Path

    @property
    def config(self) -> dict[str, Any]:
        """What figures depend on, beside step size and seed."""
        recipe = COLUMNS[self.column].recipe
        own = {"of_sources": [*recipe.of_sources], "digest": self.data.digest}
        return asdict(recipe) | own

    @property
    def tests(self) -> list[str]:
        """What is read once: a part of a source each."""
        of_sources = COLUMNS[self.column].recipe.of_sources
        names = [f"{part}/{source}" for part in TESTS for source in range(len(of_sources))]
        return [name for name in names if len(self.data.rows[name])]

    def run_folder(self, lr: float, seed: int) -> Path:
        """Of one run."""
        return self.folder / self.column / self.arm / f"lr-{lr:g}-seed-{seed}"

    def held(self, lr: float, seed: int) -> dict[str, Any] | None:
        """The figures of a run that is finished.

        Raises:
            ValueError: they are of other data or another recipe.
        """
        path = self.run_folder(lr, seed) / "result.json"
        if not path.exists():
            return None
        figures = read_json(path, dict[str, Any])
        legal = f"{self.config}; choose another --runs"
        check(figures["config"] == self.config, str(path), figures["config"], legal)
        return figures

    def sweep(self) -> dict[float, float]:
        """By step size, the error of forces in validation, of finished runs of the first seed.

        It is infinite where the training diverged.
        """
        first = COLUMNS[self.column].seeds[0]
        tried = [RATES[0] * 2**power for power in range(-MOST_RATES, MOST_RATES + len(RATES))]
        held = {lr: self.held(lr, first) for lr in tried}
        return {
            lr: math.inf if run["val"] is None else run["val"]["force"]
            for lr, run in held.items()
            if run is not None
        }

    def model(self, seed: int) -> nn.Module:
        """The model of a seed before training: drawn, or as the column before has left it.

        Raises:
            ValueError: the column before is not finished.
        """
        torch.manual_seed(seed)
        column = COLUMNS[self.column]
        arm = column.arms[self.arm]
        model = arm.build(column.recipe.width, self.data.energy_scale)
        if arm.begins:
            first = replace(self, column=column.after, arm=arm.begins)
            sweep = first.sweep()
            is_there = next_rate(sweep) is None and first.held(chosen_rate(sweep), seed)
            check(is_there, "columns", self.column, f"{column.after} before it")
            folder = first.run_folder(chosen_rate(sweep), seed)
            load_model(model, folder / "weights.safetensors")
        if arm.is_merged:
            trained = [self.data.rows[f"train/{source}"] for source in column.recipe.sources]
            system = self.data.molecules.system[torch.cat(trained)].mean(0, keepdim=True)
            model = gmoe.merge(model, system=system)
        return model

    def run(self, lr: float, seed: int) -> None:
        """Train, and write weights and figures; the test parts are not read."""
        recipe = COLUMNS[self.column].recipe
        model = self.model(seed)
        flops = flops_of_atom(model, self.data)
        folder = self.run_folder(lr, seed)
        steps = train(model, self.data, recipe, lr=lr, seed=seed)
        before = time.process_time()
        for _ in tqdm(steps, str(folder), recipe.steps, leave=False, disable=None):
            pass
        seconds = time.process_time() - before
        rows = torch.cat([self.data.rows[f"val/{source}"] for source in recipe.sources])
        val = residuals(model, self.data, rows).errors
        figures = {
            "config": self.config,
            "lr": lr,
            "seed": seed,
            "val": val if all(map(math.isfinite, val.values())) else None,
            "seconds": round(seconds, 2),
            "flops": flops,
            "parameters": num_parameters(model),
            "environment": environment(),
        }
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "weights.safetensors") as fresh:
            save_model(model, str(fresh))
        write_json(folder / "result.json", figures)

    def tested(self, lr: float, seed: int) -> dict[str, Any]:
        """The figures of a finished run with what the test parts say, which are read once.

        Raises:
            ValueError: it diverged.
        """
        figures = self.held(lr, seed)
        assert figures is not None
        folder = self.run_folder(lr, seed)
        check(figures["val"] is not None, str(folder), "a training that diverged", "finite errors")
        if "read" not in figures:
            model = self.model(seed)
            load_model(model, folder / "weights.safetensors")
            figures["read"] = self.read(model)
            write_json(folder / "result.json", figures)
        return figures

    def read(self, model: nn.Module) -> dict[str, Any]:
        """The errors on the test parts, and of differences between relatives; sums by molecule."""
        data = self.data
        found = {part: residuals(model, data, data.rows[part]) for part in self.tests}
        errors = {part: one.errors for part, one in found.items()}
        for source, relative in RELATIVES:
            parts = f"test/{source}", f"test/{relative}"
            if {*parts} <= {*found}:
                own, other = (data.batch(data.rows[part]) for part in parts)
                if torch.equal(own.pos, other.pos):  # both labeled the same configurations
                    size = 1000 * float((own.force - other.force).abs().mean())
                    apart = found[parts[0]].less(found[parts[1]])
                    errors[f"difference/{source}"] = apart.errors | {"size": size}
        asked = [f"test/{source}" for source in COLUMNS[self.column].asked]
        sums = {part: by_molecule(found[part].force, data, part) for part in asked}
        return {"errors": errors, "molecules": sums}


def next_rate(sweep: Mapping[float, float]) -> float | None:
    """The step size to try next; ``None`` when the best one is inside, or enough were tried."""
    for lr in RATES:
        if lr not in sweep:
            return lr
    best = min(sweep, key=lambda lr: (sweep[lr], lr))
    if len(sweep) >= MOST_RATES or min(sweep) < best < max(sweep):
        return None
    return best / 2 if best == min(sweep) else best * 2


def chosen_rate(sweep: Mapping[float, float]) -> float:
    """What validation chooses."""
    return min(sweep, key=lambda lr: (sweep[lr], lr))


def by_molecule(of_force: Tensor, data: Configurations, part: str) -> list[int]:
    """For each molecule of the test, the sum of its errors of forces in a part of it."""
    molecules = data.molecule[data.rows["test"]].unique()
    rows = data.rows[part]
    atoms = data.batch(rows).atoms
    place = torch.searchsorted(molecules, data.molecule[rows]).repeat_interleave(atoms)
    sums = torch.zeros(len(molecules)).index_add_(0, place, of_force.abs().sum(1))
    return sums.round().int().tolist()


def flops_of_atom(model: nn.Module, data: Configurations) -> float:
    """FLOPs of an energy, an atom, in evaluation, on the first configurations of validation."""
    given = data.batch(data.rows["val"][:16])
    with torch.no_grad():
        flops = gmoe.count_flops(model.eval(), **given.inputs)
    return round(flops / len(given.z), 1)


def run_forces(config: ForcesConfig) -> tuple[str, dict[str, str]]:
    """Run what is missing, in the order of the plan: the tables, and what could not be run."""
    failed = dict[str, str]()
    for name in config.columns:
        check_choice("columns", name, COLUMNS)
        column = COLUMNS[name]
        for row in config.rows:
            check_choice("rows", row, column.arms)
        try:
            data = read_configurations(config.data)
            sources = len(column.recipe.of_sources)
            check(data.sources == sources, str(config.data), f"{data.sources} sources", sources)
        except ValueError as error:
            failed[name] = str(error)
            continue
        if column.told_as:
            data = data.told_as(*column.told_as)
        cells = {
            arm: Cell(column=name, arm=arm, data=data, folder=config.runs)
            for arm in config.rows or column.arms
        }
        for cell in cells.values():  # of a command that was cut off behind a run
            write_cell(cell, config.results)
        for cell, lr, seed in missing_runs(cells, column.seeds):
            cell.run(lr, seed)
            print(f"{name}/{cell.arm}, step size {lr:g}, seed {seed}", file=sys.stderr, flush=True)
            write_cell(cell, config.results)
    return forces_tables(read_forces(config.results / "forces"), config.columns), failed


def missing_runs(
    cells: Mapping[str, Cell], seeds: Sequence[int]
) -> Iterator[tuple[Cell, float, int]]:
    """What is to run next, as long as whoever asks runs it."""
    for cell in cells.values():
        while (lr := next_rate(cell.sweep())) is not None:
            yield cell, lr, seeds[0]
    for seed in seeds[1:]:
        for cell in cells.values():
            lr = chosen_rate(cell.sweep())
            if cell.held(lr, seed) is None:
                yield cell, lr, seed


def write_cell(cell: Cell, results: Path) -> None:
    """Write the result file of an arm, once its sweep is finished."""
    sweep = cell.sweep()
    if next_rate(sweep) is not None:
        return
    lr = chosen_rate(sweep)
    column = COLUMNS[cell.column]
    seeds = [seed for seed in column.seeds if cell.held(lr, seed) is not None]
    runs = [cell.tested(lr, seed) for seed in seeds]
    read = [run["read"] for run in runs]
    summary: dict[str, Any] = {
        "label": column.arms[cell.arm].label,
        "lr": lr,
        "sweep": {
            f"{tried:g}": value if math.isfinite(value) else None
            for tried, value in sorted(sweep.items())
        },
        "seeds": seeds,
        "val": spread_of([run["val"] for run in runs]),
        **{part: spread_of([run["errors"][part] for run in read]) for part in read[0]["errors"]},
        "molecules": {
            part: np.mean([run["molecules"][part] for run in read], axis=0).round().tolist()
            for part in read[0]["molecules"]
        },
        "seconds": spread([run["seconds"] for run in runs]),
        "flops": runs[0]["flops"],
        "parameters": runs[0]["parameters"],
        "config": cell.config,
        "environment": runs[-1]["environment"],
    }
    write_json(results / "forces" / cell.column / f"{cell.arm}.json", summary)


def spread_of(runs: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The errors of forces and energies of some runs."""
    return {name: spread([run[name] for run in runs]) for name in runs[0]}


# Tables -------------------------------------------------------------------------------------------

Shown: TypeAlias = Mapping[str, Any]
"""The summary of an arm."""


def read_forces(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The finished arms, by column: what the pages are about first, then in the plan's order."""
    planned = [arm for column in COLUMNS.values() for arm in column.arms]
    return read_cells(folder, COLUMNS, dict.fromkeys(["element", *planned]))


def change(arm: Shown, control: Shown, parts: Sequence[str], error: str = "force") -> str:
    """How much larger an error is than a control's, in percent, with its 95 % intervals.

    Paired by seed: it is the mean of the logarithms of ratios, over the parts. The first interval
    is over seeds; of forces of the sources that are asked about, a second one is over molecules.
    """
    if arm is control:
        return "–"
    ours = logs_by_seed(arm, parts, error)
    theirs = logs_by_seed(control, parts, error)
    found = Difference.of([ours[seed] - theirs[seed] for seed in ours if seed in theirs])
    intervals = [found] if found.n > 1 else []
    if error == "force" and {*parts} <= {*arm["molecules"]}:
        intervals.append(over_molecules(found.mean, arm, control, parts))
    texts = [f"{_percent(one.low)} to {_percent(one.high)}" for one in intervals]
    return f"{_percent(found.mean)} ({'; '.join(texts)})" if texts else _percent(found.mean)


def _percent(log_ratio: float) -> str:
    return f"{100 * math.expm1(log_ratio):+.1f}"


def logs_by_seed(arm: Shown, parts: Sequence[str], error: str) -> dict[int, float]:
    """The mean logarithm of an arm's errors."""
    values = [[math.log(value) for value in arm[part][error]["values"]] for part in parts]
    return dict(zip(arm["seeds"], map(fmean, zip(*values, strict=True)), strict=True))


def over_molecules(mean: float, arm: Shown, control: Shown, parts: Sequence[str]) -> Difference:
    """A mean logarithm of ratios, with the spread that it has by the draw of test molecules.

    The logarithm of a ratio of sums varies, to first order, as the sum of how much larger a share
    of the one sum each molecule has than of the other.
    """
    shares = []
    for one in (arm, control):
        sums = np.array([one["molecules"][part] for part in parts])
        shares.append((sums / sums.sum(axis=1, keepdims=True)).mean(axis=0))
    more = shares[0] - shares[1]
    n = len(more)
    return Difference.around(mean, float(np.square(more).sum()) * n / (n - 1), n)


def asked_table(column: Column, arms: Mapping[str, Shown]) -> str:
    """A line an arm: forces of the sources asked about, beside the controls', and costs."""
    lines = []
    asked = [f"test/{source}" for source in column.asked]
    for arm in arms.values():
        line = {"model": arm["label"], "step size": f"{arm['lr']:g}", "n": str(len(arm["seeds"]))}
        line |= _errors(arm, column.asked)
        for name in column.controls:
            if name in arms:
                label = f"{_numbers(column.asked)} beside {column.arms[name].label}, %"
                line[label] = change(arm, arms[name], asked)
        line["kFLOP an atom"] = f"{arm['flops'] / 1000:.0f}"
        line["parameters"] = f"{arm['parameters']:,}"
        line["CPU s"] = f"{arm['seconds']['mean']:.0f}"
        lines.append(line)
    return markdown(lines)


def beside_table(column: Column, arms: Mapping[str, Shown]) -> str:
    """A line an arm: other errors, beside the first control's in percent, and differences."""
    sources = range(len(column.recipe.of_sources))
    others = tuple(source for source in sources if source not in column.asked)
    beside_first = {
        f"the same beside {column.arms[column.controls[0]].label}": ("test", others, "force"),
        f"energies of {_numbers(column.asked)}": ("test", column.asked, "energy"),
        "of larger molecules": ("larger", column.asked, "force"),
        "of more elements": ("elements", column.asked, "force"),
    }
    lines = []
    for arm in arms.values():
        line = {"model": arm["label"]} | _errors(arm, others)
        for label, (part, of_sources, error) in beside_first.items():
            parts = [f"{part}/{source}" for source in of_sources]
            if {*parts} <= {*arm} and column.controls[0] in arms:
                line[f"{label}, %"] = change(arm, arms[column.controls[0]], parts, error)
        for source, relative in RELATIVES:
            if found := arm.get(f"difference/{source}"):
                size = f"{found['size']['mean']:.0f} meV/Å"
                label = f"{source + 1} less {relative + 1}, which is {size}"
                line[label] = shown(found["force"], ".0f")
        lines.append(line)
    return markdown(lines)


def _errors(arm: Shown, sources: Sequence[int]) -> Line:
    """Errors of forces, a column a source."""
    return {
        f"forces of {source + 1}, meV/Å": shown(arm[f"test/{source}"]["force"], ".0f")
        for source in sources
    }


def _numbers(sources: Sequence[int]) -> str:
    return " and ".join(str(source + 1) for source in sources)


def not_run(column: str, arms: Mapping[str, Shown]) -> str:
    """The arms of the plan that have not all of their seeds."""
    plan = COLUMNS[column]
    seeds = {name: len(arm["seeds"]) for name, arm in arms.items()}
    missing = [arm.label for name, arm in plan.arms.items() if seeds.get(name, 0) < len(plan.seeds)]
    return f"`{column}`, not finished: {'; '.join(missing)}." if missing else ""


def forces_tables(columns: Mapping[str, Mapping[str, Shown]], only: Sequence[str] = ()) -> str:
    """A table a column, or one for each of ``only``, and what was not run."""
    for column in only:
        check_choice("columns", column, COLUMNS)
    texts = []
    for column in only or COLUMNS:
        arms = columns.get(column, {})
        if arms:
            recipe = COLUMNS[column].recipe
            texts.append(
                f"`{column}`: width {recipe.width}, {recipe.steps:,} steps of "
                f"{sum(recipe.of_sources)}."
            )
            texts.append(asked_table(COLUMNS[column], arms))
            texts.append(beside_table(COLUMNS[column], arms))
        texts.append(not_run(column, arms))
    return "\n\n".join(filter(None, texts))
