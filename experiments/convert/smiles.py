"""Write MoleculeNet's tables of SMILES as OGB's molecule sets, in OGB's own layout.

    python -m experiments.convert molecules HIV.csv.gz --out data

From these tables OGB made ``ogbg-molhiv`` and ten more. The folder ``data/ogbg_molhiv`` is read as
if downloaded, by the preset of that name and by ``ogb``. The features are ``ogb``'s own; the split
is by Bemis-Murcko scaffold. RDKit reads the molecules (pip install rdkit, the extra ``molecules``).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import pandas as pd
import tyro
from tqdm import tqdm

from experiments.train.checks import check, check_choice
from experiments.train.command_line import program
from experiments.train.data.published import published, without_update_check
from experiments.train.files import naming, read_csv, writing

FILES = {
    "ogbg-molhiv": ("hiv",),
    "ogbg-moltox21": ("tox21",),
    "ogbg-molbbbp": ("bbbp",),
    "ogbg-molbace": ("bace",),
    "ogbg-molsider": ("sider",),
    "ogbg-molclintox": ("clintox",),
    "ogbg-moltoxcast": ("toxcast", "toxcast_data"),
    "ogbg-molmuv": ("muv",),
    "ogbg-molesol": ("esol", "delaney-processed"),
    "ogbg-molfreesolv": ("freesolv", "sampl"),
    "ogbg-mollipo": ("lipo", "lipop", "lipophilicity"),
}
"""OGB's molecule sets that MoleculeNet publishes, and what MoleculeNet's files are called."""

LABELS = {
    "ogbg-molhiv": ("HIV_active",),
    "ogbg-molbbbp": ("p_np",),
    "ogbg-molbace": ("Class",),
    "ogbg-molclintox": ("FDA_APPROVED", "CT_TOX"),
    "ogbg-molesol": ("measured log solubility in mols per litre",),
    "ogbg-molfreesolv": ("expt",),
    "ogbg-mollipo": ("exp",),
}
"""The columns of labels. In tables of many labels, they are all but these:"""
OTHERS = ("smiles", "mol_id", "index", "")

PARTS = {"train": 0.8, "valid": 0.9, "test": 1.0}
"""The parts of the split, and the share of molecules up to their end."""
MAPPING = "mapping/mol"
"""OGB's table of the SMILES, which alone has a header."""


@dataclass(frozen=True)
class MoleculeSet:
    """What is written: tables by their path in the folder, and who goes where."""

    tables: dict[str, Any]
    split: dict[str, list[int]]
    unsanitized: list[tuple[int, str]]
    """Row and SMILES of the molecules whose valences RDKit refuses."""


def molecules(
    table: Annotated[Path, tyro.conf.Positional],
    out: Path = Path("data"),
    name: str | None = None,
) -> None:
    """Write a table of SMILES as OGB's folder of a molecule set.

    A molecule whose valences RDKit refuses is parsed without that check, counted and named; in the
    split it counts as one without rings.

    Args:
        table: .csv or .csv.gz, with a column ``smiles`` and one of numbers for each label, empty
            where there is none.
        out: the data root, in which the folder is made.
        name: which of OGB's sets it is, such as ogbg-molhiv. By default what the file's name says.

    Raises:
        ValueError: a table of another set; a label that cannot be; SMILES that cannot be parsed.
    """
    name = name_of(table) if name is None else name
    check_choice("name", name, FILES)
    folder = out / name.replace("-", "_")
    legal = "another folder, or delete it"
    check(not folder.exists(), "out", f"{folder}, which is there already", legal)
    made = molecule_set(table, name)
    out.mkdir(parents=True, exist_ok=True)
    with writing(folder), TemporaryDirectory(dir=out) as scratch:
        whole = Path(scratch, "whole")
        for path, rows in made.tables.items():
            file = whole / f"{path}.csv.gz"
            file.parent.mkdir(parents=True, exist_ok=True)
            pd.DataFrame(rows).to_csv(file, header=path == MAPPING, index=False, na_rep="nan")
        release = f"Made from {table.name} by experiments.convert, RDKit {version('rdkit')}\n"
        (whole / f"RELEASE_v{published(name)['version']}.txt").write_text(release)
        whole.rename(folder)
    parts = ", ".join(f"{part} {len(rows):,}" for part, rows in made.split.items())
    print(f"{name}: {sum(map(len, made.split.values())):,} molecules ({parts})")
    for row, smiles in made.unsanitized:
        print(f"  row {row}: {smiles}, which RDKit does not sanitize")


def name_of(table: Path) -> str:
    """OGB's name of a MoleculeNet file."""
    stem = table.name.removesuffix(".gz").removesuffix(".csv").lower()
    known = {file: name for name, files in FILES.items() for file in files}
    legal = f"a file named {', '.join(known)}.csv or .csv.gz; or --name with another"
    check(stem in known, "table", repr(str(table)), legal)
    return known[stem]


def is_binary(name: str) -> bool:
    """Whether the labels of a set are 0 and 1."""
    return bool(published(name)["task type"] == "binary classification")


