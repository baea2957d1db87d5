"""Forces by experts of each element: ``python -m experiments.sweep forces --data forces.npz``.

PyG's ``SchNet`` on configurations that ``experiments.convert forces`` writes. All arms have the
same steps, batches and sweep: three step sizes with the first seed, up to two more as long as the
best is at an end, and validation (the error of forces) chooses among them. The other seeds train
with that one. The test parts are read once for each seed, with the chosen step size.

Arms and their order were fixed before the first result. A dense model of equal FLOPs is no arm:
experts by element take the dense model's FLOPs. Nor is a shared expert beside zero experts: for a
linear layer, W_0 x + V_z x is W_0 + D_z, and trains alike, at more FLOPs.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from tqdm import tqdm

import gmoe
from experiments.show.cells import read_cells
from experiments.show.tables import markdown
from experiments.study.running import ForcesConfig
from experiments.train.build import num_parameters
from experiments.train.checks import check, check_choice
from experiments.train.data.forces import ELEMENTS, Configurations, Part, read_configurations
from experiments.train.files import read_json, replacing
from experiments.train.potential import ATOMWISE, Potential, Recipe, atomwise, errors, train
from experiments.train.results import environment, spread, write_json
from experiments.train.scores import Difference, shown
from gmoe.routers import ByType

RATES = (4e-3, 8e-3, 1.6e-2)
"""Step sizes of the sweep, to begin with."""
MOST_RATES = 5
TESTS: tuple[Part, ...] = ("test", "larger", "elements")
BY_ELEMENT = ByType("z", ELEMENTS)


# Arms ---------------------------------------------------------------------------------------------


class ScaleShift(nn.Module):
    """A linear layer, then a scale and a shift by element: the embedding again, and no experts.

    Args:
        linear: the layer.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.router = BY_ELEMENT(linear.in_features, num_experts=len(ELEMENTS))
        self.scale = nn.Parameter(torch.zeros(len(ELEMENTS), linear.out_features))
        self.shift = nn.Parameter(torch.zeros(len(ELEMENTS), linear.out_features))

    def forward(self, x: Tensor) -> Tensor:
        """(A, O) for (A, I)."""
        element = self.router(x).scores.argmax(dim=1)
        out: Tensor = self.linear(x)
        return out * (1 + self.scale[element]) + self.shift[element]


def scale_shift(width: int, energy_scale: float) -> nn.Module:
    """SchNet with a scale and a shift by element after each linear layer on atoms."""
    model = Potential(width, energy_scale)
    for name in atomwise(model):
        model.set_submodule(name, ScaleShift(model.get_submodule(name)))
    BY_ELEMENT.attach(model)
    return model


def experts(width: int, energy_scale: float, **options: Any) -> nn.Module:
    """SchNet with experts in all linear layers on atoms."""
    return gmoe.moefy(Potential(width, energy_scale), targets=ATOMWISE, **options)


