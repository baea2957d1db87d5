"""Molecules of a run, whose atoms have the colors of their experts.

Shapes: T atoms, E experts.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.image
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor
from torch_geometric.utils import degree

from experiments.show.nodes import bin_names
from experiments.train.data.molecules import MoleculeBatches
from experiments.train.data.task import Task
from experiments.train.files import read_csv
from experiments.train.molecule_gnn import MoleculeGNN
from experiments.train.routing_stats import quantile_bins
from experiments.train.run_folder import RunFolder
from gmoe.plot import palette

TABLE = (
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se "
    "Br Kr Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy "
    "Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf "
    "Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og other"
)
SYMBOLS = tuple(TABLE.split())
"""Elements in the order of ``ogb``'s first feature of an atom, and what is none of these."""
DRAWN = 8
"""Molecules that are drawn."""
MOST = 512
"""Molecules of which the figures are."""
COLUMNS = 4
"""Molecules side by side."""


Atoms = tuple[list[tuple[Tensor, dict[str, Tensor]]], list[Figure], dict[str, Sequence[str]]]


def atoms_of(run: RunFolder, task: Task) -> Atoms:
    """By MoE layer, (T, E) the weights of atoms and what they may follow; drawings; and by property
    the names of its values.

    The atoms are those of validation molecules.

    There are no drawings without RDKit.

    Raises:
        ValueError: a model of one's own, which may hold its experts anywhere.
    """
    model: Any = run.load_model(task)
    if not isinstance(model, MoleculeGNN):
        raise ValueError("the model is your own")
    batches: Any = task.loader
    assert isinstance(batches, MoleculeBatches)
    assert task.split is not None
    rows = task.split["val"]
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))][:MOST]
    inputs = batches.batch(rows).inputs
    with torch.no_grad():
        _, routings = model(*inputs, return_routing=True)
    x, edge_index, _, molecule, _ = inputs
    bonds = degree(edge_index[1], len(x))
    known = {
        "ami_element": quantile_bins(x[:, 0]),
        "ami_degree": quantile_bins(bonds),
        "ami_ring": x[:, 8],
    }
    names: dict[str, Sequence[str]] = {
        "ami_element": element_names(x[:, 0], known["ami_element"]),
        "ami_degree": bin_names(bonds, known["ami_degree"], is_share=False),
        "ami_ring": ("in none", "in a ring"),
    }
    drawn = rows[:DRAWN].tolist()
    smiles = _smiles(run.config.data_root / run.config.dataset.replace("-", "_"), drawn)
    titles = [_title(batches.data.y[row]) for row in drawn]
    figures = []
    for routing in routings:
        experts = [routing.top_expert[molecule == number].tolist() for number in range(len(drawn))]
        figures.append(drawing(smiles, experts, routing.num_experts, titles))
    shown = [(routing.to_dense(), known) for routing in routings]
    return shown, [figure for figure in figures if figure is not None], names


def element_names(element_T: Tensor, bin_T: Tensor) -> list[str]:
    """The symbols of the elements in each bin, as ``"C"`` or ``"Cl, Br"``."""
    return [
        ", ".join(SYMBOLS[number] for number in element_T[bin_T == one].unique().tolist())
        for one in range(int(bin_T.max()) + 1)
    ]


def _smiles(folder: Path, rows: Sequence[int]) -> list[str]:
    """The SMILES of some molecules, from the table that OGB and the conversion give."""
    table = read_csv(folder / "mapping" / "mol.csv.gz", usecols=["smiles"], dtype=str)
    return [str(table["smiles"][row]) for row in rows]


def _title(y: Tensor) -> str:
    """The first labels of a molecule."""
    words = ["–" if value != value else f"{value:g}" for value in y[:3].tolist()]
    return ", ".join(words) + (", …" if len(y) > 3 else "")


def drawing(
    smiles: Sequence[str], experts: Sequence[Sequence[int]], num_experts: int, titles: Sequence[str]
) -> Figure | None:
    """Molecules in a grid, atoms in the colors of their experts; ``None`` without RDKit.

    An atom without an expert is gray.
    """
    try:
        from rdkit.Chem import Draw
    except ModuleNotFoundError:
        return None
    from experiments.convert.smiles import parsed

    colors = [*palette(num_experts=num_experts), (0.8, 0.8, 0.8)]
    lines = -(-len(smiles) // COLUMNS)
    figure = Figure(figsize=(2.6 * COLUMNS, 2.4 * lines + 0.4), layout="constrained")
    axes = figure.subplots(lines, COLUMNS, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, text, chosen, title in zip(axes, smiles, experts, titles, strict=False):
        molecule, _ = parsed(text, 0)
        canvas = Draw.rdMolDraw2D.MolDraw2DCairo(520, 420)
        Draw.rdMolDraw2D.PrepareAndDrawMolecule(
            canvas,
            molecule,
            highlightAtoms=list(range(len(chosen))),
            highlightAtomColors={atom: colors[expert] for atom, expert in enumerate(chosen)},
            highlightBonds=[],
            kekulize=False,  # RDKit cannot where it does not sanitize
        )
        canvas.FinishDrawing()
        axis.imshow(matplotlib.image.imread(io.BytesIO(canvas.GetDrawingText())))
        axis.set_title(title, fontsize="small")
    handles = [Patch(color=colors[expert], label=str(expert)) for expert in range(num_experts)]
    figure.legend(handles=handles, loc="outside lower center", ncols=num_experts, title="expert")
    return figure
