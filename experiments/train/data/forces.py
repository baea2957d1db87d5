"""Configurations of molecules with energies and forces, as ``experiments.convert forces`` writes.

Shapes: C configurations, A atoms of all of them, M molecules, S sources of labels.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from experiments.train.checks import check
from experiments.train.files import read_npz

ELEMENTS = (1, 6, 7, 8, 9, 15, 16, 17, 35)
"""Atomic numbers of H, C, N, O, F, P, S, Cl and Br, of which the molecules are."""
Part: TypeAlias = Literal["train", "val", "test", "larger", "elements"]
"""Of the split by molecule. The last two are further test sets, of what training never sees:
molecules of more atoms, and molecules of more different elements."""
PARTS: tuple[Part, ...] = get_args(Part)
NEEDED = PARTS[:3]
"""Parts that every file has; the others may be empty."""
MOST_EVALUATED = 500
"""Configurations of a part that are evaluated; of more, some that are spread over the file."""
DRAWN = 4
"""Kinds of molecules that are drawn by chance, for a control."""
WIDTHS = {
    "part": (), "molecule": (), "atoms": (), "source": (), "energy": (), "z": (), "pos": (3,),
    "force": (3,),
}  # fmt: skip
"""The arrays of numbers, and the shape of a row of each."""


LABELS = ("energy", "force")
SHARE_SCALE = 3.0
"""Shares of elements are small beside a one-hot source."""


class Molecules(NamedTuple):
    """Configurations side by side, as a model is called with them."""

    z: Tensor
    """(A,) atomic numbers."""
    pos: Tensor
    """(A, 3) in Å."""
    batch: Tensor
    """(A,) the configuration of each atom, from 0, ascending."""
    source: Tensor
    """(C,) what labeled each configuration, from 0."""
    system: Tensor
    """(C, S + elements) the source, one-hot, and ``SHARE_SCALE`` times the shares of elements."""
    drawn: Tensor
    """(C,) a number that is drawn for each molecule."""
    energy: Tensor
    """(C,) in eV, less the mean energies of the atoms."""
    force: Tensor
    """(A, 3) in eV/Å."""

    @property
    def atoms(self) -> Tensor:
        """(C,) atoms of each configuration."""
        return torch.bincount(self.batch, minlength=len(self.energy))

    @property
    def inputs(self) -> dict[str, Tensor]:
        """All but energies and forces, by the names of a model's arguments."""
        return {name: value for name, value in self._asdict().items() if name not in LABELS}


@dataclass(frozen=True, kw_only=True)
class Configurations:
    """All configurations of a file.

    From the energies a least-squares fit by elements is taken off, made on the training part of
    each source: what is left is what a model has to learn.
    """

    molecules: Molecules
    molecule: Tensor
    """(C,) the molecule of each configuration, from 0."""
    start: Tensor
    """(C + 1,) the first atom of each configuration, and the number of atoms."""
    rows: dict[str, Tensor]
    """The configurations of each part that count, in the order of the file; of those that one
    source labeled, ``PART/SOURCE``."""
    energy_scale: float
    """Spread of the energy of an atom, on the training part."""
    force_scale: float
    """Spread of a component of the forces there."""
    digest: str
    """Of all numbers of the file."""

    def batch(self, rows: Tensor) -> Molecules:
        """Some configurations, in this order."""
        start = self.start[rows]
        count = self.start[rows + 1] - start
        first = count.cumsum(0) - count
        batch = torch.arange(len(rows)).repeat_interleave(count)
        atom = torch.arange(len(batch)) + (start - first)[batch]
        every = self.molecules
        return Molecules(
            every.z[atom],
            every.pos[atom],
            batch,
            every.source[rows],
            every.system[rows],
            every.drawn[rows],
            every.energy[rows],
            every.force[atom],
        )

    @property
    def sources(self) -> int:
        """S."""
        return int(self.molecules.source.max()) + 1

    def told_as(self, source: int, other: int) -> Configurations:
        """The same, but models are told another source than the one that labeled."""
        told = self.molecules.source.clone()
        system = self.molecules.system.clone()
        is_own = told == source
        told[is_own] = other
        system[is_own, source] = 0
        system[is_own, other] = 1
        return replace(self, molecules=self.molecules._replace(source=told, system=system))


