"""
Several sources in one potential
================================

One PyG ``SchNet`` learns the forces of four sources, two of which label few molecules: not told the
source, told it by an embedding, wider, with experts by element or source, or with mixed weights. ::

    pip install "gmoe[graph,plot]"
    python examples/sources.py  # minutes on one core; with --fast seconds

The labels are of pair potentials made here, where each poor source has a near relative: they say
nothing of other data. One seed, and one step size for all: a claim needs a sweep for each.
"""

# %%
# Molecules: atoms on a grid, each moved a little; Morse potentials, by the source.
import sys
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch_geometric.nn import SchNet

import gmoe
from gmoe.routers import ByType, FromInput

steps = 10 if "--fast" in sys.argv else 600
ATOMS, ELEMENTS = 8, torch.tensor([1, 6, 7, 8])
TRAINED = [800, 800, 40, 40]  # molecules of each source; 2 is near to 0, and 3 to 1
LENGTH = torch.tensor([1, 1.5, 1.4, 1.3])
RICH = torch.tensor([[0.4, 1, 0.8, 0.6], [0.6, 0.7, 1, 0.5]])
DEPTH = torch.cat([RICH, RICH * torch.tensor([1.1, 1, 0.9, 1])])


def molecules(source_B: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Elements, positions, and forces by the source of each."""
    generator = torch.Generator().manual_seed(seed)
    kind_BA = torch.randint(len(ELEMENTS), (len(source_B), ATOMS), generator=generator)
    grid_A3 = torch.cartesian_prod(*[torch.arange(2.0)] * 3) * 1.6
    moved_BA3 = 0.15 * torch.randn(*kind_BA.shape, 3, generator=generator)
    pos_BA3 = (grid_A3 + moved_BA3).requires_grad_()
    first, second = torch.triu_indices(ATOMS, ATOMS, 1)
    distance_BP = (pos_BA3[:, first] - pos_BA3[:, second]).norm(dim=-1)
    depth_BA, length_BA = DEPTH[source_B[:, None], kind_BA], LENGTH[kind_BA]
    depth_BP = (depth_BA[:, first] * depth_BA[:, second]).sqrt()
    well_BP = torch.exp(0.75 * (length_BA[:, first] + length_BA[:, second]) - 1.5 * distance_BP)
    energy = (depth_BP * (well_BP.square() - 2 * well_BP)).sum()
    return ELEMENTS[kind_BA], pos_BA3.detach(), -torch.autograd.grad(energy, pos_BA3)[0]


def pairs(pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs of atoms of a molecule, and their distances: PyG's own needs another package."""
    is_pair = (batch[:, None] == batch) & ~torch.eye(len(pos), dtype=torch.bool)
    sender, receiver = is_pair.nonzero().T
    return torch.stack([sender, receiver]), (pos[sender] - pos[receiver]).norm(dim=-1)


class Potential(SchNet):
    """It is called with the source of each molecule, which its embedding may read."""

    def __init__(self, width: int = 32, embedded: bool = False) -> None:
        super().__init__(width, width, num_interactions=2, interaction_graph=pairs)
        self.embedded = embedded

    def forward(self, z, pos, batch, source, system):  # type: ignore[no-untyped-def]
        kind = z + 10 * source[batch] if self.embedded else z  # a vector an element and source
        return super().forward(kind, pos, batch)


def forces(model: nn.Module, source_B: Tensor, z_BA: Tensor, pos_BA3: Tensor) -> Tensor:
    """(B, A, 3); those of a training step are differentiated again."""
    pos = pos_BA3.reshape(-1, 3).clone().requires_grad_()
    batch = torch.arange(len(z_BA)).repeat_interleave(ATOMS)
    system = nn.functional.one_hot(source_B, len(TRAINED)).float()
    energy_B = model(z_BA.reshape(-1), pos, batch, source_B, system)
    (slope,) = torch.autograd.grad(energy_B.sum(), pos, create_graph=model.training)
    return -slope.view_as(pos_BA3)


# %%
# Six models, trained alike. Those with experts start as the dense one.
sources = range(len(TRAINED))
experts: dict[str, dict[str, Any]] = {
    "by element": {"router": ByType("z", ELEMENTS.tolist())},
    "by source": {"router": ByType("source", sources, batch="batch")},
    "mixture": {"router": FromInput("system", dim=4, batch="batch"), "mix": "weights"},
}
source = torch.arange(len(TRAINED)).repeat_interleave(torch.tensor(TRAINED))
z, pos, force = molecules(source, seed=0)
of_source = torch.arange(len(source)).split(TRAINED)
for place, name in enumerate(("dense", "embedding", "wider", *experts)):
    torch.manual_seed(0)
    is_told = name in ("embedding", "wider", "by element")
    model = Potential(48 if name == "wider" else 32, embedded=is_told)
    if name in experts:
        gmoe.moefy(model, targets="*lin*", start="copies", **experts[name])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    torch.manual_seed(1)  # all models see the same molecules, eight of each source in a step
    for _ in range(steps):
        own = torch.cat([rows[torch.randint(len(rows), (8,))] for rows in of_source])
        off = forces(model.train(), source[own], z[own], pos[own]) - force[own]
        off.norm(dim=-1).mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    errors = []
    for of_one in torch.tensor(sources).repeat_interleave(200).split(200):
        test_z, test_pos, test_force = molecules(of_one, seed=1)
        off = forces(model.eval(), of_one, test_z, test_pos) - test_force
        errors.append(float(off.norm(dim=-1).mean()))
    print(f"{name:10} test error of a force", *(f"{error:.3f}" for error in errors))
    plt.bar([one + 0.13 * place for one in sources], errors, 0.12, label=name)

# A bar a model, for each source: a mean would hide the poor ones, which are the last two.
plt.legend()
plt.show()

# sphinx_gallery_thumbnail_path = "figures/examples/sources.svg"
