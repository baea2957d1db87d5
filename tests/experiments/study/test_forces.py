"""The study of forces: its arms, its sweep by validation, and a run that was cut off."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import gmoe
from experiments.study import forces
from experiments.study.forces import (
    COLUMNS,
    RATES,
    Cell,
    Column,
    change,
    flops_of_atom,
    forces_tables,
    next_rate,
    over_molecules,
    read_forces,
    run_forces,
)
from experiments.study.pages import render
from experiments.study.potentials import (
    BEST,
    BY_ELEMENT,
    OF_SOURCES,
    SOURCES,
    TUNED,
    ScaleShift,
)
from experiments.study.running import ForcesConfig
from experiments.study.sweep import main
from experiments.train.data.forces import Configurations, Molecules, read_configurations
from experiments.train.potential import (
    Recipe,
    Residuals,
    loss_of,
    predict,
    residuals,
)
from tests.helpers.forces_data import write_configurations

WIDTH = 8
TINY = Column(
    recipe=Recipe(width=WIDTH, steps=2, of_sources=(2, 1, 1, 1)),
    seeds=(3, 5),
    arms={name: OF_SOURCES[name] for name in ("embedded", "element")},
    controls=("embedded",),
    asked=(2,),
)


@pytest.fixture
def data(tmp_path: Path) -> Configurations:
    path = tmp_path / "forces.npz"
    return read_configurations(write_configurations(path, each=8, sources=SOURCES))


@pytest.fixture
def config(tmp_path: Path, data: Configurations, monkeypatch: pytest.MonkeyPatch) -> ForcesConfig:
    """Of a plan with one tiny column."""
    monkeypatch.setattr(forces, "COLUMNS", {"tiny": TINY})
    return ForcesConfig(
        data=tmp_path / "forces.npz",
        columns=("tiny",),
        runs=tmp_path / "runs",
        results=tmp_path / "results",
    )


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, int]]:
    """Which runs are trained from here on: arm, step size and seed."""
    found = list[tuple[str, float, int]]()
    run = Cell.run

    def noted(cell: Cell, lr: float, seed: int) -> None:
        run(cell, lr, seed)
        found.append((cell.arm, lr, seed))

    monkeypatch.setattr(Cell, "run", noted)
    return found


def build(arm: str, data: Configurations, width: int = WIDTH) -> nn.Module:
    torch.manual_seed(0)
    return OF_SOURCES[arm].build(width, data.energy_scale).eval()


def energy_of(model: nn.Module, given: Molecules) -> Tensor:
    return model(**given.inputs).detach()


# Arms ---------------------------------------------------------------------------------------------


def test_experts_are_in_all_linear_layers_on_atoms(data: Configurations) -> None:
    def layers(arm: str, kind: type[nn.Module]) -> int:
        return sum(isinstance(module, kind) for module in build(arm, data).modules())

    assert layers("element", gmoe.MoE) == 3 * 3 + 2
    assert layers("film-element", ScaleShift) == 3 * 3 + 2


def test_experts_by_element_take_the_dense_flops(data: Configurations) -> None:
    flops = {arm: flops_of_atom(build(arm, data, 32), data) for arm in OF_SOURCES}
    for arm in ("film-element", "element", "source"):
        assert flops[arm] == flops["embedded"]
    assert flops["wider"] > 2 * flops["embedded"]


def test_a_scale_and_a_shift_are_those_of_the_element(data: Configurations) -> None:
    given = data.batch(data.rows["test"])
    model = build("film-element", data)
    layer: Any = model.lin1
    nn.init.normal_(layer.scale)
    nn.init.normal_(layer.shift)
    seen = dict[str, Tensor]()
    layer.register_forward_hook(lambda _, args, out: seen.update(x=args[0], out=out))
    energy_of(model, given)
    for atom, element in enumerate(given.z.tolist()):
        place = BY_ELEMENT.values.index(element)
        y = layer.linear(seen["x"][atom])
        expected = y * (1 + layer.scale[place]) + layer.shift[place]
        torch.testing.assert_close(seen["out"][atom], expected)


@pytest.mark.parametrize("arm", OF_SOURCES)
def test_an_arm_of_sources_starts_as_a_dense_model_and_trains(
    arm: str, data: Configurations
) -> None:
    given = data.batch(data.rows["test"])
    model = build(arm, data)
    if arm not in ("wider", "heads", "composition", "film-network", "element-learned"):
        expected = energy_of(build("embedded", data), given)
        torch.testing.assert_close(energy_of(model, given), expected, rtol=1e-4, atol=1e-5)
    loss_of(model.train(), given, data).backward()
    trained = [one for one in model.parameters() if one.requires_grad]
    changed = given._replace(
        source=(given.source + 1) % SOURCES,
        system=torch.cat([given.system[:, :SOURCES].roll(1, 1), given.system[:, SOURCES:]], 1),
    )
    with torch.no_grad():
        for one in trained:
            assert one.grad is not None
            one.sub_(0.1 * one.grad)
    before, after = (energy_of(model.eval(), one) for one in (given, changed))
    assert not torch.allclose(before, after)


def test_a_column_reads_each_source_and_says_what_is_missing(
    config: ForcesConfig, tmp_path: Path
) -> None:
    text, failed = run_forces(replace(config, rows=("embedded",)))
    assert not failed
    assert "`tiny`, not finished: experts by element." in text
    text, failed = run_forces(config)
    assert "not finished" not in text
    assert "| forces of 3, meV/Å | 3 beside dense, told the source, % |" in text
    assert "| forces of 4, meV/Å | the same beside dense, told the source, % |" in text
    assert "| 4 less 2, which is 0 meV/Å |" in text
    cell = read_forces(config.results / "forces")["tiny"]["element"]
    assert {f"{part}/{one}" for part in forces.TESTS for one in range(SOURCES)} <= set(cell)
    assert list(cell["molecules"]) == ["test/2"]
    one = write_configurations(tmp_path / "one.npz")
    _, failed = run_forces(replace(config, data=one))
    assert "1 sources" in failed["tiny"]
    with pytest.raises(ValueError, match=r"rows: got 'dense', expected"):
        run_forces(replace(config, rows=("dense",)))


def test_models_of_a_column_before_are_trained_further_on_a_new_source(
    data: Configurations, config: ForcesConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, then = (
        replace(column, recipe=replace(column.recipe, width=WIDTH, steps=2), seeds=(0,))
        for column in (COLUMNS["sources-three"], COLUMNS["sources-tuned"])
    )
    first = replace(first, recipe=replace(first.recipe, of_sources=(2, 1, 1, 0)))
    then = replace(then, recipe=replace(then.recipe, of_sources=(0, 0, 0, 4)))
    monkeypatch.setattr(forces, "COLUMNS", {"sources-three": first, "sources-tuned": then})
    own = replace(config, columns=("sources-tuned",))
    with pytest.raises(ValueError, match="columns: got sources-tuned, expected sources-three bef"):
        run_forces(own)
    text, _ = run_forces(replace(own, columns=("sources-three", "sources-tuned")))
    assert text.count("\n| ") == 2 * (len(BEST) + len(TUNED) + 2)  # two tables a column
    data = data.told_as(3, 1)
    assert {*data.molecules.source[data.rows["test/3"]].tolist()} == {1}
    assert data.molecules.system[data.rows["test/3"], :SOURCES].unique(dim=0).tolist() == [
        [0, 1, 0, 0]
    ]
    cells = {
        arm: Cell(column="sources-tuned", arm=arm, data=data, folder=own.runs) for arm in TUNED
    }
    before = Cell(column="sources-three", arm="learned", data=data, folder=own.runs)
    left = before.run_folder(forces.chosen_rate(before.sweep()), 0) / "weights.safetensors"
    learned, merged = cells["learned"].model(0), cells["merged"].model(0)
    for name, weight in load_file(left).items():
        torch.testing.assert_close(learned.state_dict()[name], weight)
    given = data.batch(data.rows["test/3"])
    system = data.molecules.system[data.rows["train/3"]].mean(0).expand_as(given.system)
    expected = energy_of(learned.eval(), given._replace(system=system.contiguous()))
    told = merged.eval()(**given._replace(system=system.contiguous()).inputs)
    torch.testing.assert_close(told.detach(), expected, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, gmoe.MoE) for module in merged.modules())


def test_what_is_read_is_that_of_single_configurations(
    data: Configurations, tmp_path: Path
) -> None:
    """Sums by molecule, and the errors of differences between two labels of one configuration."""
    every = data.molecules
    data = replace(data, molecules=every._replace(force=torch.randn_like(every.force)))
    cell = Cell(column="sources", arm="source", data=data, folder=tmp_path)
    model = cell.model(0)
    read = cell.read(model)
    off = dict[int, Tensor]()
    apart = list[Tensor]()
    sums = dict[int, float]()
    for row in data.rows["test"].tolist():
        given = data.batch(torch.tensor([row]))
        off[row] = predict(model, given)[1] - given.force
        if int(given.source) == 3:
            molecule = int(data.molecule[row])
            sums[molecule] = sums.get(molecule, 0) + 1000 * float(off[row].abs().sum())
            apart.append((off[row] - off[row - 2]).abs())
    assert read["molecules"]["test/3"] == [round(sums[molecule]) for molecule in sorted(sums)]
    found = read["errors"]["difference/3"]
    assert found["force"] == pytest.approx(1000 * float(torch.cat(apart).mean()), rel=1e-4)
    assert found["size"] > 100


# The sweep ----------------------------------------------------------------------------------------


def test_a_sweep_goes_on_as_long_as_the_best_is_at_an_end() -> None:
    sweep = dict[float, float]()
    for lr in RATES:
        assert next_rate(sweep) == lr
        sweep[lr] = abs(math.log(lr / RATES[1]))
    assert next_rate(sweep) is None  # the best lies inside
    for best, following in ((RATES[0], RATES[0] / 2), (RATES[-1], RATES[-1] * 2)):
        sweep = {lr: abs(math.log(lr / best)) for lr in RATES}
        assert next_rate(sweep) == following
    sweep = {lr: -lr for lr in (*RATES, RATES[-1] * 2)}
    assert next_rate(sweep) == RATES[-1] * 4
    assert next_rate({**sweep, RATES[-1] * 4: -1.0}) is None  # enough


def test_validation_chooses_and_the_test_is_read_once_a_seed(
    config: ForcesConfig, ran: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = list[list[int]]()

    def noted(model: nn.Module, data: Configurations, rows: Tensor) -> Residuals:
        read.append(rows.tolist())
        return residuals(model, data, rows)

    monkeypatch.setattr(forces, "residuals", noted)
    text, failed = run_forces(config)
    assert not failed
    data = read_configurations(config.data)
    validated = [row for one in range(SOURCES) for row in data.rows[f"val/{one}"].tolist()]
    assert read.count(validated) == len(ran)
    for part, one in product(forces.TESTS, range(SOURCES)):
        assert read.count(data.rows[f"{part}/{one}"].tolist()) == len(TINY.arms) * len(TINY.seeds)
    cell = read_forces(config.results / "forces")["tiny"]["element"]
    assert f"{cell['lr']:g}" == min(cell["sweep"], key=cell["sweep"].__getitem__)
    assert [run for run in ran if run[0] == "element"][-1] == ("element", cell["lr"], 5)
    held = json.loads(
        (config.runs / "tiny/element" / f"lr-{cell['lr']:g}-seed-5" / "result.json").read_text()
    )
    assert cell["larger/0"]["force"]["values"][1] == held["read"]["errors"]["larger/0"]["force"]
    assert text.count("\n| ") == 2 * (len(TINY.arms) + 1)  # two tables
    assert "not finished" not in text


@pytest.mark.parametrize("cut_at", [4, -1])
def test_what_is_finished_is_not_run_again(
    cut_at: int, config: ForcesConfig, ran: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = run_forces(replace(config, runs=config.runs / "whole", results=config.runs / "w"))
    expected = list(ran)
    last = expected[cut_at]
    ran.clear()
    write = forces.write_cell

    def cut(cell: Cell, results: Path) -> None:
        if ran and ran[-1] == last:
            raise KeyboardInterrupt
        write(cell, results)

    monkeypatch.setattr(forces, "write_cell", cut)
    with pytest.raises(KeyboardInterrupt):
        run_forces(config)
    monkeypatch.setattr(forces, "write_cell", write)
    text, _ = run_forces(config)
    assert ran == expected

    def figures(table: str) -> list[str]:  # all but the seconds
        return [line.rpartition(" | ")[0] for line in table.splitlines() if line.startswith("|")]

    assert figures(text) == figures(whole)


def test_a_step_size_that_diverges_is_not_chosen(
    config: ForcesConfig, data: Configurations, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverged(model: nn.Module, data: Configurations, rows: Tensor) -> Residuals:
        return Residuals(*(math.nan * one for one in residuals(model, data, rows)))

    cell = Cell(column="tiny", arm="embedded", data=data, folder=config.runs)
    for lr in RATES:
        monkeypatch.setattr(forces, "residuals", diverged if lr > RATES[0] else residuals)
        cell.run(lr, TINY.seeds[0])
    assert list(cell.sweep().values())[1:] == [math.inf, math.inf]
    assert forces.chosen_rate(cell.sweep()) == RATES[0]
    assert next_rate(cell.sweep()) == RATES[0] / 2
    with pytest.raises(ValueError, match="diverged"):
        cell.tested(RATES[1], TINY.seeds[0])


def test_runs_of_other_data_are_refused(config: ForcesConfig, data: Configurations) -> None:
    Cell(column="tiny", arm="embedded", data=data, folder=config.runs).run(RATES[0], TINY.seeds[0])
    write_configurations(config.data, molecules=30, each=8, sources=SOURCES)
    with pytest.raises(ValueError, match=r"digest.*choose another --runs"):
        run_forces(config)


# The table ----------------------------------------------------------------------------------------


def summary(seeds: list[int], values: list[float], **more: Any) -> dict[str, Any]:
    part = {"test/0": {"force": {"values": values}}}
    return {"seeds": seeds, "molecules": {}, **part, **more}


def test_a_change_is_the_mean_of_ratios_of_the_same_seeds() -> None:
    arm = summary([0, 1, 2], [90.0, 80.0, 85.0])
    control = summary([1, 2, 0], [100.0, 100.0, 100.0])
    logs = torch.tensor([0.9, 0.8, 0.85]).double().log()
    half = 4.302653 * logs.std() / 3**0.5
    mean, low, high = (
        100 * math.expm1(x) for x in (logs.mean(), logs.mean() - half, logs.mean() + half)
    )
    expected = f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
    assert change(arm, control, ["test/0"]) == expected
    assert change(summary([1], [80.0]), control, ["test/0"]) == "-20.0"
    assert change(arm, arm, ["test/0"]) == "–"
    sums = {"molecules": {"test/0": [3, 1]}}, {"molecules": {"test/0": [2, 2]}}
    both = change(arm | sums[0], control | sums[1], ["test/0"])
    assert both.startswith(f"{expected[:-1]}; ")
    assert both.count(" to ") == 2


def test_the_interval_over_molecules_is_that_of_drawing_them_anew() -> None:
    random = np.random.default_rng(0)
    size = random.lognormal(sigma=0.8, size=(1, 80))
    ours, theirs = size * random.lognormal(sigma=0.5, size=(2, 2, 80))
    arm, control = (
        {"molecules": {"test/0": first.tolist(), "test/1": second.tolist()}}
        for first, second in (ours, theirs)
    )
    drawn = random.integers(80, size=(4000, 80))
    ratios = np.log(ours[:, drawn].sum(-1) / theirs[:, drawn].sum(-1)).mean(0)
    found = over_molecules(0.5, arm, control, ["test/0", "test/1"])
    half = 1.9905 * ratios.std()
    assert found.mean == 0.5
    assert found.high - 0.5 == pytest.approx(half, rel=0.1)


def test_the_command_runs_the_study_and_a_page_shows_it(
    config: ForcesConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--data", str(config.data), "--runs", str(config.runs), "--columns", "tiny"]
    main(["forces", *given, "--results", str(config.results)])
    text = capsys.readouterr().out.strip()
    assert "| experts by element |" in text
    page = "<!-- forces: forces -->\nold\n<!-- end -->\n"
    assert render(page, config.results) == f"<!-- forces: forces -->\n{text}\n<!-- end -->\n"
    with pytest.raises(ValueError, match="columns"):
        forces_tables({}, ["no"])
