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

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from torch_geometric.data import Data
from torch_geometric.loader import RandomNodeLoader
from torch_geometric.sampler import NodeSamplerInput
from torch_geometric.utils import to_undirected

import gmoe
from experiments.runs import environment, write_json
from gmoe.data.loader import neighbor_loader
from gmoe.data.sampler import NeighborSampler

UNTIMED = 3
"""Batches before the clock of a turn starts: one in hand, and the two that an idle worker has drawn in advance."""


@dataclass(frozen=True, kw_only=True)
class ThroughputConfig:
    """The graph, the batches, the model, and how long to measure."""

    nodes: int = 169_343
    """Nodes of the graph; the default is ogbn-arxiv's, as are those of the next four."""
    edges: int = 1_166_243
    """Directed edges, before the graph is made undirected."""
    features: int = 128
    """Features of a node."""
    classes: int = 40
    """Classes."""
    train_nodes: int = 90_941
    """Nodes that are seeds in an epoch."""
    batch_size: int = 1024
    """Seeds in a batch."""
    fanout: tuple[int, ...] = (15, 10, 5)
    """In-edges that a node draws in each hop; the model has as many layers."""
    hidden: int = 256
    """Width of the model."""
    experts: int = 8
    """Experts in each layer but the last, of which a node takes one."""
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


@dataclass(frozen=True)
class Turn:
    """What a turn of a variant took."""

    seconds: float
    """In all."""
    waited: float
    """For the next batch."""
    batches: int
    """That were timed."""


def power_law_edges(nodes: int, edges: int, generator: torch.Generator) -> Tensor:
    """Uniform nodes cite others by weights of a power law (exponent 2.7); then both directions of every edge."""
    weight = torch.rand(nodes, generator=generator).pow(-1 / 1.7)
    cited = torch.multinomial(weight, edges, replacement=True, generator=generator)
    citing = torch.randint(nodes, (edges,), generator=generator)
    return to_undirected(torch.stack([cited, citing]), num_nodes=nodes)


def power_law_graph(config: ThroughputConfig) -> Data:
    """Random features and labels on :func:`power_law_edges`."""
    generator = torch.Generator().manual_seed(config.seed)
    edge_index = power_law_edges(config.nodes, config.edges, generator)
    data = Data(
        x=torch.randn(config.nodes, config.features, generator=generator),
        edge_index=edge_index,
        y=torch.randint(config.classes, (config.nodes,), generator=generator),
    )
    data.train_mask = torch.zeros(config.nodes, dtype=torch.bool)
    data.train_mask[torch.randperm(config.nodes, generator=generator)[: config.train_nodes]] = True
    return data


def endless(loader: Iterable[Any]) -> Iterator[Any]:
    """Epoch after epoch."""
    while True:
        yield from loader


def turn(batches: Iterator[Any], count: int, use: Callable[[Any], None]) -> Turn:
    """Use ``count`` batches, and time it."""
    for _ in range(UNTIMED):
        batch = next(batches)
    waited = 0.0
    started = time.perf_counter()
    for _ in range(count):
        use(batch)
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
    return Turn(time.perf_counter() - started, waited, count)


