"""Do two runs find the same experts? Shapes: R routings, T tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from experiments.routing_stats import primary_expert
from experiments.run_folder import RunFolder
from experiments.structure import ami as ami_of

MOST_TOKENS = 50_000
"""Of more tokens a random part is compared."""


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """Adjusted mutual information (Vinh et al., 2010) of routings: 1 the same experts up to their numbers, 0 chance.

    Args:
        names: run and seed of each.
        runs: the run of each.
        ami: (R, R), mean over the layers.
        shuffled: mean over pairs where one routing is shuffled, the baseline.
        others: runs that are not compared, since they route other numbers of tokens or layers.
    """

    names: list[str]
    runs: list[str]
    ami: np.ndarray
    shuffled: float
    others: list[str]

    def within(self, run: str) -> float | None:
        """Mean between seeds of one run; ``None`` of one seed."""
        return self._mean([run], [run])

    def between(self, one: str, other: str) -> float | None:
        """Mean between the seeds of two runs."""
        return self._mean([one], [other])

    def _mean(self, rows: Sequence[str], columns: Sequence[str]) -> float | None:
        chosen = [
            self.ami[i, j]
            for i, row in enumerate(self.runs)
            for j, column in enumerate(self.runs)
            if i != j and row in rows and column in columns
        ]
        return float(np.mean(chosen)) if chosen else None


def similarity(runs: Sequence[RunFolder], seed: int = 0) -> Similarity | None:
    """Of the seeds that route as many tokens in as many layers, the most that there are; ``None`` of fewer than two.

    Runs of one data set route the same tokens: all nodes of the graph, or the patches of all test images.

    Args:
        runs: of one data set.
        seed: of the tokens compared, and of the shuffled baseline.
    """
    groups: dict[tuple[int, ...], list[tuple[str, str, list[Tensor]]]] = {}
    for run in runs:
        for number, log in run.seeds.items():
            experts = [primary_expert(routing) for routing in log.routings]
            if experts:
                shape = tuple(len(layer) for layer in experts)
                groups.setdefault(shape, []).append((f"{run.name}, seed {number}", run.name, experts))
    found = max(groups.values(), key=len, default=[])
    if len(found) < 2:
        return None
    compared = {run for _, run, _ in found}
    generator = torch.Generator().manual_seed(seed)
    layers, count = len(found[0][2]), len(found)
    tokens = torch.randperm(len(found[0][2][0]), generator=generator)[:MOST_TOKENS]
    mixed = tokens[torch.randperm(len(tokens), generator=generator)]
    ami, chance = np.eye(count), list[float]()
    for i in range(count):
        for j in range(i):
            pairs = [(found[i][2][layer], found[j][2][layer]) for layer in range(layers)]
            same = [ami_of(a[tokens], b[tokens]) for a, b in pairs]
            ami[i, j] = ami[j, i] = np.mean(same)
            if len(chance) < 20:
                chance += [ami_of(a[tokens], b[mixed]) for a, b in pairs[:1]]
    return Similarity(
        names=[name for name, _, _ in found],
        runs=[run for _, run, _ in found],
        ami=ami,
        shuffled=float(np.mean(chance)),
        others=[run.name for run in runs if run.name not in compared and run.config.router != "dense"],
    )


def draw(found: Similarity) -> Figure:
    """The matrix."""
    size = 3.5 + 0.28 * len(found.names)
    figure = Figure(figsize=(size + 1.5, size), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(found.ami, vmin=0, vmax=1, cmap="viridis")
    places = range(len(found.names))
    axis.set_xticks(places, found.names, rotation=90, fontsize="x-small")
    axis.set_yticks(places, found.names, fontsize="x-small")
    if len(found.names) <= 12:
        for i in places:
            for j in places:
                value = found.ami[i, j]
                axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize="x-small",
                          color="black" if value > 0.6 else "white")  # fmt: skip
    figure.colorbar(image, label="adjusted mutual information", shrink=0.8)
    return figure
