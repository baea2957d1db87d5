"""Write MoleculeNet's tables of SMILES as OGB's molecule sets, in OGB's own layout.

    python -m experiments.convert molecules HIV.csv.gz --out data

From these tables OGB made ``ogbg-molhiv`` and ten more. The folder ``data/ogbg_molhiv`` is read as
if downloaded, by the preset of that name and by ``ogb``. The features are ``ogb``'s own; the split
is by Bemis-Murcko scaffold. RDKit reads the molecules (pip install rdkit, the extra ``molecules``).
"""

from __future__ import annotations

import csv
import gzip
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from experiments.convert.building import building
from experiments.train.checks import check, check_choice
from experiments.train.command_line import program
from experiments.train.data.published import published, without_update_check
from experiments.train.files import naming

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
TABLES = ("edge", "edge-feat", "node-feat", "num-node-list", "num-edge-list", "graph-label")
"""OGB's raw files, without ``.csv.gz``."""


@dataclass
class Figures:
    """What was written: sums over the molecules, and who went where."""

    name: str
    atoms: int = 0
    bonds: int = 0
    labels: list[list[float]] = field(default_factory=list)
    unsanitized: list[tuple[int, str]] = field(default_factory=list)
    """Row and SMILES of the molecules whose valences RDKit refuses."""
    split: dict[str, list[int]] = field(default_factory=dict)

    def report(self) -> str:
        """The figures in lines."""
        count = len(self.labels)
        task = published(self.name)
        lines = [
            f"{self.name}: {count:,} molecules, {self.atoms / count:.1f} atoms and "
            f"{self.bonds / count:.1f} bonds on average"
        ]
        for part, rows in self.split.items():
            line = f"  {part}: {len(rows):,} molecules"
            if task["task type"] == "binary classification":
                ones = sum(value == 1 for row in rows for value in self.labels[row])
                line += f", {ones:,} labels of 1"
            lines.append(line)
        if self.unsanitized:
            lines.append(f"  {len(self.unsanitized)} that RDKit does not sanitize, by row from 0:")
        lines += [f"    {row}: {smiles}" for row, smiles in self.unsanitized]
        return "\n".join(lines)


def molecules(
    table: Annotated[Path, tyro.conf.Positional],
    out: Path = Path("data"),
    name: str | None = None,
) -> Figures:
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
    with building(out / name.replace("-", "_"), "out") as folder:
        figures = write_molecules(table, name, folder)
    print(figures.report())
    return figures


def name_of(table: Path) -> str:
    """OGB's name of a MoleculeNet file."""
    stem = table.name.removesuffix(".gz").removesuffix(".csv").lower()
    known = {file: name for name, files in FILES.items() for file in files}
    legal = f"a file named {', '.join(known)}.csv or .csv.gz; or --name with another"
    check(stem in known, "table", repr(str(table)), legal)
    return known[stem]


