"""Write configurations of molecules with energies and forces, from tables of SMILES.

    python -m experiments.convert forces ESOL.csv.gz FreeSolv.csv.gz --out forces.npz

Each molecule gets conformers by RDKit (ETKDG, then UFF), whose atoms are moved at random by 0.02 to
0.1 Å, and energies and forces by tblite (Bannwarth et al., 2019). A configuration of 15 atoms takes
about 25 ms of a core, most of it for the conformer. All follows from the SMILES and the seed, so
that no data need to be passed on: this command is the data set.

Of the ``theories`` (methods of tblite, and UFF by RDKit) one labels each molecule to train on, in
proportion to ``shares``, as real data are; all others are labeled by all.

Molecules are split by what they are, whichever tables name them. Those of more than 16 atoms, and
of more than four elements, are test sets of their own; of the others one in ten is for validation
and one in ten for the test. ``experiments.sweep forces`` trains on the file.

It needs RDKit and tblite (pip install rdkit tblite, the extra ``forces``).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import tyro
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from tqdm import tqdm

from experiments.train.checks import check, check_choice
from experiments.train.command_line import program
from experiments.train.data.forces import ELEMENTS, PARTS, Part
from experiments.train.files import read_csv, replacing

FEWEST_ATOMS = 3
TRAINED_ATOMS = 16
MOST_ATOMS = 20
"""Molecules have so many atoms; above ``TRAINED_ATOMS`` they are the part ``larger``."""
TRAINED_ELEMENTS = 4
"""Molecules of more different elements are the part ``elements``."""
JITTER = (0.02, 0.1)
"""Å: the standard deviation of the moves of a configuration is drawn between these."""
LARGEST_FORCE = 25.0
"""eV/Å: configurations with more have atoms inside each other, and are left out."""
BOHR = 0.529177210903
HARTREE = 27.211386245988
"""In Å and eV (CODATA 2018)."""

KCAL = 0.0433641153087705
"""A kcal/mol in eV."""
UFF = "UFF"
THEORIES = (UFF, "GFN1-xTB", "IPEA1-xTB", "GFN2-xTB")
"""What labels: a force field of RDKit, and methods of tblite."""

Record: TypeAlias = dict[str, Any]
"""A molecule: ``smiles``, and either the ``reason`` why it was refused or its configurations."""


@dataclass(frozen=True)
class Sources:
    """The theories that label molecules, and of those to train on the share of each."""

    theories: tuple[str, ...]
    shares: tuple[float, ...]

    def of(self, smiles: str, part: Part) -> Sequence[int]:
        """The numbers of the theories that label a molecule."""
        if part != "train":
            return range(len(self.theories))
        ends = np.cumsum(self.shares) / np.sum(self.shares)
        drawn = np.random.default_rng([digest(smiles), 1]).random()
        return [int(np.searchsorted(ends, drawn, side="right"))]


def forces(
    tables: Annotated[tuple[Path, ...], tyro.conf.Positional],
    out: Path = Path("forces.npz"),
    molecules: int = 1000,
    each: int = 4,
    seed: int = 0,
    theories: tuple[str, ...] = THEORIES,
    shares: tuple[float, ...] = (),
) -> None:
    """Write configurations of the molecules of tables, with energies and forces by theories.

    Neutral closed-shell molecules of 3 to 20 atoms are taken, of H, C, N, O, F, P, S, Cl and Br;
    the file names all others that were met, with the reason.

    Args:
        tables: .csv or .csv.gz with a column ``smiles``.
        out: the file, a numpy archive.
        molecules: of each table at most; which ones, follows from a digest of their SMILES.
        each: configurations of a molecule.
        seed: of conformers and moves.
        theories: what labels them: UFF, GFN1-xTB, IPEA1-xTB, or GFN2-xTB.
        shares: of the molecules to train on that each theory labels; by default equal ones.

    Raises:
        ValueError: a table without SMILES or that cannot be read; numbers below 1; shares that are
            not one for each theory; no molecule that can be taken.
        ModuleNotFoundError: RDKit or tblite is missing.
    """
    import rdkit  # noqa: F401  # before anything is written
    import tblite.interface  # noqa: F401

    check(tables, "tables", "none", "one or more")
    for name, number in (("molecules", molecules), ("each", each)):
        check(number >= 1, name, number, "at least 1")
    check(not out.exists(), "out", f"{out}, which is there already", "another, or delete it")
    for theory in theories:
        check_choice("theories", theory, THEORIES)
    shares = shares or (1.0,) * len(theories)
    is_one_each = len(shares) == len(theories) and min(shares) > 0
    check(is_one_each, "shares", shares, f"{len(theories)} numbers above 0")
    sources = Sources(theories, shares)
    options = {
        "each": each,
        "seed": seed,
        "theories": theories,
        "shares": shares,
        "versions": {name: version(name) for name in ("rdkit", "tblite")},
    }
    kept = dict[str, Record]()
    for table in tables:
        kept |= of_table(table, molecules, each, seed, sources, kept)
    write(out, kept, options)


def of_table(
    table: Path,
    molecules: int,
    each: int,
    seed: int,
    sources: Sources,
    kept: Mapping[str, Record],
) -> dict[str, Record]:
    """The records of a table's molecules, which no table before has."""
    records = dict[str, Record]()
    taken = 0
    progress = tqdm(desc=table.name, total=molecules, unit=" mol", disable=None)
    with progress, threadpool_limits(1):  # of so few atoms, threads only wait for each other
        for smiles in canonical(table):
            if taken == molecules:
                break
            if smiles in kept or smiles in records:
                continue
            records[smiles] = labeled(smiles, each, seed, sources)
            if "reason" not in records[smiles]:
                taken += 1
                progress.update()
    return records


