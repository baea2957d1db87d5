"""From SMILES to OGB's layout: what ``ogb`` reads, its own features, and a split by scaffold."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.train.data.published import without_update_check
from tests.helpers.molecule_data import TEN, write_table

without_update_check()
Chem = pytest.importorskip("rdkit.Chem")
MurckoScaffold = pytest.importorskip("rdkit.Chem.Scaffolds.MurckoScaffold")

from ogb.graphproppred import PygGraphPropPredDataset  # noqa: E402
from ogb.utils import smiles2graph  # noqa: E402
from torch_geometric.data.data import DataEdgeAttr, DataTensorAttr  # noqa: E402
from torch_geometric.data.storage import GlobalStorage  # noqa: E402

from experiments.convert.smiles import (  # noqa: E402
    molecules,
    name_of,
    parsed,
    scaffold_of,
    scaffold_split,
)

BROKEN = len(TEN) - 1
"""The row of the molecule that RDKit does not sanitize."""


def by_ogb(name: str, root: Path) -> Any:
    """The set as ``ogb`` reads it; it asks and downloads nothing."""
    known = [DataEdgeAttr, DataTensorAttr, GlobalStorage]  # that its cache holds
    with torch.serialization.safe_globals(known):
        return PygGraphPropPredDataset(name=name, root=str(root))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("molecules")
    molecules(write_table(folder / "HIV.csv.gz"), folder)
    return folder


def test_ogb_reads_the_set_as_if_downloaded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("ogb asks"))
    dataset = by_ogb("ogbg-molhiv", root)
    assert [int(graph.y) for graph in dataset] == list(TEN.values())
    for smiles, graph in list(zip(TEN, dataset, strict=True))[:BROKEN]:
        theirs = smiles2graph(smiles)
        assert graph.x.tolist() == theirs["node_feat"].tolist()
        assert graph.edge_index.tolist() == theirs["edge_index"].tolist()
        assert graph.edge_attr.tolist() == theirs["edge_feat"].tolist()
    content = (root / "ogbg_molhiv" / "mapping" / "mol.csv.gz").read_bytes()
    mapping = gzip.decompress(content).decode().splitlines()
    assert mapping[0] == "HIV_active,smiles,mol_id"
    assert mapping[1] == "1,CCO,0"


def test_a_molecule_that_is_not_sanitized_is_named_and_has_rings_and_aromatic_atoms(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    molecules(write_table(tmp_path / "hiv.csv"), tmp_path)
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith("ogbg-molhiv: 10 molecules (train 8, ")
    assert others == [f"  row {BROKEN}: {list(TEN)[BROKEN]}, which RDKit does not sanitize"]
    graph = by_ogb("ogbg-molhiv", root)[BROKEN]
    assert graph.x[:, 7].sum() == 12  # aromatic: the carbons of two benzenes
    assert graph.x[:, 8].sum() == 17  # in a ring: those, and five more


def test_scaffolds_stay_together_and_the_largest_train(root: Path) -> None:
    split = by_ogb("ogbg-molhiv", root).get_idx_split()
    sizes = {part: len(rows) for part, rows in split.items()}
    assert sizes == {"train": 8, "valid": 1, "test": 1}
    assert sorted(torch.cat([*split.values()]).tolist()) == list(range(10))
    rest = {*split["valid"].tolist(), *split["test"].tolist()}
    assert rest == {4, 8}  # pyridine and naphthalene, of which there is one each
    assert all(rows.tolist() == sorted(rows.tolist()) for rows in split.values())
    groups = [[5], [0, 1, 2, 3], [4], [6, 7], [8], [9]]
    assert scaffold_split(groups, 10) == {
        "train": [0, 1, 2, 3, 6, 7, 9, 8],
        "valid": [5],
        "test": [4],
    }


def test_a_scaffold_is_rdkits_and_does_not_ask_for_valences() -> None:
    """Of the molecules of HIV that RDKit does not sanitize today, OGB's RDKit took some."""
    for smiles in list(TEN)[:BROKEN]:
        molecule = parsed(smiles, 0)[0]
        expected = MurckoScaffold.MurckoScaffoldSmiles(mol=molecule, includeChirality=False)
        assert scaffold_of(molecule) == expected
    molecule = parsed(list(TEN)[BROKEN], 0)[0]
    assert scaffold_of(molecule) == "c1ccc([B-2]2(c3ccccc3)=NCCO2)cc1"  # without the two methyls
    with pytest.raises(Chem.AtomValenceException):
        MurckoScaffold.MurckoScaffoldSmiles(mol=molecule)


