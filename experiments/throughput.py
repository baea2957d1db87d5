"""How fast are mini-batches: ``python -m experiments.throughput [options]``.

    python -m experiments.throughput --json results/throughput.json

On a random graph of ogbn-arxiv's size: the sampler alone, loaders with and without a worker process, and training a
GNNMoE on their batches, next to PyG's RandomNodeLoader. The variants take turns; figures are medians over the turns.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import tyro
from torch import Tensor
from torch.nn import functional as F
from torch_geometric.data import Data
from torch_geometric.loader import RandomNodeLoader
from torch_geometric.sampler import NodeSamplerInput
from torch_geometric.utils import to_undirected

import gmoe
from experiments.benchmark.measure import told
from experiments.runs import environment, write_json
from gmoe.data.loader import neighbor_loader
from gmoe.data.sampler import NeighborSampler

UNTIMED = 3
"""Batches before the clock of a turn starts: one in hand, and the two that an idle worker has drawn in advance."""

FEATURES, CLASSES, HIDDEN, EXPERTS = 128, 40, 256, 8
"""Of ogbn-arxiv, and of the model, whose nodes take one expert each in all layers but the last."""


@dataclass(frozen=True, kw_only=True)
class ThroughputConfig:
    """The graph, the batches, and how long to measure."""

    nodes: int = 169_343
    """Nodes of the graph; the default is ogbn-arxiv's, as are those of the next two."""
    edges: int = 1_166_243
    """Directed edges, before the graph is made undirected."""
    train_nodes: int = 90_941
    """Nodes that are seeds in an epoch."""
    batch_size: int = 1024
    """Seeds in a batch."""
    fanout: tuple[int, ...] = (15, 10, 5)
    """In-edges that a node draws in each hop; the model has as many layers."""
    batches: int = 20
    """Timed batches in a turn of a loader."""
    steps: int = 2
    """Timed steps in a turn of training."""
    turns: int = 3
    """Turns of each variant."""
    threads: int = 0
    """CPU threads; 0 leaves torch's default."""
    seed: int = 0
    """Of all that is drawn."""
    json: Path | None = None
    """Where to write the figures."""


def power_law_edges(nodes: int, edges: int) -> Tensor:
    """Uniform nodes cite others by weights of a power law (exponent 2.7); then both directions of every edge."""
    cited = torch.multinomial(torch.rand(nodes).pow(-1 / 1.7), edges, replacement=True)
    return to_undirected(torch.stack([cited, torch.randint(nodes, (edges,))]), num_nodes=nodes)


def power_law_graph(config: ThroughputConfig) -> Data:
    """Random features and labels on :func:`power_law_edges`."""
    torch.manual_seed(config.seed)
    edge_index = power_law_edges(config.nodes, config.edges)
    x, y = torch.randn(config.nodes, FEATURES), torch.randint(CLASSES, (config.nodes,))
    train = torch.zeros(config.nodes, dtype=torch.bool)
    train[torch.randperm(config.nodes)[: config.train_nodes]] = True
    return Data(x=x, edge_index=edge_index, y=y, train_mask=train)


def endless(loader: Iterable[Any]) -> Iterator[Any]:
    """Epoch after epoch."""
    while True:
        yield from loader


def turn(batches: Iterator[Any], count: int, use: Callable[[Any], None]) -> tuple[float, float]:
    """Use ``count`` batches; the seconds of one, and the share of them that the next was waited for."""
    for _ in range(UNTIMED):
        batch = next(batches)
    waited = 0.0
    started = time.perf_counter()
    for _ in range(count):
        use(batch)
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
    seconds = time.perf_counter() - started
    return seconds / count, waited / seconds