def canonical(table: Path) -> list[str]:
    """RDKit's SMILES of a table, ordered by digest, so that any number of them is a fair draw."""
    from rdkit import Chem, rdBase

    rows = read_csv(table, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    columns = [name for name in rows if name.strip().lower() == "smiles"]
    got = ", ".join(rows.columns[:9])
    check(columns, f"{table}: the header", got, "a column named smiles")
    texts = filter(None, rows[columns[0]].str.strip())
    with rdBase.BlockLogs():
        found = [(text, Chem.MolFromSmiles(text)) for text in texts]
    names = {text if one is None else Chem.MolToSmiles(one) for text, one in found}
    return sorted(names, key=digest)


def digest(smiles: str) -> int:
    """A number that follows from the SMILES alone."""
    return int.from_bytes(hashlib.sha256(smiles.encode()).digest()[:8], "big")


def part_of(smiles: str, z: Sequence[int]) -> Part:
    """The part of the split that a molecule belongs to."""
    if len(z) > TRAINED_ATOMS:
        return "larger"
    if len({*z}) > TRAINED_ELEMENTS:
        return "elements"
    of_tenth: dict[int, Part] = {0: "test", 1: "val"}
    return of_tenth.get(digest(smiles) % 10, "train")


# Labels -------------------------------------------------------------------------------------------


def labeled(smiles: str, each: int, seed: int, sources: Sources) -> Record:
    """The configurations of a molecule, with energies (eV) and forces (eV/Å)."""
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(smiles)
        if molecule is None:
            return {"smiles": smiles, "reason": "no SMILES that RDKit reads"}
        molecule = Chem.AddHs(molecule)
        reason = why_not(molecule) or embed(molecule, each, seed)
    if reason:
        return {"smiles": smiles, "reason": reason}
    z = [atom.GetAtomicNum() for atom in molecule.GetAtoms()]
    part = part_of(smiles, z)
    record: Record = {"smiles": smiles, "z": z, "part": part, "left_out": 0}
    record |= {"source": [], "pos": [], "energy": [], "force": []}
    draws = np.random.default_rng([seed, digest(smiles)])
    numbers = sources.of(smiles, part)
    names = dict.fromkeys(sources.theories[number] for number in numbers)
    for conformer in molecule.GetConformers():
        pos = conformer.GetPositions()
        pos = pos + draws.uniform(*JITTER) * draws.normal(size=pos.shape)
        try:
            labels = {name: singlepoint(name, molecule, pos) for name in names}
        except RuntimeError as error:  # tblite's, where it does not converge
            return {"smiles": smiles, "reason": f"tblite: {' '.join(str(error).split())}"}
        if max(np.abs(force).max() for _, force in labels.values()) > LARGEST_FORCE:
            record["left_out"] += len(numbers)
            continue
        for number in numbers:
            energy, force = labels[sources.theories[number]]
            record["source"].append(number)
            record["pos"].append(pos.tolist())
            record["energy"].append(energy)
            record["force"].append(force.tolist())
    return record


def why_not(molecule: Any) -> str:
    """Why a molecule with its hydrogens is not taken; empty if it is."""
    from rdkit import Chem

    atoms = molecule.GetAtoms()
    if len(Chem.GetMolFrags(molecule)) > 1:
        return "several molecules"
    if not FEWEST_ATOMS <= len(atoms) <= MOST_ATOMS:
        return f"not {FEWEST_ATOMS} to {MOST_ATOMS} atoms"
    if not {atom.GetAtomicNum() for atom in atoms} <= {*ELEMENTS}:
        return "another element"
    if Chem.GetFormalCharge(molecule) or any(atom.GetNumRadicalElectrons() for atom in atoms):
        return "an ion or a radical"
    return ""


def embed(molecule: Any, each: int, seed: int) -> str:
    """Give a molecule ``each`` conformers; returns why there are none."""
    from rdkit.Chem import rdDistGeom, rdForceFieldHelpers

    if not rdForceFieldHelpers.UFFHasAllMoleculeParams(molecule):
        return "UFF lacks parameters"
    rdDistGeom.EmbedMultipleConfs(molecule, each, randomSeed=seed)
    if molecule.GetNumConformers() < each:
        return "no conformers by RDKit"
    rdForceFieldHelpers.UFFOptimizeMoleculeConfs(molecule)
    return ""


def singlepoint(theory: str, molecule: Any, pos: Any) -> tuple[float, Any]:
    """Energy (eV) and forces (eV/Å) of a molecule with its atoms at positions in Å."""
    from rdkit.Chem import rdForceFieldHelpers
    from tblite.interface import Calculator

    if theory == UFF:
        field = rdForceFieldHelpers.UFFGetMoleculeForceField(molecule)
        flat = pos.ravel().tolist()
        slope = np.reshape(field.CalcGrad(flat), (-1, 3))
        return field.CalcEnergy(flat) * KCAL, -slope * KCAL
    z = np.array([atom.GetAtomicNum() for atom in molecule.GetAtoms()])
    calculator = Calculator(theory, z, pos / BOHR)
    calculator.set("verbosity", 0)
    result = calculator.singlepoint()
    return float(result.get("energy")) * HARTREE, -result.get("gradient") * (HARTREE / BOHR)


# Files --------------------------------------------------------------------------------------------


def write(out: Path, kept: Mapping[str, Record], options: Mapping[str, Any]) -> None:
    """Write the archive, and say what is in it, and why molecules are not."""
    records = [record for record in kept.values() if "reason" not in record]
    refused = {smiles: record["reason"] for smiles, record in kept.items() if "reason" in record}
    reasons = Counter(refused.values())
    got = f"{len(reasons)} reasons to refuse all molecules"
    check(records, "tables", got, "a molecule that can be taken")
    parts = [record["part"] for record in records]
    count = [len(record["energy"]) for record in records]
    arrays: dict[str, Any] = {
        "part": np.repeat([PARTS.index(part) for part in parts], count),
        "molecule": np.repeat(np.arange(len(records)), count),
        "atoms": np.repeat([len(record["z"]) for record in records], count),
        **{
            name: np.concatenate([record[name] for record in records])
            for name in ("source", "energy")
        },
        "z": np.concatenate(
            [record["z"] * number for record, number in zip(records, count, strict=True)]
        ),
        **{
            name: np.concatenate([np.reshape(record[name], (-1, 3)) for record in records])
            for name in ("pos", "force")
        },
    }
    arrays |= {
        "smiles": np.array([record["smiles"] for record in records]),
        "refused": np.array([*refused]),
        "reason": np.array([*refused.values()]),
        "made": np.array(f"experiments.convert forces, {json.dumps(options)}"),
    }
    with replacing(out) as fresh, fresh.open("wb") as file:
        np.savez_compressed(file, **arrays)
    for part in PARTS:
        number = sum(n for n, other in zip(count, parts, strict=True) if other == part)
        print(f"{part}: {number:,} configurations of {parts.count(part):,} molecules")
    left_out = sum(record["left_out"] for record in records)
    print(f"left out: {left_out:,} configurations of forces above {LARGEST_FORCE}")
    for reason, number in reasons.most_common():
        print(f"refused, {reason}: {number:,}")


main = program("convert forces", forces, __doc__, extra="forces")
