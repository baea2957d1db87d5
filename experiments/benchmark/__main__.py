"""``python -m experiments.benchmark NAME [options]``: variants take turns; ratios are those of medians in one run."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence

import pandas as pd
import torch
import tyro
from rich.console import Console
from rich.markup import escape

from experiments.benchmark.conv import ConvBenchmark
from experiments.benchmark.ffn import FFNBenchmark
from experiments.benchmark.measure import Benchmark
from experiments.benchmark.order import OrderBenchmark
from experiments.benchmark.processes import ProcessesBenchmark
from experiments.benchmark.routers import RouterBenchmark, VoteBenchmark
from experiments.benchmark.stored import StoredBenchmark
from experiments.benchmark.swap import SwapBenchmark
from experiments.benchmark.train import TrainBenchmark
from experiments.benchmark.vit import VitBenchmark
from experiments.benchmark.wide import WideBenchmark
from experiments.runs import environment
from experiments.tables import benchmark_lines, measured_on

BENCHMARKS: dict[str, tuple[str, Benchmark]] = {
    "conv": ("A layer of message passing, forward and backward.", ConvBenchmark()),
    "ffn": ("An MLP layer, forward and backward; ours and others'.", FFNBenchmark()),
    "order": ("Sum first or transform first: every order, and the one that is chosen.", OrderBenchmark()),
    "wide": ("Wide inputs: MoEConv against each order as a few lines of bare torch.", WideBenchmark()),
    "router": ("The routers' share of a layer.", RouterBenchmark()),
    "vote": ("Attention votes: naive, in blocks, over neighbors.", VoteBenchmark()),
    "train": ("Where an epoch's time goes: data, forward, backward, optimizer, rest.", TrainBenchmark()),
    "processes": ("Data parallel training beside processes that train alone.", ProcessesBenchmark()),
    "stored": ("Neighbor sampling from disk beside memory.", StoredBenchmark()),
    "swap": ("Dense layers against gmoe's defaults in their place: accuracy and time of a step.", SwapBenchmark()),
    "vit": ("A ViT whose experts run in a loop with nonzero, in a loop, padded and grouped.", VitBenchmark()),
}
"""By the name of the command line."""


def main(args: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = tyro.extras.overridable_config_cli(BENCHMARKS, args=args, prog="python -m experiments.benchmark")
    if config.threads > 0:
        torch.set_num_threads(config.threads)
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
    warnings.filterwarnings("ignore", "Sparse invariant checks are implicitly disabled")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("gmoe").setLevel(logging.INFO)  # long k-means tell how far they are
    try:
        found = config.run()
    except (ValueError, FileNotFoundError) as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(2)
    print(pd.DataFrame(benchmark_lines(found)).to_string(index=False))
    print(measured_on(environment(), config.device))


if __name__ == "__main__":
    main()