def training_step(num_layers: int) -> Callable[[Data], None]:
    """A step of a GraphSAGE GNNMoE on a batch of either loader."""
    options: Any = {"num_experts": EXPERTS, "router_input": ("node", "neighbors"), "shared_expert": False}
    options["router_kwargs"] = {"weight": "straight_through", "balance": None}
    model = gmoe.GNNMoE(FEATURES, HIDDEN, CLASSES, num_layers=num_layers, conv="sage", **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def step(batch: Data) -> None:
        hops: dict[str, Any] = {}
        rows: slice | Tensor = batch.train_mask  # of a random part, all training nodes
        if "batch_size" in batch:
            rows = slice(batch.batch_size)
            hops["num_sampled_nodes_per_hop"] = batch.num_sampled_nodes
            hops["num_sampled_edges_per_hop"] = batch.num_sampled_edges
        optimizer.zero_grad()
        logits, routings = model(batch.x, batch.edge_index, **hops, return_routing=True)
        (F.cross_entropy(logits[rows], batch.y[rows]) + gmoe.aux_loss(routings)).backward()
        optimizer.step()

    return step


def throughput(config: ThroughputConfig) -> dict[str, Any]:
    """Measure, and return the figures as JSON."""
    if config.threads > 0:
        torch.set_num_threads(config.threads)
    data, fanout = power_law_graph(config), list(config.fanout)
    seeds = data.train_mask.nonzero().view(-1)
    sampler = NeighborSampler(data, fanout)

    def samples() -> Iterator[Any]:
        while True:
            for part in seeds[torch.randperm(len(seeds))].split(config.batch_size):
                yield sampler.sample_from_nodes(NodeSamplerInput(None, part))

    def loader(num_workers: int) -> Iterator[Data]:
        how: Any = {"backend": "gmoe", "shuffle": True, "num_workers": num_workers}
        return endless(neighbor_loader(data, fanout, data.train_mask, config.batch_size, **how))

    def nothing(batch: Any) -> None:
        pass

    sizes = [(batch.num_nodes, batch.num_edges) for batch, _ in zip(loader(0), range(5), strict=False)]
    batch_nodes, batch_edges = (statistics.fmean(size) for size in zip(*sizes, strict=True))
    per_epoch = math.ceil(len(seeds) / config.batch_size)
    num_parts = max(1, round(config.nodes / batch_nodes))  # a part has as many nodes as a batch
    parts = RandomNodeLoader(data, num_parts, shuffle=True)
    step = training_step(len(fanout))
    variants: dict[str, tuple[Any, int, Callable[[Any], None], int]] = {
        "sampler": (samples(), config.batches, nothing, per_epoch),
        "loader": (loader(0), config.batches, nothing, per_epoch),
        "loader, 1 worker": (loader(1), config.batches, nothing, per_epoch),
        "RandomNodeLoader": (endless(parts), config.steps, nothing, num_parts),
        "training": (loader(0), config.steps, step, per_epoch),
        "training, 1 worker": (loader(1), config.steps, step, per_epoch),
        "training, RandomNodeLoader": (endless(parts), config.steps, step, num_parts),
    }
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for i in told(range(config.turns + 1), "turn"):
        for name, (batches, count, use, _) in variants.items():
            taken = turn(batches, count if i else 1, use)
            turns[name] += [taken] if i else []  # the first is for warming up
    for batches, *_ in variants.values():
        batches.close()  # ends the workers
    return {
        "config": {name: value for name, value in asdict(config).items() if name != "json"},
        "graph": {"edges": data.num_edges, "max_degree": int(data.edge_index[1].bincount().max())},
        "batch": {"nodes": round(batch_nodes), "edges": round(batch_edges), "per_epoch": per_epoch},
        "num_parts": num_parts,
        "variants": {name: figures(turns[name], variant[3], len(seeds)) for name, variant in variants.items()},
        "environment": environment(),
    }


def figures(turns: Sequence[tuple[float, float]], per_epoch: int, num_seeds: int) -> dict[str, float]:
    """Medians over the turns; an epoch is as many batches of median time as it has."""
    seconds, waiting = zip(*turns, strict=True)
    epoch = per_epoch * statistics.median(seconds)
    return {
        "batch_seconds": statistics.median(seconds),
        "batch_seconds_min": min(seconds),
        "batch_seconds_max": max(seconds),
        "epochs_per_second": 1 / epoch,
        "seeds_per_second": num_seeds / epoch,
        "waiting": statistics.median(waiting),
    }


def table(results: dict[str, Any]) -> str:
    """The figures to read."""
    batch = results["batch"]
    found = pd.DataFrame(results["variants"]).T
    shown = pd.DataFrame(
        {
            "ms a batch": (1000 * found["batch_seconds"]).map("{:,.1f}".format),
            "s an epoch": (1 / found["epochs_per_second"]).map("{:,.1f}".format),
            "seeds a second": found["seeds_per_second"].map("{:,.0f}".format),
            "waiting (%)": (100 * found["waiting"])
            .map("{:.1f}".format)
            .where(found.index.str.startswith("training"), ""),
        }
    )
    about = f"a batch of {batch['nodes']:,} nodes and {batch['edges']:,} edges"
    parts = f"RandomNodeLoader makes {results['num_parts']} parts"
    return f"{results['graph']['edges']:,} edges; {about}; {parts}\n{shown.to_string()}"


def main(args: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = tyro.cli(ThroughputConfig, args=args, prog="python -m experiments.throughput", description=__doc__)
    results = throughput(config)
    print(table(results))
    if config.json is not None:
        write_json(config.json, results)


if __name__ == "__main__":
    main()
