"""The training of a potential: its neighbors, its loss of slopes, its steps and its errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from experiments.train.data.forces import Configurations, Molecules, read_configurations
from experiments.train.potential import (
    CUTOFF,
    ENERGY_WEIGHT,
    WARMUP,
    Potential,
    Recipe,
    batches,
    factor,
    loss_of,
    neighbors,
    predict,
    residuals,
    train,
)
from tests.helpers.forces_data import write_configurations

RECIPE = Recipe(width=6, steps=30, of_sources=(4,))


@pytest.fixture
def data(tmp_path: Path) -> Configurations:
    return read_configurations(write_configurations(tmp_path / "forces.npz"))


def potential(data: Configurations) -> Potential:
    torch.manual_seed(0)
    return Potential(RECIPE.width, data.energy_scale).double()


def doubled(given: Molecules) -> Molecules:
    return Molecules(*(part.double() if part.is_floating_point() else part for part in given))


def test_neighbors_are_the_near_atoms_of_a_molecule(data: Configurations) -> None:
    given = data.batch(torch.tensor([0, 5, 6]))
    edge_index, distance = neighbors(given.pos, given.batch)
    expected = {
        (i, j): float((given.pos[i] - given.pos[j]).norm())
        for i in range(len(given.pos))
        for j in range(len(given.pos))
        if i != j and given.batch[i] == given.batch[j]
    }
    near = {pair: value for pair, value in expected.items() if value < CUTOFF}
    assert 0 < len(near) < len(expected)
    found = dict(zip(map(tuple, edge_index.T.tolist()), distance.tolist(), strict=True))
    assert found == pytest.approx(near)


def slopes(model: Potential, given: Molecules, step: float = 1e-5) -> Tensor:
    """The gradient of the energies by differences."""
    found = torch.zeros_like(given.pos)
    for place in range(given.pos.numel()):
        ends = []
        for sign in (1, -1):
            pos = given.pos.clone()
            pos.view(-1)[place] += sign * step
            ends.append(float(model(**given._replace(pos=pos).inputs).detach().sum()))
        found.view(-1)[place] = (ends[0] - ends[1]) / (2 * step)
    return found


def test_forces_are_minus_the_slopes_of_the_energy(data: Configurations) -> None:
    model = potential(data)
    given = doubled(data.batch(torch.tensor([3, 8])))
    energy, force = predict(model, given)
    assert energy.shape == (2,)
    torch.testing.assert_close(force.detach(), -slopes(model, given), atol=1e-8, rtol=1e-6)


def test_the_loss_is_its_definition_and_has_the_gradient_of_it(data: Configurations) -> None:
    model = potential(data)
    given = doubled(data.batch(torch.tensor([3, 8])))
    loss = loss_of(model.train(), given, data)
    loss.backward()

    def defined() -> float:
        energy, force = predict(model.eval(), given)
        of_force = ((force - given.force) ** 2).mean() / data.force_scale**2
        of_atom = (energy - given.energy).detach() / given.atoms
        return float(of_force + ENERGY_WEIGHT * (of_atom**2).mean() / data.energy_scale**2)

    assert float(loss.detach()) == pytest.approx(defined(), rel=1e-12)
    weight = model.interactions[0].conv.lin1.weight
    with torch.no_grad():
        ends = []
        for change in (1e-5, -2e-5):
            weight[1, 2] += change
            with torch.enable_grad():
                ends.append(defined())
    assert float(weight.grad[1, 2]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5)


def test_a_training_has_its_steps_in_whole_batches_pass_after_pass(data: Configurations) -> None:
    drawn = list(batches(data, RECIPE, seed=0))
    assert len(drawn) == RECIPE.steps
    assert {len(one.energy) for one in drawn} == {4}
    whole = len(data.rows["train"]) // 4
    energies = torch.cat([one.energy for one in drawn[:whole]])
    assert len(energies.unique()) == len(energies)
    again = list(batches(data, RECIPE, seed=1))
    assert not torch.equal(drawn[0].energy, again[0].energy)


def test_a_batch_has_its_number_of_each_source(tmp_path: Path) -> None:
    path = write_configurations(tmp_path / "forces.npz", each=4, sources=2)
    data = read_configurations(path)
    assert data.sources == 2
    recipe = replace(RECIPE, of_sources=(3, 1))
    for given in batches(data, recipe, seed=0):
        assert given.source.tolist() == [0, 0, 0, 1]
    held_out = replace(recipe, of_sources=(0, 2))
    assert {*next(batches(data, held_out, seed=0)).source.tolist()} == {1}
    with pytest.raises(ValueError, match=r"data: got \d+ configurations of a source"):
        next(batches(data, replace(recipe, of_sources=(1000, 1)), seed=0))


def test_energies_are_without_those_of_the_atoms_of_their_source(tmp_path: Path) -> None:
    """Sources differ by the energies of atoms alone here, and twins in nothing else."""
    path = write_configurations(tmp_path / "forces.npz", each=4, sources=2)
    one = read_configurations(write_configurations(tmp_path / "one.npz", each=4))
    two = read_configurations(path)
    for part in ("train", "test", "larger"):
        own = [two.rows[f"{part}/{source}"] for source in range(2)]
        torch.testing.assert_close(torch.cat(own).sort().values, two.rows[part])
    spread = [data.molecules.energy.std() for data in (one, two)]
    assert spread[1] < 1.5 * spread[0]


def test_a_training_lowers_the_errors_and_follows_from_its_seed(data: Configurations) -> None:
    ends = []
    for _ in range(2):
        model = potential(data).float()
        before = residuals(model, data, data.rows["train"]).errors
        steps = list(train(model, data, RECIPE, lr=0.05, seed=0))
        assert steps == list(range(1, RECIPE.steps + 1))
        ends.append(residuals(model, data, data.rows["train"]).errors)
    assert ends[0] == ends[1]
    assert ends[0]["force"] < 0.9 * before["force"]


def test_errors_are_means_of_components_and_of_energies_an_atom(data: Configurations) -> None:
    model = potential(data).float().eval()
    force, energy = [], []
    for row in data.rows["test"]:
        given = data.batch(row[None])
        found_energy, found_force = predict(model, given)
        force += (found_force - given.force).abs().flatten().tolist()
        energy.append(float((found_energy - given.energy).abs().detach()) / len(given.z))
    found = residuals(model, data, data.rows["test"]).errors
    assert found["force"] == pytest.approx(1000 * sum(force) / len(force), rel=1e-5)
    assert found["energy"] == pytest.approx(1000 * sum(energy) / len(energy), rel=1e-5)


def test_step_sizes_rise_and_then_fall_to_zero() -> None:
    steps = 4 * WARMUP
    sizes = [factor(step, steps) for step in range(steps + 1)]
    assert sizes[0] < sizes[WARMUP // 2] < max(sizes) <= 1
    assert sizes.index(max(sizes)) == WARMUP - 1
    assert sizes[-1] == pytest.approx(0, abs=1e-12)
