"""From SMILES to configurations: labels by xTB, and a split by molecule."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rdkit")

from experiments.convert import forces as module
from experiments.convert.forces import (
    THEORIES,
    canonical,
    forces,
    main,
    part_of,
    singlepoint,
)
from experiments.train.data.forces import PARTS
from tests.helpers.command import refused

NAMES = ["O", "C", "CO", "CCO", "C=O", "CN", "CCN", "CS", "CF", "CCl", "CC(=O)O", "CC#N", "NC=O"]
LARGE = "CCCCCC"  # 20 atoms
MIXED = "O=CC(F)Cl"  # of five elements
REFUSED = {
    "CCCCCCC": "not 3 to 20 atoms",
    "[Cl-].[Na+]": "several molecules",
    "C[NH3+]": "an ion or a radical",
    "[CH2]C": "an ion or a radical",
    "CI": "another element",
    "C(": "no SMILES that RDKit reads",
}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "names.csv"
    lines = ["name,SMILES", *(f"x,{smiles}" for smiles in [*NAMES, LARGE, MIXED, *REFUSED])]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def springs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Atoms on springs in place of xTB, where only the file is looked at; counts the calls."""
    calls = list[int]()

    def singlepoint(theory: str, molecule: Any, pos: Any) -> tuple[float, Any]:
        calls.append(len(pos))
        return float((pos**2).sum()), -2 * pos

    pytest.importorskip("tblite")
    monkeypatch.setattr(module, "singlepoint", singlepoint)
    return calls


@pytest.mark.parametrize("theory", THEORIES)
def test_forces_are_the_slopes_of_the_energy(theory: str) -> None:
    pytest.importorskip("tblite")
    water = made("O")
    pos = np.array([[0.0, 0.0, 0.0], [0.96, 0.1, 0.0], [-0.2, 0.93, 0.05]])
    energy, force = singlepoint(theory, water, pos)
    if theory == "GFN2-xTB":
        assert energy == pytest.approx(-5.07 * 27.2114, rel=0.002)
    step = 1e-4
    for atom, axis in np.ndindex(*pos.shape):
        move = np.zeros_like(pos)
        move[atom, axis] = step
        ends = [singlepoint(theory, water, pos + sign * move)[0] for sign in (1, -1)]
        assert force[atom, axis] == pytest.approx((ends[1] - ends[0]) / (2 * step), abs=2e-4)


def made(smiles: str) -> Any:
    """A molecule with its hydrogens, and a place for each atom."""
    from rdkit import Chem

    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    assert not module.embed(molecule, 1, 0)
    return molecule


def test_a_file_holds_what_the_calculators_say(table: Path, tmp_path: Path) -> None:
    """A molecule to train on has one theory, others have all."""
    pytest.importorskip("tblite")
    out = tmp_path / "forces.npz"
    forces((table,), out, each=2, theories=("UFF", "GFN2-xTB"), shares=(1, 3))
    found = np.load(out)
    start = np.concatenate([[0], found["atoms"].cumsum()])
    for row in range(0, len(found["energy"]), 9):
        atoms = slice(start[row], start[row + 1])
        theory = ("UFF", "GFN2-xTB")[found["source"][row]]
        molecule = made(found["smiles"][found["molecule"][row]])
        energy, force = singlepoint(theory, molecule, found["pos"][atoms])
        assert found["energy"][row] == pytest.approx(energy, abs=1e-9)
        np.testing.assert_allclose(found["force"][atoms], force, atol=1e-9)
    for molecule in range(len(found["smiles"])):
        own = found["molecule"] == molecule
        is_trained = found["part"][own][0] == 0
        assert len({*found["source"][own]}) == (1 if is_trained else 2)
    assert {*found["source"][found["part"] == 0]} == {0, 1}


@pytest.mark.parametrize(
    ("options", "what"),
    [({"theories": ("DFT",)}, "theories: got 'DFT'"), ({"shares": (1, 2)}, "shares: got")],
)
def test_theories_that_there_are_not_are_refused(
    options: Any, what: str, table: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tblite")
    with pytest.raises(ValueError, match=what):
        forces((table,), tmp_path / "forces.npz", **options)


def test_several_names_of_one_theory_have_one_calculation(
    table: Path, tmp_path: Path, springs: list[int]
) -> None:
    out = tmp_path / "forces.npz"
    forces((table,), out, each=1, theories=("UFF",) * 3)
    found = np.load(out)
    assert len(springs) == len(found["smiles"])
    is_tested = found["part"] == PARTS.index("test")
    energy, source = (found[name][is_tested].reshape(-1, 3) for name in ("energy", "source"))
    assert (energy == energy[:, :1]).all()
    assert (source == [0, 1, 2]).all()


def test_refused_molecules_are_named_with_the_reason(
    table: Path, tmp_path: Path, springs: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "forces.npz"
    forces((table,), out, each=1)
    found = np.load(out)
    assert dict(zip(found["refused"], found["reason"], strict=True)) == REFUSED
    assert "refused, an ion or a radical: 2\n" in capsys.readouterr().out


def test_a_molecule_is_in_one_part_whatever_table_names_it(
    table: Path, tmp_path: Path, springs: list[int]
) -> None:
    again = tmp_path / "again.csv"
    again.write_text("\n".join(["smiles", LARGE, MIXED, *reversed(NAMES[4:])]))
    found = []
    for number, tables in enumerate(((table,), (again, table))):
        out = tmp_path / f"{number}.npz"
        forces(tables, out, each=3)
        found.append(np.load(out))
    parts = [
        {smiles: {*file["part"][file["molecule"] == row]} for row, smiles in enumerate(names)}
        for file in found
        for names in [file["smiles"]]
    ]
    assert parts[0] == parts[1]
    assert len(parts[0]) == len(NAMES) + 2  # a molecule of both tables is there once
    assert parts[0][LARGE] == {PARTS.index("larger")}
    assert parts[0][MIXED] == {PARTS.index("elements")}
    assert all(len(one) == 1 for one in parts[0].values())
    assert {part_of(smiles, [1, 6]) for smiles in NAMES} == {"train", "val", "test"}


@pytest.mark.parametrize(
    ("text", "what"),
    [("a,b\n1,2\n", "the header: got a, b"), ("", "cannot be read")],
)
def test_a_table_without_smiles_is_refused(text: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=what):
        canonical(path)


def test_a_package_that_is_missing_is_named(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tblite.interface", None)
    monkeypatch.chdir(table.parent)
    said = refused([str(table)], capsys, main)
    assert "tblite" in said
    assert "pip install -e '.[forces]'" in said
    assert not list(table.parent.glob("forces*"))