def test_gaps_of_several_labels_and_numbers_are_kept(tmp_path: Path) -> None:
    names = [f"task-{number}" for number in range(12)]
    first = ["", *["1.0"] * 5, *["0.0"] * 4]
    table = write_table(tmp_path / "tox21.csv", names, **{"task-0": first, "mol_id": range(10)})
    molecules(table, tmp_path)
    y = torch.cat([graph.y for graph in by_ogb("ogbg-moltox21", tmp_path)])
    assert y.shape == (10, 12)
    assert y[0].isnan().tolist() == [True] + [False] * 11
    assert y[1:, 0].tolist() == [1] * 5 + [0] * 4
    numbers = [-0.77, *np.linspace(0, 9, 9)]
    molecules(write_table(tmp_path / "FreeSolv.csv", expt=numbers, labels=()), tmp_path)
    found = torch.cat([graph.y for graph in by_ogb("ogbg-molfreesolv", tmp_path)])
    torch.testing.assert_close(found[:, 0].double(), torch.tensor(numbers, dtype=torch.float64))


def test_a_table_that_excel_wrote_is_read(tmp_path: Path) -> None:
    """It begins with a byte order mark."""
    table = write_table(tmp_path / "hiv.csv")
    table.write_text(table.read_text(), encoding="utf-8-sig")
    molecules(table, tmp_path)
    assert (tmp_path / "ogbg_molhiv" / "RELEASE_v1.txt").exists()


def test_the_set_follows_from_the_file_name_or_is_said(tmp_path: Path) -> None:
    assert name_of(Path("HIV.csv.gz")) == "ogbg-molhiv"
    assert name_of(Path("delaney-processed.csv")) == "ogbg-molesol"
    molecules(write_table(tmp_path / "mine.csv"), tmp_path, name="ogbg-molhiv")
    assert (tmp_path / "ogbg_molhiv" / "RELEASE_v1.txt").exists()


@pytest.mark.parametrize(
    ("file", "options", "problem"),
    [
        ("mine.csv", {}, r"table: got .*mine.csv.*, expected a file named hiv, .*; or --name"),
        ("bbbp.csv", {}, "the header: got smiles, HIV_active, expected p_np, of ogbg-molbbbp"),
        ("tox21.csv", {}, "the header: got 1 labels, expected 12, as ogbg-moltox21 has"),
        ("hiv.csv", {"HIV_active": [2] * 10}, "row 0: got the label '2', expected 0, 1 or nothing"),
        ("hiv.csv", {"HIV_active": ["no"] * 10}, "row 0: got the label 'no'"),
        ("hiv.csv", {"smiles": ["C(C"] * 10}, "row 0: got 'C\\(C', expected SMILES"),
        ("hiv.csv", {"smiles": [""] * 10}, "row 0: got '', expected a molecule"),
    ],
)
def test_a_table_that_does_not_fit_is_named(
    tmp_path: Path, file: str, options: Any, problem: str
) -> None:
    table = write_table(tmp_path / file, **options)
    if "smiles" in options:
        rows = (f"{smiles},1" for smiles in options["smiles"])
        table.write_text("\n".join(["smiles,HIV_active", *rows]))
    with pytest.raises(ValueError, match=problem):
        molecules(table, tmp_path / "data")
    assert not list(tmp_path.glob("data/*"))


@pytest.mark.parametrize("header", ["smiles,HIV_active,HIV_active", "smiles,HIV_active,SMILES"])
def test_a_column_that_is_there_twice_is_named(tmp_path: Path, header: str) -> None:
    table = tmp_path / "hiv.csv"
    table.write_text("\n".join([header, *["C,1,0"] * 10]))
    with pytest.raises(ValueError, match="the table: got a column twice, or"):
        molecules(table, tmp_path / "data")


def test_blanks_around_the_names_of_columns_do_not_count(tmp_path: Path) -> None:
    table = write_table(tmp_path / "hiv.csv")
    table.write_text(table.read_text().replace("HIV_active", " HIV_active ", 1))
    molecules(table, tmp_path)
    assert (tmp_path / "ogbg_molhiv" / "RELEASE_v1.txt").exists()


def test_too_few_molecules_half_a_file_and_a_folder_that_is_there_are_refused(
    root: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"out: got .*ogbg_molhiv, which is there already"):
        molecules(root / "HIV.csv.gz", root)
    few = tmp_path / "bbbp.csv"
    few.write_text("smiles,p_np\nC,1\nCC,0\nCCC,1\n")
    with pytest.raises(ValueError, match="got 3 molecules of 1 scaffolds, expected more"):
        molecules(few, tmp_path)
    half = tmp_path / "hiv.csv.gz"
    half.write_bytes((root / "HIV.csv.gz").read_bytes()[:60])
    with pytest.raises(ValueError, match=f"{half}: cannot be read"):
        molecules(half, tmp_path)
