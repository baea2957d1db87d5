"""A potential in training: energies of molecules, and forces as their gradients.

PyG's ``SchNet``, and what training in :mod:`experiments.train.training` does not have: a loss of
gradients, which is differentiated twice, a length in steps, and two errors instead of a score.

Shapes: C configurations, A atoms of all of them, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch_geometric.nn import SchNet

from experiments.train.checks import check
from experiments.train.data.forces import Configurations, Molecules

ATOMWISE = ("interactions.*.conv.lin*", "interactions.*.lin", "lin1", "lin2")
"""SchNet's linear layers on atoms: all but those of its filters, which see distances."""
CUTOFF = 5.0
"""Å: atoms beyond do not see each other."""
INTERACTIONS = 3
GAUSSIANS = 24
ENERGY_WEIGHT = 0.3
"""Of the energies in the loss, beside forces of weight 1."""
WARMUP = 100
"""Steps in which the step size rises."""
CLIP_NORM = 5.0
EVALUATED = 64
"""Configurations in a batch of an evaluation."""


class Potential(SchNet):
    """PyG's SchNet of three interactions.

    Args:
        width: D, of atoms and filters.
        energy_scale: of the energy of an atom, by which the output is multiplied.

    Shapes:
        - ``z``, ``batch``: (A,) elements, and configuration of each atom; ``pos``: (A, 3) in Å.
        - ``source``, ``system``, ``drawn``: see
          :class:`~experiments.train.data.forces.Molecules`. Routers may read them.
        - returns (C,) energies.
    """

    def __init__(self, width: int, energy_scale: float) -> None:
        super().__init__(
            width,
            width,
            num_interactions=INTERACTIONS,
            num_gaussians=GAUSSIANS,
            cutoff=CUTOFF,
            interaction_graph=neighbors,
            mean=0.0,
            std=energy_scale,
        )

    def forward(
        self,
        z: Tensor,
        pos: Tensor,
        batch: Tensor,
        source: Tensor,
        system: Tensor,
        drawn: Tensor,
    ) -> Tensor:
        """The energies; see the class."""
        self.tell(system[batch])
        energy: Tensor = super().forward(z, pos, batch)[:, 0]
        return energy

    def tell(self, system: Tensor) -> None:
        """What a kind of potential does with the system of each atom (A, S + elements)."""


def neighbors(pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of atoms of a molecule that are near, and their distances.

    PyG's own needs a package that pip does not have.
    """
    is_pair = (batch[:, None] == batch) & ~torch.eye(len(pos), dtype=torch.bool)
    edge_index = is_pair.nonzero().T
    distance = (pos[edge_index[0]] - pos[edge_index[1]]).norm(dim=-1)
    is_near = distance < CUTOFF
    return edge_index[:, is_near], distance[is_near]


def atomwise(model: nn.Module) -> list[str]:
    """The names of the linear layers on atoms."""
    names = [name for name, _ in model.named_modules()]
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in ATOMWISE)]


def predict(model: nn.Module, given: Molecules) -> tuple[Tensor, Tensor]:
    """(C,) energies and (A, 3) forces; in training these can be differentiated again."""
    pos = given.pos.clone().requires_grad_()
    energy = model(**given._replace(pos=pos).inputs)
    (slope,) = torch.autograd.grad(energy.sum(), pos, create_graph=model.training)
    return energy, -slope


def loss_of(model: nn.Module, given: Molecules, data: Configurations) -> Tensor:
    """The squared error of forces, and with ``ENERGY_WEIGHT`` that of the energy of an atom."""
    energy, force = predict(model, given)
    of_force = (force - given.force).square().mean() / data.force_scale**2
    of_energy = ((energy - given.energy) / given.atoms).square().mean() / data.energy_scale**2
    return of_force + ENERGY_WEIGHT * of_energy


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a potential is trained; the same for all models that are compared."""

    width: int
    """D, of the dense model."""
    steps: int
    of_sources: tuple[int, ...]
    """Configurations of each source in a batch; of a source that is held out, none."""

    @property
    def sources(self) -> list[int]:
        """The sources that it trains on."""
        return [source for source, number in enumerate(self.of_sources) if number]


def factor(step: int, steps: int) -> float:
    """Of the step size at a step: it rises, then falls to 0 along a cosine."""
    return min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def train(
    model: nn.Module, data: Configurations, recipe: Recipe, *, lr: float, seed: int
) -> Iterator[int]:
    """Train in place, and yield the number of each step that is done."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    schedule = LambdaLR(optimizer, lambda step: factor(step, recipe.steps))
    model.train()
    for step, given in enumerate(batches(data, recipe, seed), start=1):
        optimizer.zero_grad()
        loss_of(model, given, data).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        schedule.step()
        yield step


def batches(data: Configurations, recipe: Recipe, seed: int) -> Iterator[Molecules]:
    """One for each step: pass after pass over what a source has to train on, shuffled, in whole
    batches."""
    generator = torch.Generator().manual_seed(seed)
    own = [
        passes(data.rows[f"train/{source}"], recipe.of_sources[source], generator)
        for source in recipe.sources
    ]
    for _ in range(recipe.steps):
        yield data.batch(torch.cat([next(rows) for rows in own]))


def passes(rows: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows in whole batches, shuffled anew in each pass over them, without an end.

    Raises:
        ValueError: fewer rows than one batch has.
    """
    check(len(rows) >= size, "data", f"{len(rows)} configurations of a source", f"at least {size}")
    while True:
        order = torch.randperm(len(rows), generator=generator)
        yield from rows[order].split(size)[: len(rows) // size]


class Residuals(NamedTuple):
    """What a model says above what the labels say."""

    energy: Tensor
    """(C,) in meV an atom."""
    force: Tensor
    """(A, 3) in meV/Å."""

    @property
    def errors(self) -> dict[str, float]:
        """Mean absolute errors, of forces by component."""
        return {name: float(getattr(self, name).abs().mean()) for name in ("force", "energy")}

    def less(self, other: Residuals) -> Residuals:
        """Of differences between two labels of the same configurations."""
        return Residuals(self.energy - other.energy, self.force - other.force)


def residuals(model: nn.Module, data: Configurations, rows: Tensor) -> Residuals:
    """Of some configurations, in evaluation."""
    model.eval()
    found = []
    for some in rows.split(EVALUATED):
        given = data.batch(some)
        energy, force = predict(model, given)
        of_atom = (energy.detach() - given.energy) / given.atoms
        found.append((1000 * of_atom, 1000 * (force - given.force)))
    energies, forces = zip(*found, strict=True)
    return Residuals(torch.cat(energies), torch.cat(forces))
