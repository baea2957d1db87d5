"""
Forces: experts by element
==========================

PyG's ``SchNet`` learns energies, and forces as their gradients, with an expert for each element in
its atomwise layers. :class:`gmoe.routers.ByType` reads the elements from the argument ``z`` of the
model, once in each call. The routing does not depend on positions, so that energies stay smooth;
experts start as the dense layer, and a training step differentiates the forces again.

The labels are those of a pair potential made here, whose depth and length depend on the elements.

.. code-block:: none

    pip install "gmoe[graph]"
    python examples/forces.py          # minutes on one core
    python examples/forces.py --fast   # seconds

One seed of each takes 3 minutes of a core, beside other jobs, and prints::

    SchNet     test error of a force 0.0130, 221 s
    by element test error of a force 0.0113, 170 s
"""

# %%
# Molecules: random clusters of atoms; energies and forces of Morse potentials between all pairs.
import argparse
import time

import torch
from torch import Tensor, nn
from torch_geometric.nn import SchNet

import gmoe
from gmoe.routers import ByType

parser = argparse.ArgumentParser()
parser.add_argument("--fast", action="store_true", help="seconds")
args = parser.parse_args()
steps = 20 if args.fast else 1500

ELEMENTS = torch.tensor([1, 6, 7, 8])
ATOMS = 8
DEPTH = torch.tensor([0.4, 1.0, 0.8, 0.6])
LENGTH = torch.tensor([1.0, 1.5, 1.4, 1.3])


def labels(kind_BA: Tensor, pos_BA3: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) energies and (B, A, 3) forces of B molecules of A atoms."""
    pos_BA3 = pos_BA3.clone().requires_grad_()
    first, second = torch.triu_indices(ATOMS, ATOMS, 1)
    distance_BP = (pos_BA3[:, first] - pos_BA3[:, second]).norm(dim=-1)
    depth_BP = (DEPTH[kind_BA[:, first]] * DEPTH[kind_BA[:, second]]).sqrt()
    length_BP = (LENGTH[kind_BA[:, first]] + LENGTH[kind_BA[:, second]]) / 2
    well_BP = torch.exp(-1.5 * (distance_BP - length_BP))
    energy_B = (depth_BP * (well_BP.square() - 2 * well_BP)).sum(dim=1)
    (slope_BA3,) = torch.autograd.grad(energy_B.sum(), pos_BA3)
    return energy_B.detach(), -slope_BA3


def molecules(number: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Elements, positions, energies and forces: atoms on a grid, each moved a little."""
    generator = torch.Generator().manual_seed(seed)
    kind_BA = torch.randint(len(ELEMENTS), (number, ATOMS), generator=generator)
    grid_A3 = torch.cartesian_prod(*[torch.arange(2.0)] * 3) * 1.6
    pos_BA3 = grid_A3 + 0.15 * torch.randn(number, ATOMS, 3, generator=generator)
    return ELEMENTS[kind_BA], pos_BA3, *labels(kind_BA, pos_BA3)


# %%
# The model. PyG's SchNet finds neighbors by another package unless it is told how; here every atom
# of a molecule is the neighbor of every other one.
def pairs(pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs of atoms of a molecule, and their distances."""
    is_pair = (batch[:, None] == batch) & ~torch.eye(len(pos), dtype=torch.bool)
    edge_index = is_pair.nonzero().T
    sender, receiver = edge_index
    return edge_index, (pos[sender] - pos[receiver]).norm(dim=-1)


def schnet() -> nn.Module:
    torch.manual_seed(0)
    return SchNet(32, 32, num_interactions=2, num_gaussians=20, interaction_graph=pairs)


def by_element() -> nn.Module:
    return gmoe.moefy(
        schnet(),
        targets=["interactions.*.conv.lin*", "interactions.*.lin", "lin1", "lin2"],
        router=ByType("z", ELEMENTS.tolist()),
        start="copies",
    )


def predict(model: nn.Module, z: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
    """Energies and forces; those of a training step are differentiated again."""
    batch = torch.arange(len(z)).repeat_interleave(ATOMS)
    flat = pos.reshape(-1, 3).clone().requires_grad_()
    energy = model(z.reshape(-1), flat, batch)[:, 0]
    (slope,) = torch.autograd.grad(energy.sum(), flat, create_graph=model.training)
    return energy, -slope.view_as(pos)


# %%
# Training, the same for both.
def train(model: nn.Module) -> float:
    """The mean error of the forces on molecules that were not trained on."""
    z, pos, energy, force = molecules(2000, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        rows = torch.randint(len(z), (32,), generator=torch.Generator().manual_seed(step))
        found_energy, found_force = predict(model.train(), z[rows], pos[rows])
        loss = (found_energy - energy[rows]).abs().mean()
        loss = loss + 10 * (found_force - force[rows]).norm(dim=-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    z, pos, _, force = molecules(500, seed=1)
    return (predict(model.eval(), z, pos)[1] - force).norm(dim=-1).mean().item()


for name, build in (("SchNet", schnet), ("by element", by_element)):
    start = time.perf_counter()
    error = train(build())
    print(f"{name:10} test error of a force {error:.4f}, {time.perf_counter() - start:.0f} s")

# sphinx_gallery_thumbnail_path = "figures/examples/forces.svg"
