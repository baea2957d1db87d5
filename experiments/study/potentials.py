"""Potentials that are compared in the study of forces: with experts, and what may do as much.

All are called as :class:`~experiments.train.potential.Potential` is, of which they are kinds.
Shapes: C configurations, A atoms, I and O the widths of a layer, S sources.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import gmoe
from experiments.train.data.forces import DRAWN, ELEMENTS
from experiments.train.potential import ATOMWISE, Potential, atomwise
from gmoe.routers import ByType, FromInput

SOURCES = 4
"""S, of the models that are told the source."""
BY_ELEMENT = ByType("z", ELEMENTS)
BY_SOURCE = ByType("source", range(SOURCES), batch="batch")
BY_CHANCE = ByType("drawn", range(DRAWN), batch="batch")
BY_SYSTEM = FromInput("system", dim=SOURCES + len(ELEMENTS), batch="batch")
HIDDEN = 32
"""Width of the network of a system."""
MIXED = 8
"""Experts whose weights are mixed."""
FROZEN_SCALE = 10.0
"""By what the last layer of a frozen router is multiplied, so that its mixtures differ."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A model that is compared with others."""

    label: str
    build: Callable[[int, float], nn.Module]
    """Of the dense width, and the scale of energies."""
    begins: str = ""
    """The arm of a column before whose training goes on; by default none, and weights are drawn."""
    is_merged: bool = False
    """Whether the dense model of one system goes on in its place."""


class ScaleShift(nn.Module):
    """A linear layer, then a scale and a shift by type: an embedding again, and no experts.

    Args:
        linear: the layer.
        by: the types.
    """

    def __init__(self, linear: nn.Linear, by: ByType) -> None:
        super().__init__()
        self.linear = linear
        self.router = by(linear.in_features, num_experts=len(by.values))
        self.scale = nn.Parameter(torch.zeros(len(by.values), linear.out_features))
        self.shift = nn.Parameter(torch.zeros(len(by.values), linear.out_features))

    def forward(self, x: Tensor) -> Tensor:
        """(A, O) for (A, I)."""
        kind = self.router(x).scores.argmax(dim=1)
        out: Tensor = self.linear(x)
        return out * (1 + self.scale[kind]) + self.shift[kind]


class Told(Potential):
    """A potential that is told of the system: a network adds a vector to each atom's embedding.

    Args:
        width, energy_scale: see :class:`~experiments.train.potential.Potential`.
        network: from ``system`` to width.
    """

    def __init__(self, width: int, energy_scale: float, network: nn.Module) -> None:
        super().__init__(width, energy_scale)
        self.network = network
        self.embedding.register_forward_hook(self._add)

    def tell(self, system: Tensor) -> None:
        """Keep what atoms begin with."""
        self._told = self.network(system)

    def _add(self, _: nn.Module, __: Any, out: Tensor) -> Tensor:
        return out + self._told


class OneHot(nn.Linear):
    """A vector for each source: all that a dense model must be told."""

    def __init__(self, width: int) -> None:
        super().__init__(SOURCES, width, bias=False)

    def forward(self, system: Tensor) -> Tensor:
        """(A, width)."""
        return super().forward(system[:, :SOURCES])