def molecule_set(table: Path, name: str) -> MoleculeSet:
    """The tables of a set, molecule by molecule, then the split."""
    from rdkit import rdBase

    given, labels = read_table(table, name)
    raw: dict[str, list[Any]] = {file: [] for file in ("edge", "edge-feat", "node-feat")}
    counts: dict[str, list[int]] = {"num-node-list": [], "num-edge-list": []}
    scaffolds = defaultdict[str, list[int]](list)
    unsanitized = []
    with naming(table), rdBase.BlockLogs():  # what it does not sanitize is named at the end
        for row, smiles in enumerate(tqdm(given["smiles"], desc=name, unit=" mol", disable=None)):
            molecule, is_sane = parsed(smiles, row)
            edges, edge_features, node_features = features_of(molecule)
            raw["edge"] += edges
            raw["edge-feat"] += edge_features
            raw["node-feat"] += node_features
            counts["num-node-list"].append(len(node_features))
            counts["num-edge-list"].append(len(edges))
            if not is_sane:
                unsanitized.append((row, smiles))
            scaffolds[scaffold_of(molecule)].append(row)
    split = scaffold_split(scaffolds.values(), len(given))
    got = f"{len(given)} molecules of {len(scaffolds)} scaffolds"
    check(all(split.values()), str(table), got, "more: a part of the split is empty")
    tables: dict[str, Any] = {f"raw/{file}": rows for file, rows in (raw | counts).items()}
    tables["raw/graph-label"] = labels
    tables[MAPPING] = given.assign(mol_id=range(len(given)))
    folder = f"split/{published(name)['split']}"
    tables |= {f"{folder}/{part}": sorted(rows) for part, rows in split.items()}  # as OGB's are
    return MoleculeSet(tables, split, unsanitized)


def read_table(table: Path, name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The texts of the labels and SMILES; and the labels, NaN where there is none."""
    how: dict[str, Any] = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"}
    rows = read_csv(table, header=None, **how)
    with naming(table):
        header = [column.strip() for column in rows.iloc[0]]
        rows.columns = pd.Index(["smiles" if one.lower() == "smiles" else one for one in header])
        got = ", ".join(header[:9])
        check("smiles" in rows, "the header", got, "a column named smiles")
        names = LABELS.get(name, [one for one in rows if one.lower() not in OTHERS])
        missing = [label for label in names if label not in rows]
        check(not missing, "the header", got, f"{', '.join(missing)}, of {name}")
        tasks = int(published(name)["num tasks"])
        check(len(names) == tasks, "the header", f"{len(names)} labels", f"{tasks}, as {name} has")
        given = rows[1:].reset_index(drop=True)[[*names, "smiles"]]
        legal = "each column once, and as many fields in each row"
        is_whole = given.columns.is_unique and given.notna().all(axis=None)
        check(is_whole, "the table", "a column twice, or a row that ends early", legal)
        given = given.apply(lambda column: column.str.strip())
        texts = given[[*names]]
        labels = texts.apply(pd.to_numeric, errors="coerce")
        is_legal = labels.isin([0, 1]) if is_binary(name) else labels.abs() < math.inf
        legal = "0, 1 or nothing" if is_binary(name) else "a number or nothing"
        for row, column in np.argwhere(~is_legal & (texts != ""))[:1]:
            check(False, f"row {row}", f"the label {texts.iloc[row, column]!r}", legal)
    return given, labels


def parsed(smiles: str, row: int) -> tuple[Any, bool]:
    """A molecule, and whether RDKit sanitizes it.

    Where only valences are refused, all other steps are taken, on which features depend: rings,
    aromaticity, conjugation, hybridization.
    """
    from rdkit import Chem

    molecule = Chem.MolFromSmiles(smiles)
    is_sane = molecule is not None
    if not is_sane:
        molecule = Chem.MolFromSmiles(smiles, sanitize=False)
        check(molecule is not None, f"row {row}", repr(smiles), "SMILES that RDKit can parse")
        molecule.UpdatePropertyCache(strict=False)
        steps = Chem.SANITIZE_ALL ^ Chem.SANITIZE_PROPERTIES
        Chem.SanitizeMol(molecule, steps, catchErrors=True)
    check(molecule.GetNumAtoms(), f"row {row}", repr(smiles), "a molecule of one atom or more")
    return molecule, is_sane


def features_of(molecule: Any) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Bonds as pairs of atoms, each once; their features; and those of the atoms, all by ``ogb``.

    ``smiles2graph`` calls the same functions, but parses SMILES itself, and none that RDKit does
    not sanitize. OGB's files hold a bond once: who reads them adds the reverse.
    """
    without_update_check()
    from ogb.utils.features import atom_to_feature_vector, bond_to_feature_vector

    bonds = molecule.GetBonds()
    edges = [[bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()] for bond in bonds]
    atoms = [atom_to_feature_vector(atom) for atom in molecule.GetAtoms()]
    return edges, [bond_to_feature_vector(bond) for bond in bonds], atoms


def scaffold_of(molecule: Any) -> str:
    """The Bemis-Murcko scaffold without chirality: rings, and what links them.

    As ``MurckoScaffoldSmiles`` gives it, but for valences, which that refuses again. When OGB split
    HIV, RDKit took four molecules that today's does not.
    """
    from rdkit import Chem

    scaffold = Chem.MurckoDecompose(molecule)
    scaffold.UpdatePropertyCache(strict=False)
    return str(Chem.MolToSmiles(scaffold, isomericSmiles=False))


def scaffold_split(groups: Iterable[list[int]], count: int) -> dict[str, list[int]]:
    """Molecules of each part: scaffolds as a whole, largest first, ties from the end of the table.

    As MoleculeNet and OGB split: a scaffold that no longer fits into train goes to valid or test.
    """
    split: dict[str, list[int]] = {part: [] for part in PARTS}
    for group in sorted(groups, key=lambda group: (len(group), group[0]), reverse=True):
        train, valid, test = split.values()
        if len(train) + len(group) <= PARTS["train"] * count:
            train += group
        elif len(train) + len(valid) + len(group) <= PARTS["valid"] * count:
            valid += group
        else:
            test += group
    return split


main = program("convert molecules", molecules, __doc__, extra="molecules")
