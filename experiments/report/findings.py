"""What a routing follows, and whether two runs find the same experts. Shapes: T tokens, E experts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.utils import homophily, remove_self_loops

from experiments.routing_stats import ami
from experiments.run_folder import RunFolder
from gmoe import Routing

MOST_TOKENS = 50_000
"""Of more tokens a random part is compared."""

FOLLOWED = 0.1
"""An expert assignment follows what it has at least so much mutual information with."""

PROPERTIES = {
    "nmi": ("planted region", "NMI"),
    "ami_label": ("class", "AMI"),
    "ami_place": ("place in the image", "AMI"),
    "ami_degree": ("degree", "AMI"),
    "ami_homophily": ("local homophily", "AMI"),
}
"""What experts may follow, by the figure that measures it."""


def sentence(experts: int, dead: Sequence[float], layers: Sequence[Mapping[str, float]]) -> str:
    """Say how many experts are used and what they follow most.

    Args:
        experts: E.
        dead: how many experts no token went to, of every MoE layer and seed.
        layers: by MoE layer, the figures in :data:`PROPERTIES` that are known.
    """
    used = dict.fromkeys((experts - max(dead), experts - min(dead)))
    text = f"{'–'.join(map(str, used))} of {experts} experts used" + (" (by layer and seed)" if len(used) > 1 else "")
    found = [(layer[key], i, key) for i, layer in enumerate(layers, start=1) for key in PROPERTIES if key in layer]
    if not found:
        return f"{text}."
    value, number, key = max(found)
    name, measure = PROPERTIES[key]
    if value >= FOLLOWED:
        where = f" in MoE layer {number}" if len(layers) > 1 else ""
        return f"{text}; experts follow the {name}, {measure} {value:.2f}{where}."
    names = [name for key, (name, _) in PROPERTIES.items() if any(key == other for *_, other in found)]
    return f"{text}; experts do not follow the {' or the '.join(names)}, {measure} at most {value:.2f}."


def similarity(runs: Sequence[RunFolder], seed: int = 0) -> tuple[dict[tuple[str, str], float], float] | None:
    """Adjusted mutual information of the experts of two runs, mean over their seeds and MoE layers.

    Args:
        runs: of one data set; those are compared that route as many tokens in as many layers as most do.
        seed: of the tokens compared, and of the shuffled baseline.

    Returns:
        By a pair of names (of one run its own seeds are compared), and the mean where one of each pair is shuffled;
        ``None`` of fewer than two seeds.
    """
    groups: dict[tuple[int, ...], list[tuple[str, list[Tensor]]]] = {}
    for run in runs:
        for log in run.seeds.values():
            experts = [routing.top_expert for routing in log.routings]
            if experts:
                groups.setdefault(tuple(map(len, experts)), []).append((run.name, experts))
    compared = max(groups.values(), key=len, default=[])
    if len(compared) < 2:
        return None
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randperm(len(compared[0][1][0]), generator=generator)[:MOST_TOKENS]
    mixed = tokens[torch.randperm(len(tokens), generator=generator)]
    found: dict[tuple[str, str], list[float]] = {}
    shuffled = list[float]()
    for (one, first), (other, second) in combinations(compared, 2):
        pairs = list(zip(first, second, strict=True))
        found.setdefault((one, other), []).append(statistics.fmean(ami(a[tokens], b[tokens]) for a, b in pairs))
        shuffled.append(ami(first[0][tokens], second[0][mixed]))
    return {pair: statistics.fmean(values) for pair, values in found.items()}, statistics.fmean(shuffled[:20])


def edges_within(graph: Data, routing: Routing) -> tuple[float, float]:
    """The share of edges, self-loops aside, whose ends have the same expert; and that of two nodes drawn at random.

    Nodes without an expert count as one more.
    """
    expert = routing.top_expert
    count = expert.bincount().double()
    chance = (count * (count - 1)).sum() / (len(expert) * (len(expert) - 1))
    return float(homophily(remove_self_loops(graph.edge_index)[0], expert, method="edge")), float(chance)