def write_molecules(table: Path, name: str, folder: Path) -> Figures:
    """Write the files of a set, molecule by molecule, then the split."""
    from rdkit import Chem, rdBase

    figures = Figures(name)
    scaffolds = defaultdict[str, list[int]](list)
    said = published(name)
    is_binary = said["task type"] == "binary classification"
    with ExitStack() as stack:
        stack.enter_context(rdBase.BlockLogs())  # what it does not sanitize is named at the end
        header, rows = read_table(table, name, stack)
        tables = {file: _csv(folder / "raw" / f"{file}.csv.gz", stack) for file in TABLES}
        mapping = _csv(folder / "mapping" / "mol.csv.gz", stack)
        mapping.writerow([*header, "smiles", "mol_id"])
        for row, (smiles, texts) in enumerate(tqdm(rows, desc=name, unit=" mol", disable=None)):
            with naming(table):
                molecule, is_sane = parsed(smiles, row)
                labels = [_label(text, row, is_binary) for text in texts]
            edges, edge_features, node_features = features_of(molecule)
            tables["edge"].writerows(edges)
            tables["edge-feat"].writerows(edge_features)
            tables["node-feat"].writerows(node_features)
            tables["num-node-list"].writerow([len(node_features)])
            tables["num-edge-list"].writerow([len(edges)])
            tables["graph-label"].writerow(
                [f"{label:g}" if is_binary else label for label in labels]
            )
            mapping.writerow([*texts, smiles, row])
            if not is_sane:
                figures.unsanitized.append((row, smiles))
            scaffolds[scaffold_of(molecule)].append(row)
            figures.atoms += len(node_features)
            figures.bonds += len(edges)
            figures.labels.append(labels)
        check(figures.labels, str(table), "no molecules", "one a line")
    figures.split = scaffold_split(scaffolds.values(), len(figures.labels))
    got = f"{len(figures.labels)} molecules of {len(scaffolds)} scaffolds"
    check(all(figures.split.values()), str(table), got, "more: a part of the split is empty")
    with ExitStack() as stack:
        for part, members in figures.split.items():
            path = folder / "split" / said["split"] / f"{part}.csv.gz"
            _csv(path, stack).writerows([member] for member in sorted(members))  # as OGB's are
    release = f"Made from {table.name} by experiments.convert, RDKit {Chem.rdBase.rdkitVersion}\n"
    (folder / f"RELEASE_v{said['version']}.txt").write_text(release)
    return figures


def read_table(
    table: Path, name: str, stack: ExitStack
) -> tuple[list[str], Iterator[tuple[str, list[str]]]]:
    """The names of the labels; and by row the SMILES, and the text of each label."""
    with naming(table):
        opened: Any = gzip.open if table.suffix == ".gz" else open
        lines = csv.reader(
            stack.enter_context(opened(table, "rt", newline="", encoding="utf-8-sig"))
        )
        header = [column.strip() for column in next(lines, [])]
        lower = [column.lower() for column in header]
        check("smiles" in lower, "the header", ", ".join(header[:9]), "a column named smiles")
        for column in ("smiles", *LABELS.get(name, ())):
            count = (lower if column == "smiles" else header).count(column)
            check(count < 2, "the header", f"{column} {count} times", "each column once")
        labels = LABELS.get(name, [column for column in header if column.lower() not in OTHERS])
        missing = [label for label in labels if label not in header]
        check(not missing, "the header", ", ".join(header[:9]), f"{', '.join(missing)}, of {name}")
        tasks = int(published(name)["num tasks"])
        check(
            len(labels) == tasks, "the header", f"{len(labels)} labels", f"{tasks}, as {name} has"
        )
    places = [header.index(label) for label in labels]
    return list(labels), _rows(table, lines, len(header), lower.index("smiles"), places)


def _rows(
    table: Path, lines: Iterator[list[str]], columns: int, smiles: int, labels: Sequence[int]
) -> Iterator[tuple[str, list[str]]]:
    with naming(table):
        for row, line in enumerate(lines):
            check(len(line) == columns, f"row {row}", f"{len(line)} fields", f"{columns}, as above")
            yield line[smiles].strip(), [line[label].strip() for label in labels]


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


def _label(text: str, row: int, is_binary: bool) -> float:
    """A label, NaN for an empty text."""
    try:
        value = float(text) if text else math.nan
    except ValueError:
        value = math.inf
    legal = "0, 1 or nothing" if is_binary else "a number or nothing"
    is_class = math.isnan(value) or value in (0, 1)
    is_label = not math.isinf(value) and (is_class or not is_binary)
    check(is_label, f"row {row}", f"the label {text!r}", legal)
    return value


def _csv(path: Path, stack: ExitStack) -> Any:
    """A writer of a compressed table, closed with the stack."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return csv.writer(stack.enter_context(gzip.open(path, "wt", newline="")), lineterminator="\n")


main = program("convert molecules", molecules, __doc__, extra="molecules")
