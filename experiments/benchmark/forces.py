"""Experts by element and mixed weights beside PyG's ``HeteroLinear``: products and force steps.

Shapes: A atoms, D width, E elements.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import HeteroLinear

import gmoe
from experiments.benchmark.measure import Benchmark, Step, Steps, check_equal, layer_step
from experiments.train.data.forces import ELEMENTS
from experiments.train.potential import ATOMWISE, Potential
from gmoe.routers import ByType

BOX = 2.0
"""Å: the spread of the atoms of a molecule; most of them are neighbors."""


class OfType(nn.Module):
    """``HeteroLinear`` in the place of a layer with experts, with the same weights and router.

    Args:
        layer: the layer with experts.
    """

    def __init__(self, layer: gmoe.MoE) -> None:
        super().__init__()
        experts: Any = layer.experts
        self.router = layer.router
        bias = experts.bias is not None
        sizes = (experts.in_features, experts.out_features, experts.num_experts)
        self.linear = HeteroLinear(*sizes, bias=bias)
        self.linear.weight = nn.Parameter(experts.weight.detach().transpose(1, 2).contiguous())
        if bias:
            self.linear.bias = nn.Parameter(experts.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """(A, O) for (A, I)."""
        element = self.router(x).scores.argmax(dim=1)
        out: Tensor = self.linear(x, element)
        return out


@dataclass(frozen=True, kw_only=True)
class ForcesBenchmark(Benchmark):
    """Experts by element beside a dense layer and PyG's HeteroLinear: one linear layer, forward and
    backward; and a training step of SchNet on forces, which is differentiated twice, also with
    weights mixed by composition, and with the outputs of all experts mixed by the same."""

    molecules: int = 32
    """In a batch."""
    atoms: int = 12
    """Of a molecule, of all elements alike."""
    widths: tuple[int, ...] = (32, 64)
    """Widths of atoms and filters."""
    threads: int = 1
    """CPU threads."""

    def groups(self) -> Iterator[Steps]:
        total = self.molecules * self.atoms
        z = torch.tensor(ELEMENTS)[torch.randint(len(ELEMENTS), (total,))]
        pos = BOX * torch.randn(total, 3)
        batch = torch.arange(self.molecules).repeat_interleave(self.atoms)
        for width in self.widths:
            yield products(width, z)
        for width in self.widths:
            yield force_steps(width, z, pos, batch)


def products(width: int, z: Tensor) -> Steps:
    """A linear layer on atoms, forward and backward; who goes where is known."""
    x = torch.randn(len(z), width, requires_grad=True)
    element = (z[:, None] == torch.tensor(ELEMENTS)).int().argmax(dim=1)
    ours: Any = gmoe.LinearExperts(width, width, num_experts=len(ELEMENTS))
    theirs: Any = HeteroLinear(width, width, len(ELEMENTS))
    with torch.no_grad():
        theirs.weight.copy_(ours.weight.transpose(1, 2))
        theirs.bias.copy_(ours.bias)
    routing = ByType("z", ELEMENTS).routing(z, takes_others=False)
    check_equal("HeteroLinear", theirs(x, element), ours(x, routing))
    return {
        f"linear {width}, dense": layer_step(nn.Linear(width, width), (x,)),
        f"linear {width}, by element": layer_step(ours, (x, routing)),
        f"linear {width}, HeteroLinear": layer_step(theirs, (x, element)),
    }


def force_steps(width: int, z: Tensor, pos: Tensor, batch: Tensor) -> Steps:
    """A training step on forces of SchNet, without the optimizer."""
    by_element = ByType("z", ELEMENTS)
    by_composition = ByType("z", ELEMENTS, batch="batch")

    def with_experts(router: ByType, **options: Any) -> nn.Module:
        torch.manual_seed(0)
        model = Potential(width, 1.0)
        return gmoe.moefy(model, targets=ATOMWISE, router=router, **options)

    ours, theirs = (with_experts(by_element, start="plain") for _ in range(2))
    for name, layer in [*theirs.named_modules()]:
        if isinstance(layer, gmoe.MoE):
            theirs.set_submodule(name, OfType(layer))
    given = (z, pos, batch, z)
    check_equal("HeteroLinear", theirs(*given), ours(*given))
    mixed = with_experts(by_composition, start="plain", mix="weights")
    outputs = with_experts(by_composition, start="plain")
    check_equal("outputs mixed", outputs(*given), mixed(*given))  # linear layers, one by one
    models: dict[str, nn.Module] = {
        "dense": Potential(width, 1.0),
        "by element": ours,
        "by element, W_0 + D": with_experts(by_element, start="copies"),
        "weights mixed by composition": mixed,
        "outputs mixed by composition": outputs,
        "HeteroLinear": theirs,
    }
    return {f"force step {width}, {name}": step_of(model, given) for name, model in models.items()}


def step_of(model: nn.Module, given: tuple[Tensor, ...]) -> Step:
    """Energies, forces, and the gradient of their squares."""
    z, pos, *others = given

    def step() -> None:
        place = pos.clone().requires_grad_()
        # A view: torch's counter of FLOPs takes no leaf whose gradient is asked for.
        energy = model(z, place.view_as(place), *others).sum()
        (slope,) = torch.autograd.grad(energy, place, create_graph=True)
        slope.square().sum().backward()
        model.zero_grad()

    return step