def read_configurations(path: Path) -> Configurations:
    """Read a file of ``experiments.convert forces``.

    Raises:
        ValueError: a broken file; a part without any configuration.
    """
    arrays = read_npz(path, WIDTHS)
    missing = [name for name in WIDTHS if name not in arrays]
    check(not missing, str(path), f"no {', '.join(missing)}", "what experiments.convert writes")
    configurations, atoms = (len(arrays[name]) for name in ("energy", "z"))
    for name, width in WIDTHS.items():
        expected = (atoms if name in ("z", "pos", "force") else configurations, *width)
        found = arrays[name].shape
        check(found == expected, str(path), f"{name} of shape {found}", f"{expected}")
    count = torch.from_numpy(arrays["atoms"].astype(np.int64))
    check(int(count.sum()) == atoms, str(path), f"{int(count.sum())} atoms", f"{atoms}, as z has")
    digest = hashlib.sha256()
    for name in WIDTHS:
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())

    part = torch.from_numpy(arrays["part"].astype(np.int64))
    source = torch.from_numpy(arrays["source"].astype(np.int64))
    rows: dict[str, Tensor] = {
        name: (part == number).nonzero()[:, 0] for number, name in enumerate(PARTS)
    }
    for name in NEEDED:
        check(len(rows[name]), str(path), f"no configurations of the part {name}", "some")
    sources = int(source.max()) + 1
    for name in PARTS[1:]:
        rows[name] = evenly(rows[name], min(len(rows[name]), MOST_EVALUATED * sources))
    for name, number in product(PARTS, range(sources)):
        rows[f"{name}/{number}"] = rows[name][source[rows[name]] == number]
        is_there = name not in NEEDED or len(rows[f"{name}/{number}"])
        check(is_there, str(path), f"no {name} of source {number}", "some")

    z = torch.from_numpy(arrays["z"].astype(np.int64))
    batch = torch.arange(configurations).repeat_interleave(count)
    is_element = z[:, None] == torch.tensor(ELEMENTS)
    others = sorted({*z[~is_element.any(dim=1)].tolist()})
    check(not others, str(path), f"elements {others}", f"some of {[*ELEMENTS]}")
    composition = torch.zeros(configurations, len(ELEMENTS), dtype=torch.float64)
    composition.index_add_(0, batch, is_element.double())
    energy = torch.from_numpy(arrays["energy"].astype(np.float64))
    for number in range(sources):
        fitted, own = rows[f"train/{number}"], source == number
        by_element = torch.linalg.lstsq(composition[fitted], energy[fitted, None], driver="gelsd")
        energy[own] -= (composition[own] @ by_element.solution)[:, 0]
    fitted = rows["train"]
    force = torch.from_numpy(arrays["force"].astype(np.float32))
    is_fitted = torch.zeros(configurations, dtype=torch.bool)
    is_fitted[fitted] = True
    molecule = torch.from_numpy(arrays["molecule"].astype(np.int64))
    shares = SHARE_SCALE * composition / count[:, None]
    generator = torch.Generator().manual_seed(0)
    molecules = Molecules(
        z=z,
        pos=torch.from_numpy(arrays["pos"].astype(np.float32)),
        batch=batch,
        source=source,
        system=torch.cat([one_hot(source, sources), shares], dim=1).float(),
        drawn=torch.randint(DRAWN, (int(molecule.max()) + 1,), generator=generator)[molecule],
        energy=energy.float(),
        force=force,
    )
    return Configurations(
        molecules=molecules,
        molecule=molecule,
        start=torch.cat([count.new_zeros(1), count.cumsum(0)]),
        rows=rows,
        energy_scale=float((energy / count)[fitted].std()),
        force_scale=float(force[is_fitted[batch]].std()),
        digest=digest.hexdigest()[:16],
    )


def evenly(rows: Tensor, count: int) -> Tensor:
    """``count`` of the rows, from the first to the last: a file has a table after the other."""
    return rows[torch.arange(count) * len(rows) // count]
