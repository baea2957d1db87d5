"""Files of configurations: energies less those of atoms, batches, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.train.data.forces import PARTS, evenly, read_configurations
from tests.helpers.forces_data import KINDS, write_configurations


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_configurations(tmp_path / "forces.npz")


def test_energies_are_those_that_elements_do_not_explain(path: Path) -> None:
    raw, data = np.load(path), read_configurations(path)
    start = [0, *raw["atoms"].cumsum()]
    composition = np.array(
        [[(raw["z"][begin:end] == kind).sum() for kind in KINDS] for begin, end in pairwise(start)]
    )
    train = raw["part"] == PARTS.index("train")
    fit = np.linalg.lstsq(composition[train], raw["energy"][train], rcond=None)[0]
    expected = raw["energy"] - composition @ fit
    np.testing.assert_allclose(data.molecules.energy, expected, atol=1e-4)
    per_atom = expected[train] / raw["atoms"][train]
    assert data.energy_scale == pytest.approx(per_atom.std(ddof=1))
    of_train = raw["force"][np.repeat(train, raw["atoms"])]
    assert data.force_scale == pytest.approx(of_train.std(ddof=1))


def test_a_batch_has_the_atoms_of_its_configurations_in_order(path: Path) -> None:
    raw, data = np.load(path), read_configurations(path)
    start = [0, *raw["atoms"].cumsum()]
    rows = [7, 2, 30]
    found = data.batch(torch.tensor(rows))
    for name in ("z", "pos", "force"):
        expected = np.concatenate([raw[name][start[row] : start[row + 1]] for row in rows])
        np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-6)
    assert found.batch.tolist() == np.repeat(range(3), raw["atoms"][rows]).tolist()
    assert found.atoms.tolist() == raw["atoms"][rows].tolist()
    assert found.energy.tolist() == data.molecules.energy[rows].tolist()


def test_what_is_evaluated_is_spread_over_the_file() -> None:
    assert evenly(torch.arange(10), 4).tolist() == [0, 2, 5, 7]


def test_a_file_of_ones_own_has_three_parts(path: Path) -> None:
    part = np.load(path)["part"]
    data = read_configurations(write_configurations(path, part=np.where(part > 2, 0, part)))
    assert [len(data.rows[name]) > 0 for name in PARTS] == [True, True, True, False, False]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"force": None}, "no force"),
        ({"part": np.zeros(3, int)}, r"part of shape \(3,\)"),
        ({"atoms": np.full(40, 2)}, "80 atoms"),
        ({"part": np.zeros(40, int)}, "no configurations of the part val"),
        ({"source": np.arange(40) // 38}, "no train of source 1"),
    ],
)
def test_a_broken_file_is_refused(changes: dict[str, Any], what: str, tmp_path: Path) -> None:
    path = write_configurations(tmp_path / "forces.npz", **changes)
    with pytest.raises(ValueError, match=what):
        read_configurations(path)


def test_an_unknown_element_is_refused(path: Path) -> None:
    arrays = dict(np.load(path))
    arrays["z"][0] = 92
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=r"elements \[92\]"):
        read_configurations(path)