def network() -> nn.Sequential:
    """From ``system`` to a vector of ``HIDDEN``."""
    return nn.Sequential(
        nn.Linear(SOURCES + len(ELEMENTS), HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU()
    )


def embedded(width: int, energy_scale: float) -> Told:
    """A potential whose atoms begin with a vector of the source."""
    return Told(width, energy_scale, OneHot(width))


def wider(width: int, energy_scale: float) -> Told:
    """The same of twice the width."""
    return embedded(2 * width, energy_scale)


def scale_shift(width: int, energy_scale: float, by: ByType = BY_ELEMENT) -> nn.Module:
    """The same with a scale and a shift after each linear layer on atoms."""
    model = embedded(width, energy_scale)
    for name in atomwise(model):
        linear: Any = model.get_submodule(name)
        model.set_submodule(name, ScaleShift(linear, by))
    by.attach(model)
    return model


def experts(
    width: int,
    energy_scale: float,
    base: Callable[[int, float], nn.Module] = embedded,
    targets: tuple[str, ...] = ATOMWISE,
    start: Any = "copies",
    **options: Any,
) -> nn.Module:
    """The same with experts in its linear layers on atoms."""
    return gmoe.moefy(base(width, energy_scale), targets=targets, start=start, **options)


by_element = partial(experts, router=BY_ELEMENT)


def told_composition(width: int, energy_scale: float) -> Told:
    """The same, of the source and the shares of elements."""
    return Told(width, energy_scale, network().append(nn.Linear(HIDDEN, width)))


class Filmed(Potential):
    """A network of the system gives each linear layer on atoms a scale and a shift (FiLM)."""

    def __init__(self, width: int, energy_scale: float) -> None:
        super().__init__(width, energy_scale)
        self.network = network()
        self.films = nn.ModuleList()
        for name in atomwise(self):
            linear: Any = self.get_submodule(name)
            film = nn.Linear(HIDDEN, 2 * linear.out_features)
            nn.init.zeros_(film.weight)
            nn.init.zeros_(film.bias)
            self.films.append(film)
            linear.register_forward_hook(partial(self._film, film))

    def tell(self, system: Tensor) -> None:
        """Keep what scales and shifts are made of."""
        self._told = self.network(system)

    def _film(self, film: nn.Linear, _: nn.Module, __: Any, out: Tensor) -> Tensor:
        scale, shift = film(self._told).chunk(2, dim=1)
        return out * (1 + scale) + shift


learned = partial(experts, router=BY_SYSTEM, num_experts=MIXED, mix="weights")


def frozen(width: int, energy_scale: float) -> nn.Module:
    """Mixed weights whose router stays as it was drawn."""
    model = learned(width, energy_scale)
    router: Any = model.get_submodule("router_of_system")
    router.requires_grad_(False)
    router[-1].weight.mul_(FROZEN_SCALE)
    return model


class Both(nn.Module):
    """The sum of a linear layer and another one that starts at zero."""

    def __init__(self, first: nn.Linear) -> None:
        super().__init__()
        self.first = first
        self.second = nn.Linear(first.in_features, first.out_features, bias=False)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(A, O) for (A, I)."""
        return self.first(x) + self.second(x)


def element_and_learned(width: int, energy_scale: float) -> nn.Module:
    """Experts by element beside mixed weights, in each linear layer on atoms."""

    def doubled(width: int, energy_scale: float) -> nn.Module:
        model = embedded(width, energy_scale)
        for name in atomwise(model):
            linear: Any = model.get_submodule(name)
            model.set_submodule(name, Both(linear))
        return model

    model = by_element(width, energy_scale, base=doubled, targets=("*.first",))
    return gmoe.moefy(
        model,
        targets="*.second",
        router=BY_SYSTEM,
        num_experts=MIXED,
        mix="weights",
        start="copies",
    )


OF_SOURCES = {
    "embedded": Arm(label="dense, told the source", build=embedded),
    "wider": Arm(label="the same, twice as wide", build=wider),
    "element": Arm(label="experts by element", build=by_element),
    "learned": Arm(label="learned mixture of weights", build=learned),
    "composition": Arm(label="dense, told the composition too", build=told_composition),
    "element-learned": Arm(label="by element and mixture", build=element_and_learned),
    "source": Arm(
        label="experts by source",
        build=partial(experts, router=BY_SOURCE),
    ),
    "film-network": Arm(label="scale and shift by a network", build=Filmed),
    "film-element": Arm(label="scale and shift by element", build=scale_shift),
    "film-source": Arm(label="scale and shift by source", build=partial(scale_shift, by=BY_SOURCE)),
    "heads": Arm(
        label="own heads",
        build=partial(experts, router=BY_SOURCE, start="plain", targets=("lin1", "lin2")),
    ),
    "frozen": Arm(label="the mixture, router frozen at random", build=frozen),
    "chance": Arm(
        label="experts by a draw of the molecule",
        build=partial(experts, router=BY_CHANCE),
    ),
}
"""Arms on several sources, in the order in which they run."""

BEST = {name: OF_SOURCES[name] for name in ("embedded", "wider", "element", "learned")}
"""Arms at more width, and before a new source."""
TUNED = {name: replace(arm, begins=name) for name, arm in BEST.items()} | {
    "merged": Arm(
        label="learned mixture, merged before", build=learned, begins="learned", is_merged=True
    ),
    "fresh": Arm(label="dense, of the new source alone", build=embedded),
}
"""Arms that are trained further on a new source."""
