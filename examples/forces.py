"""
Forces: experts by element
==========================

PyG's ``SchNet`` learns energies and forces with an expert for each element, which are read from the
argument ``z`` of the model: energies stay smooth, and ASE, if it is there, relaxes a molecule. ::

    pip install "gmoe[graph]" ase
    python examples/forces.py  # minutes on one core; with --fast seconds

The labels are those of a pair potential made here. One seed, a minute of CPU time, prints::

    SchNet     test error of a force 0.0395
    by element test error of a force 0.0298
    relaxed from a true energy of -10.451 to -14.919
"""

# %%
# Molecules: atoms on a grid, each moved a little; Morse potentials between all pairs.
import argparse
import importlib.util

import torch
from torch import Tensor, nn
from torch_geometric.nn import SchNet

import gmoe
from gmoe.routers import ByType

parser = argparse.ArgumentParser()
parser.add_argument("--fast", action="store_true", help="seconds")
steps = 20 if parser.parse_args().fast else 500

ATOMS, ELEMENTS = 8, torch.tensor([1, 6, 7, 8])
DEPTH, LENGTH = torch.tensor([[0.4, 1.0, 0.8, 0.6], [1.0, 1.5, 1.4, 1.3]])


def labels(z_BA: Tensor, pos_BA3: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) energies and (B, A, 3) forces of B molecules of A atoms."""
    pos_BA3 = pos_BA3.clone().requires_grad_()
    kind_BA = torch.searchsorted(ELEMENTS, z_BA)
    first, second = torch.triu_indices(ATOMS, ATOMS, 1)
    distance_BP = (pos_BA3[:, first] - pos_BA3[:, second]).norm(dim=-1)
    depth_BP = (DEPTH[kind_BA[:, first]] * DEPTH[kind_BA[:, second]]).sqrt()
    length_BP = (LENGTH[kind_BA[:, first]] + LENGTH[kind_BA[:, second]]) / 2
    well_BP = torch.exp(-1.5 * (distance_BP - length_BP))
    energy_B = (depth_BP * (well_BP.square() - 2 * well_BP)).sum(dim=1)
    return energy_B.detach(), -torch.autograd.grad(energy_B.sum(), pos_BA3)[0]


def molecules(number: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Elements, positions, energies and forces."""
    generator = torch.Generator().manual_seed(seed)
    z_BA = ELEMENTS[torch.randint(len(ELEMENTS), (number, ATOMS), generator=generator)]
    grid_A3 = torch.cartesian_prod(*[torch.arange(2.0)] * 3) * 1.6
    pos_BA3 = grid_A3 + 0.15 * torch.randn(number, ATOMS, 3, generator=generator)
    return z_BA, pos_BA3, *labels(z_BA, pos_BA3)


# PyG's SchNet finds neighbors by another package unless it is told how.
def pairs(pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs of atoms of a molecule, and their distances."""
    is_pair = (batch[:, None] == batch) & ~torch.eye(len(pos), dtype=torch.bool)
    edge_index = is_pair.nonzero().T
    return edge_index, (pos[edge_index[0]] - pos[edge_index[1]]).norm(dim=-1)


def predict(model: nn.Module, z_BA: Tensor, pos_BA3: Tensor) -> tuple[Tensor, Tensor]:
    """Energies and forces; those of a training step are differentiated again."""
    pos = pos_BA3.reshape(-1, 3).clone().requires_grad_()
    energy_B = model(z_BA.reshape(-1), pos, torch.arange(len(z_BA)).repeat_interleave(ATOMS))[:, 0]
    (slope,) = torch.autograd.grad(energy_B.sum(), pos, create_graph=model.training)
    return energy_B, -slope.view_as(pos_BA3)


# %%
# Training, the same for both. Experts start as the dense layers.
z, pos, energy, force = molecules(2000, seed=0)
test = molecules(500, seed=1)
for name in ("SchNet", "by element"):
    torch.manual_seed(0)
    model = SchNet(32, 32, num_interactions=2, num_gaussians=20, interaction_graph=pairs)
    if name == "by element":
        layers = ["interactions.*.conv.lin*", "interactions.*.lin", "lin1", "lin2"]
        by_element = ByType("z", ELEMENTS.tolist())
        gmoe.moefy(model, targets=layers, router=by_element, start="copies")
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
    error = (predict(model.eval(), *test[:2])[1] - test[3]).norm(dim=-1).mean()
    print(f"{name:10} test error of a force {error:.4f}")

# %%
# A relaxation on the energy with experts, and what it is worth on the true one.
if importlib.util.find_spec("ase"):
    import ase.calculators.calculator
    import ase.optimize

    class Learned(ase.calculators.calculator.Calculator):
        implemented_properties = ["energy", "forces"]  # noqa: RUF012  # ASE's form

        def calculate(self, atoms=None, properties=None, system_changes=None):  # type: ignore[no-untyped-def]
            place = torch.tensor(atoms.positions[None], dtype=torch.float)
            energy, force = predict(model, torch.tensor(atoms.numbers[None]), place)
            self.results = {"energy": energy.item(), "forces": force[0].double().numpy()}

    atoms = ase.Atoms(test[0][0].tolist(), test[1][0].numpy(), calculator=Learned())
    ase.optimize.BFGS(atoms, logfile=None).run(fmax=0.02, steps=5 if steps == 20 else 100)
    true_energy, _ = labels(test[0][:1], torch.tensor(atoms.positions[None]).float())
    print(f"relaxed from a true energy of {test[2][0]:.3f} to {true_energy.item():.3f}")

# sphinx_gallery_thumbnail_path = "figures/examples/forces.svg"