def of_equal_time(width: int, energy_scale: float) -> nn.Module:
    """The dense model whose steps take as long as with experts W_0 + D_z, at width 32."""
    return Potential(round(1.25 * width), energy_scale)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A model that is compared with others."""

    label: str
    build: Callable[[int, float], nn.Module]
    """Of the dense width, and the scale of energies."""
    cost: float
    """Seconds of a step, in those of the dense model; measured before, for prices."""


ARMS = {
    "dense": Arm(label="dense", build=Potential, cost=1.0),
    "scale-shift": Arm(label="a scale and a shift by element", build=scale_shift, cost=1.1),
    "element": Arm(
        label="experts by element, W₀ + Δ",
        build=partial(experts, router=BY_ELEMENT, start="copies"),
        cost=1.3,
    ),
    "shuffled": Arm(
        label="the same by another atom's element",
        build=partial(experts, router=ByType("shuffled", ELEMENTS), start="copies"),
        cost=1.3,
    ),
    "dense-time": Arm(label="dense, equal time", build=of_equal_time, cost=1.25),
}
"""All arms, in the order in which they run, a seed of each in turn."""
CONTROLS = ("dense", "scale-shift")


@dataclass(frozen=True, kw_only=True)
class Column:
    """A recipe, with its seeds and arms."""

    recipe: Recipe
    seeds: tuple[int, ...]
    seconds: float
    """Of 1,000 steps of the dense model on one core; measured before, for prices."""
    arms: tuple[str, ...] = tuple(ARMS)

    def price(self, arm: str) -> float:
        """Hours of one run."""
        return ARMS[arm].cost * self.seconds * self.recipe.steps / 1000 / 3600


COLUMNS = {
    "small": Column(
        recipe=Recipe(width=32, train=3_900, steps=1_000, batch_size=16),
        seeds=(0, 1, 2),
        seconds=50,
    ),
}


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
        return asdict(COLUMNS[self.column].recipe) | {"digest": self.data.digest}

    @property
    def price(self) -> float:
        """Hours of a run."""
        return COLUMNS[self.column].price(self.arm)

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
        """The model of a seed before training."""
        torch.manual_seed(seed)
        width = COLUMNS[self.column].recipe.width
        return ARMS[self.arm].build(width, self.data.energy_scale)

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
        val = errors(model, self.data, "val")
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
        """The figures of a finished run with those of the test parts, which are read once.

        Raises:
            ValueError: it diverged.
        """
        figures = self.held(lr, seed)
        assert figures is not None
        folder = self.run_folder(lr, seed)
        check(figures["val"] is not None, str(folder), "a training that diverged", "finite errors")
        if "test" not in figures:
            model = self.model(seed)
            load_model(model, folder / "weights.safetensors")
            figures |= {part: errors(model, self.data, part) for part in TESTS}
            write_json(folder / "result.json", figures)
        return figures


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


def flops_of_atom(model: nn.Module, data: Configurations) -> float:
    """FLOPs of an energy, an atom, in evaluation, on the first configurations of validation."""
    given = data.batch(data.rows["val"][:16])
    with torch.no_grad():
        flops = gmoe.count_flops(model.eval(), given.z, given.pos, given.batch, given.shuffled)
    return round(flops / len(given.z), 1)


def run_forces(config: ForcesConfig) -> tuple[str, dict[str, str]]:
    """Run what is missing, in the order of the plan: the tables, and what could not be run."""
    begun = time.monotonic()
    failed = dict[str, str]()
    for name, column in COLUMNS.items():
        try:
            data = read_configurations(config.data, column.recipe.train)
        except ValueError as error:
            failed[name] = str(error)
            continue
        cells = {
            arm: Cell(column=name, arm=arm, data=data, folder=config.runs) for arm in column.arms
        }
        for cell in cells.values():  # of a command that was cut off behind a run
            write_cell(cell, config.results)
        for cell, lr, seed in missing_runs(cells, column.seeds):
            hours = (time.monotonic() - begun) / 3600
            if config.budget is not None and hours + cell.price > config.budget:
                break
            cell.run(lr, seed)
            print(f"{name}/{cell.arm}, step size {lr:g}, seed {seed}", file=sys.stderr, flush=True)
            write_cell(cell, config.results)
    return forces_tables(read_forces(config.results / "forces")), failed


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
    seeds = [seed for seed in COLUMNS[cell.column].seeds if cell.held(lr, seed) is not None]
    runs = [cell.tested(lr, seed) for seed in seeds]
    summary: dict[str, Any] = {
        "label": ARMS[cell.arm].label,
        "lr": lr,
        "sweep": {
            f"{tried:g}": value if math.isfinite(value) else None
            for tried, value in sorted(sweep.items())
        },
        "seeds": seeds,
        **{
            part: {name: spread([run[part][name] for run in runs]) for name in ("force", "energy")}
            for part in ("val", *TESTS)
        },
        "seconds": spread([run["seconds"] for run in runs]),
        "flops": runs[0]["flops"],
        "parameters": runs[0]["parameters"],
        "config": cell.config,
        "environment": runs[-1]["environment"],
    }
    write_json(results / "forces" / cell.column / f"{cell.arm}.json", summary)


# Tables -------------------------------------------------------------------------------------------


def read_forces(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The finished arms, by column."""
    return read_cells(folder, COLUMNS, ARMS)


