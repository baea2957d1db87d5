"""What routing follows. Shapes: N nodes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sklearn.metrics import adjusted_mutual_info_score
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.utils import degree, remove_self_loops, scatter
from torchmetrics.functional.clustering import normalized_mutual_info_score

from experiments.train.config import RunConfig
from experiments.train.data.task import Task
from gmoe import Routing, RoutingStats
from gmoe.metrics import COLLAPSED, PER_EXPERT

BINS = 8
"""At most so many degrees, and shares of homophily, are told apart."""


# What :func:`in_words` calls balanced, mentions as missed, calls loosely followed and followed
BALANCED = 2.0
MISSED = 0.01
LOOSELY = 0.1
FOLLOWED = 0.3

IN_WORDS = (
    "An expert is used if it gets a token. Experts are balanced if all are used and none takes "
    f"more than {BALANCED:g} times an even share of the (token, expert) pairs. Tokens without an "
    f"expert are mentioned from {MISSED:.0%} on. Experts follow a property from a mutual "
    f"information of {FOLLOWED} on, and loosely from {LOOSELY} on."
)
"""The words of :func:`in_words`, as the report explains them."""

PROPERTIES = {
    "nmi": ("planted region", "NMI"),
    "ami_label": ("class", "AMI"),
    "ami_place": ("place in the image", "AMI"),
    "ami_degree": ("degree", "AMI"),
    "ami_homophily": ("local homophily", "AMI"),
}
"""What experts may follow, by the figure that measures it."""


def routing_summary(routings: list[list[Routing]], task: Task) -> list[dict[str, Any]]:
    """For each MoE layer, over all batches: what :class:`gmoe.RoutingStats` counts, and what the
    routing follows.

    Where all nodes are routed at once, also ``"nmi"`` with planted experts, and ``"ami_NAME"``
    of :func:`alignment`.
    """
    if not routings or not routings[0]:
        return []
    experts = [routing.num_experts for routing in routings[0]]
    # One process has them all
    stats = RoutingStats(num_experts=experts, sync_on_compute=False).to(routings[0][0].token.device)
    for batch in routings:
        stats.update(batch)
    layers = _rounded(stats)
    graph = task.graph
    sizes = {routing.num_tokens for batch in routings for routing in batch}
    if not isinstance(graph, Data) or len(routings) > 1 or sizes != {graph.num_nodes}:
        return layers
    properties = node_properties(graph)
    for routing, layer in zip(routings[0], layers, strict=True):
        expert = routing.top_expert.cpu()
        if task.planted is not None:
            layer["nmi"] = float(normalized_mutual_info_score(expert, task.planted))
        for name, value in alignment(expert, properties).items():
            layer[f"ami_{name}"] = round(value, 4)
    return layers


def routing_rows(stats: RoutingStats | None) -> list[dict[str, Any]]:
    """A row a layer for routing.csv: ``load_0``, ... of its experts, ..."""
    rows: list[dict[str, Any]] = []
    for number, layer in enumerate([] if stats is None else _rounded(stats)):
        rows.append({"layer": number})
        for name, value in layer.items():
            if name in PER_EXPERT:
                rows[-1] |= {f"{name}_{expert}": figure for expert, figure in enumerate(value)}
            else:
                rows[-1][name] = value
    return rows


def _rounded(stats: RoutingStats) -> list[dict[str, Any]]:
    """By layer and name: a number, or a list of one an expert."""
    return [
        {
            name: [round(one, 4) for one in value.view(-1).tolist()]
            if name in PER_EXPERT
            else round(value.item(), 4)
            for name, value in layer.items()
        }
        for layer in stats.compute()
    ]


def node_properties(data: Data) -> dict[str, Tensor]:
    """(N,) integers a property: in-``degree``, and of one label a node ``homophily`` and ``label``.

    Homophily is the share of in-neighbors of the same label. Degree and homophily are binned by
    quantiles, nodes without neighbors apart. What is not known is -1.
    """
    source, destination = remove_self_loops(data.edge_index)[0]
    properties = {"degree": quantile_bins(degree(destination, data.num_nodes))}
    if data.y is None or data.y.dim() > 1:
        return properties
    is_known = data.y >= 0
    labeled = is_known[source] & is_known[destination]
    source = source[labeled]
    destination = destination[labeled]
    same = (data.y[source] == data.y[destination]).float()
    share = scatter(same, destination, dim_size=data.num_nodes, reduce="mean")
    share = share.where(degree(destination, data.num_nodes) > 0, -1.0)
    properties["homophily"] = quantile_bins(share).where(is_known, -1)
    properties["label"] = data.y.clamp(min=-1)
    return properties


def quantile_bins(values: Tensor, bins: int = BINS) -> Tensor:
    """(N,) the bin of each value, equal values together: each value its own where there are few;
    else the bins hold about as many values each, as far as equal ones allow."""
    distinct, which, counts = values.unique(return_inverse=True, return_counts=True)
    if len(distinct) <= bins:
        return which
    middle = counts.cumsum(0) - (counts + 1) / 2  # the mean rank of each distinct value
    # No bin is empty
    return (middle / len(values) * bins).long().unique(return_inverse=True)[1][which]


def alignment(assignment: Tensor, properties: dict[str, Tensor]) -> dict[str, float]:
    """Adjusted mutual information (Vinh et al., 2010) of (N,) experts with each property: 1 the
    same, 0 by chance.

    ``"shuffled"`` is a baseline: the largest, in size, of the assignment in random order.
    """
    generator = torch.Generator().manual_seed(0)
    shuffled = assignment[torch.randperm(len(assignment), generator=generator)]
    followed = {name: ami(assignment, value) for name, value in properties.items()}
    return followed | {
        "shuffled": max((ami(shuffled, value) for value in properties.values()), key=abs)
    }


def ami(assignment: Tensor, value: Tensor) -> float:
    """Adjusted mutual information of two partitions, nodes below 0 in ``value`` left out.

    0 where one is constant.
    """
    known = value >= 0
    assignment = assignment[known]
    value = value[known]
    if len(assignment.unique()) < 2 or len(value.unique()) < 2:
        return 0.0
    return float(adjusted_mutual_info_score(assignment.numpy(), value.numpy()))


def values_of(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Sequence[float]]]:
    """By MoE layer of a summary, the values of each figure over the seeds."""
    return [{name: figure["values"] for name, figure in layer.items()} for layer in layers]


def in_words(layers: Sequence[Mapping[str, Sequence[float]]], config: RunConfig) -> str:
    """Say how many experts are used, whether evenly, and what they follow most.

    ``layers`` holds the figures of each MoE layer over the seeds.
    """
    total = most(layers, "experts")
    used = [int(total - dead) for layer in layers for dead in layer["dead"]]
    peak = most(layers, "max_over_mean_load")
    text = f"{'–'.join(map(str, dict.fromkeys([min(used), max(used)])))} of {total:g} experts used"
    text += " (by layer and seed)" if len(set(used)) > 1 else ""
    is_balanced = min(used) == total and peak <= BALANCED
    share = f"the busiest takes {peak:.1f} times an even share"
    text += f", {'balanced' if is_balanced else 'not balanced'} ({share})"
    missed = 1 - min(statistics.fmean(layer["coverage"]) for layer in layers)
    if missed >= MISSED:
        text += f"; up to {missed:.0%} of the tokens have no expert"
    if (file := getattr(config, "routing", None)) is not None:
        return f"{text}; they follow {file}"
    means = {
        (statistics.fmean(layer[key]), number, key)
        for number, layer in enumerate(layers, start=1)
        for key in PROPERTIES
        if key in layer
    }
    if not means:
        return text
    value, number, key = max(means)
    name, measure = PROPERTIES[key]
    where = f" in MoE layer {number}" if len(layers) > 1 else ""
    if value >= LOOSELY:
        how = "follow" if value >= FOLLOWED else "loosely follow"
        return f"{text}; they {how} the {name} ({measure} {value:.2f}{where})"
    known = {key for _, _, key in means}
    *names, last = [name for key, (name, _) in PROPERTIES.items() if key in known]
    others = f"{', '.join(names)} or " if names else ""
    return f"{text}; they do not follow {others}{last} ({measure} at most {value:.2f})"


def most(layers: Sequence[Mapping[str, Sequence[float]]], name: str) -> float:
    """The largest value of a figure, over layers and seeds."""
    return max(value for layer in layers for value in layer[name])


def advice(layers: Sequence[Mapping[str, Sequence[float]]], config: RunConfig) -> str:
    """What to do where few experts have nearly all tokens, in one sentence; else nothing.

    Few are a quarter of them, or K if that is more; ``layers`` are those of :func:`in_words`.
    """
    total = int(most(layers, "experts"))
    used = total - int(most(layers, "dead"))
    if most(layers, "max_over_mean_load") >= COLLAPSED * total:  # the others get a few tokens
        used = 1
    if total == 1 or used >= total or used > max(total // 4, config.k):
        return ""
    takes = "takes" if used == 1 else "take"
    found = f"{used} of {total} experts {takes} nearly all tokens, as a dense layer does: "
    ways = []
    if config.router == "token_choice" and config.options.balance != "bias":
        ways.append("--balance bias")
    ways.append("--router expert_choice")
    is_own = config.model is not None and not config.model.startswith("timm/")
    if is_own:
        ways = ["a balance in your model's router"]
    more = " or ".join(ways)
    return (
        f"{found}train with {more} to use the others, and if that gains nothing, take --router "
        "dense."
    )
