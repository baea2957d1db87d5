"""
Molecules: one graph each, many a step
======================================

GINE on the molecules of Mutagenicity, with :class:`gmoe.MoEConv` in place of each ``GINEConv`` and experts that choose
their atoms. 128 molecules make one PyG ``Batch``: ``batch=batch`` tells the router where each begins. Without it atoms
of all 128 would compete for the same experts, in silence, and a molecule's output would follow from its batch mates.

.. code-block:: none

    pip install "gmoe[graph]"
    python examples/molecules.py --data-root data   # Mutagenicity, 4,337 molecules, downloaded unless it is there
    python examples/molecules.py --fast             # rings and chains made here

RESULT
"""

# %%
# The data: atoms and bonds by type; a molecule is mutagenic or not. Or, made here: is a ring of five among the atoms?
import argparse
import statistics
import time

import torch
from torch import nn
from torch.nn import functional as F
from torch_geometric.data import Data
from torch_geometric.datasets import TUDataset
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GINEConv, global_add_pool
from torch_geometric.utils import to_undirected

from gmoe import MoEConv

parser = argparse.ArgumentParser()
parser.add_argument("--data-root", default="data", help="where TUDataset's folders are, or are downloaded to")
parser.add_argument("--seeds", type=int, default=3)
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--fast", action="store_true", help="seconds, and no download")
args = parser.parse_args()


def made(index: int) -> Data:
    """A chain of atoms of two types; the odd ones close a ring of five."""
    atoms = 8 + index % 7
    bonds = torch.stack([torch.arange(atoms - 1), torch.arange(1, atoms)])
    if index % 2:
        bonds = torch.cat([bonds, torch.tensor([[0], [4]])], dim=1)
    bonds = to_undirected(bonds)
    types = torch.randint(2, (atoms,)), torch.randint(2, (bonds.size(1),))
    x, edge_attr = (F.one_hot(one, 2).float() for one in types)
    return Data(x=x, edge_index=bonds, edge_attr=edge_attr, y=torch.tensor([index % 2]))


if args.fast:
    args.seeds, args.epochs = 1, 5
    molecules = [made(index) for index in range(512)]
else:
    molecules = list(TUDataset(args.data_root, "Mutagenicity"))
atom_types, bond_types = molecules[0].x.size(1), molecules[0].edge_attr.size(1)


# %%
# The model: four layers. ``GINEConv`` adds a bond's features to the atom's, so both are brought to one width.
class GINE(nn.Module):
    def __init__(self, experts: bool, width: int = 32) -> None:
        super().__init__()
        self.atoms, self.bonds = nn.Linear(atom_types, width), nn.Linear(bond_types, width)
        self.convs = nn.ModuleList(
            MoEConv("gine", width, width, num_experts=4, router="expert_choice")
            if experts
            else GINEConv(nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)))
            for _ in range(4)
        )
        self.out = nn.Linear(width, 2)

    def forward(self, molecules: Data) -> torch.Tensor:
        x, edge_attr = self.atoms(molecules.x), self.bonds(molecules.edge_attr)
        for conv in self.convs:
            groups = {"batch": molecules.batch} if isinstance(conv, MoEConv) else {}  # what competes: one molecule
            x = x + F.relu(conv(x, molecules.edge_index, edge_attr=edge_attr, **groups))
        return self.out(global_add_pool(x, molecules.batch) / 10)


# %%
# Training, 128 molecules a step. Validation selects the epoch; the test molecules are read once.
def train(model: nn.Module, seed: int) -> float:
    order = torch.randperm(len(molecules), generator=torch.Generator().manual_seed(seed)).tolist()
    tenth = len(order) // 10
    cuts = {"test": order[:tenth], "val": order[tenth : 2 * tenth], "train": order[2 * tenth :]}
    loaders = {
        part: DataLoader([molecules[i] for i in cut], 128, shuffle=part == "train") for part, cut in cuts.items()
    }
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    @torch.no_grad()
    def accuracy(part: str) -> float:
        model.eval()
        right = sum(int((model(batch).argmax(dim=1) == batch.y).sum()) for batch in loaders[part])
        return 100 * right / len(cuts[part])

    best_val, best = -1.0, model.state_dict()
    for _ in range(args.epochs):
        model.train()
        for batch in loaders["train"]:
            optimizer.zero_grad()
            F.cross_entropy(model(batch), batch.y).backward()
            optimizer.step()
        if (val := accuracy("val")) > best_val:
            best_val, best = val, {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(best)
    return accuracy("test")


for name, experts in (("GINEConv", False), ("MoEConv", True)):
    start, found = time.perf_counter(), []
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        found.append(train(GINE(experts), seed))
    std, seconds = statistics.stdev(found) if len(found) > 1 else 0.0, (time.perf_counter() - start) / len(found)
    print(f"{name:8} test accuracy {statistics.fmean(found):.1f} ± {std:.1f} %, {seconds:.0f} s a seed")