def change(arm: Mapping[str, Any], control: Mapping[str, Any], part: Part, error: str) -> str:
    """How much larger an error is than a control's, in percent, with its 95 % interval.

    Paired by seed: it is the mean of the logarithms of ratios.
    """
    if arm is control:
        return "–"
    ours = by_seed(arm, part, error)
    theirs = by_seed(control, part, error)
    ratios = [math.log(ours[seed] / theirs[seed]) for seed in ours if seed in theirs]
    found = Difference.of(ratios)
    mean, low, high = (100 * math.expm1(value) for value in (found.mean, found.low, found.high))
    if found.n == 1:
        return f"{mean:+.1f}"
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def by_seed(arm: Mapping[str, Any], part: Part, error: str) -> dict[int, float]:
    """The errors of an arm."""
    seeds: list[int] = arm["seeds"]
    values: list[float] = arm[part][error]["values"]
    return dict(zip(seeds, values, strict=True))


def forces_table(arms: Mapping[str, Mapping[str, Any]]) -> str:
    """A line an arm: errors on the test part, and beside the controls, in percent."""
    controls = {name: arms[name] for name in CONTROLS if name in arms}
    lines = []
    for arm in arms.values():
        line = {
            "model": arm["label"],
            "step size": f"{arm['lr']:g}",
            "n": str(len(arm["seeds"])),
            "forces, meV/Å": shown(arm["test"]["force"], ".1f"),
            "energy, meV an atom": shown(arm["test"]["energy"], ".1f"),
        }
        for name, control in controls.items():
            line[f"forces beside {ARMS[name].label}, %"] = change(arm, control, "test", "force")
        if "dense" in controls:
            dense = controls["dense"]
            line["energy beside dense, %"] = change(arm, dense, "test", "energy")
            line["forces of larger molecules, %"] = change(arm, dense, "larger", "force")
            line["of more elements, %"] = change(arm, dense, "elements", "force")
        line["kFLOP an atom"] = f"{arm['flops'] / 1000:.0f}"
        line["parameters"] = f"{arm['parameters']:,}"
        line["CPU s"] = f"{arm['seconds']['mean']:.0f}"
        lines.append(line)
    return markdown(lines)


def not_run(column: str, arms: Mapping[str, Mapping[str, Any]]) -> str:
    """What the plan has and the results have not, with its price."""
    plan = COLUMNS[column]
    missing = dict[str, float]()
    for name in plan.arms:
        runs = len(RATES) + len(plan.seeds) - 1
        if name in arms:
            runs = len({*plan.seeds} - {*arms[name]["seeds"]})
        if runs:
            missing[name] = runs * plan.price(name)
    if not missing:
        return ""
    each = "; ".join(f"{ARMS[name].label} {hours:.2f}" for name, hours in missing.items())
    return f"`{column}`: not run, {sum(missing.values()):.2f} hours of a core ({each})."


def forces_tables(
    columns: Mapping[str, Mapping[str, Mapping[str, Any]]], only: Sequence[str] = ()
) -> str:
    """A table a column, or one for each of ``only``, and what was not run."""
    for column in only:
        check_choice("columns", column, COLUMNS)
    texts = []
    for column in only or COLUMNS:
        arms = columns.get(column, {})
        if arms:
            recipe = COLUMNS[column].recipe
            texts.append(
                f"`{column}`: width {recipe.width}, {recipe.train:,} configurations, "
                f"{recipe.steps:,} steps of {recipe.batch_size}."
            )
            texts.append(forces_table(arms))
        texts.append(not_run(column, arms))
    return "\n\n".join(filter(None, texts))