def training_step(config: ThroughputConfig) -> Callable[[Data], None]:
    """A step of a GraphSAGE GNNMoE on a batch of either loader."""
    torch.manual_seed(config.seed)
    model = gmoe.GNNMoE(
        config.features,
        config.hidden,
        config.classes,
        num_layers=len(config.fanout),
        conv="sage",
        num_experts=config.experts,
        router_input=("node", "neighbors"),
        shared_expert=False,
        router_kwargs={"weight": "straight_through", "balance": None},
    )
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
    data = power_law_graph(config)
    torch.manual_seed(config.seed)
    fanout = list(config.fanout)
    seeds = data.train_mask.nonzero().view(-1)
    sampler = NeighborSampler(data, fanout)

    def loader(num_workers: int) -> Iterator[Data]:
        return endless(
            neighbor_loader(
                data,
                fanout,
                data.train_mask,
                config.batch_size,
                backend="gmoe",
                shuffle=True,
                num_workers=num_workers,
            )
        )

    def samples() -> Iterator[Any]:
        while True:
            for part in seeds[torch.randperm(len(seeds))].split(config.batch_size):
                yield sampler.sample_from_nodes(NodeSamplerInput(None, part))

    sizes = [(batch.num_nodes, batch.num_edges) for batch, _ in zip(loader(0), range(5), strict=False)]
    batch_nodes, batch_edges = (statistics.fmean(size) for size in zip(*sizes, strict=True))
    num_parts = max(1, round(config.nodes / batch_nodes))  # a part has as many nodes as a batch

    def parts() -> Iterator[Data]:
        return endless(RandomNodeLoader(data, num_parts, shuffle=True))

    def nothing(batch: Any) -> None:
        pass

    per_epoch, step = math.ceil(len(seeds) / config.batch_size), training_step(config)
    variants: dict[str, tuple[Iterator[Any], Callable[[Any], None], int, int]] = {
        "sampler": (samples(), nothing, config.batches, per_epoch),
        "loader": (loader(0), nothing, config.batches, per_epoch),
        "loader, 1 worker": (loader(1), nothing, config.batches, per_epoch),
        "RandomNodeLoader": (parts(), nothing, config.steps, num_parts),
        "training": (loader(0), step, config.steps, per_epoch),
        "training, 1 worker": (loader(1), step, config.steps, per_epoch),
        "training, RandomNodeLoader": (parts(), step, config.steps, num_parts),
    }
    turns: dict[str, list[Turn]] = {name: [] for name in variants}
    for i in range(config.turns + 1):
        for name, (batches, use, count, _) in variants.items():
            taken = turn(batches, count if i else 1, use)
            turns[name] += [taken] if i else []  # the first is for warming up
    for batches, *_ in variants.values():
        batches.close()  # type: ignore[attr-defined]  # ends the workers
    return {
        "config": {name: value for name, value in asdict(config).items() if name != "json"},
        "graph": {"edges": data.num_edges, "max_degree": int(data.edge_index[1].bincount().max())},
        "batch": {"nodes": round(batch_nodes), "edges": round(batch_edges), "per_epoch": per_epoch},
        "num_parts": num_parts,
        "variants": {name: figures(turns[name], variant[3], len(seeds)) for name, variant in variants.items()},
        "environment": environment(),
    }


def figures(turns: list[Turn], per_epoch: int, num_seeds: int) -> dict[str, float]:
    """Medians over the turns; an epoch is as many batches of median time as it has."""
    seconds = [turn.seconds / turn.batches for turn in turns]
    epoch = per_epoch * statistics.median(seconds)
    return {
        "batch_seconds": statistics.median(seconds),
        "batch_seconds_min": min(seconds),
        "batch_seconds_max": max(seconds),
        "epochs_per_second": 1 / epoch,
        "seeds_per_second": num_seeds / epoch,
        "waiting": statistics.median([turn.waited / turn.seconds for turn in turns]),
    }


def show(results: dict[str, Any]) -> Table:
    """The figures as a table."""
    batch = results["batch"]
    table = Table(
        title=f"{results['graph']['edges']:,} edges; a batch of {batch['nodes']:,} nodes and {batch['edges']:,} edges; "
        f"RandomNodeLoader makes {results['num_parts']} parts"
    )
    for column in ("", "ms a batch", "s an epoch", "seeds a second", "waiting (%)"):
        table.add_column(column, justify="right" if column else "left")
    for name, variant in results["variants"].items():
        table.add_row(
            name,
            f"{1000 * variant['batch_seconds']:,.1f}",
            f"{1 / variant['epochs_per_second']:,.1f}",
            f"{variant['seeds_per_second']:,.0f}",
            f"{100 * variant['waiting']:.1f}" if name.startswith("training") else "",
        )
    return table


def main(args: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = tyro.cli(ThroughputConfig, args=args, prog="python -m experiments.throughput", description=__doc__)
    results = throughput(config)
    Console().print(show(results))
    if config.json is not None:
        write_json(config.json, results)


if __name__ == "__main__":
    main()
