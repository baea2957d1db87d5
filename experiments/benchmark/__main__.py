"""``python -m experiments.benchmark NAME [options]``: variants take turns; ratios are those of medians in one run."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement

from experiments.benchmark.conv import ConvBenchmark
from experiments.benchmark.ffn import FFNBenchmark
from experiments.benchmark.options import Benchmark
from experiments.benchmark.order import OrderBenchmark
from experiments.benchmark.router import RouterBenchmark
from experiments.benchmark.swap import SwapBenchmark
from experiments.benchmark.train import TrainBenchmark
from experiments.benchmark.vit import VitBenchmark
from experiments.benchmark.vote import VoteBenchmark
from experiments.runs import environment, write_json
from experiments.tables import measured_on

BENCHMARKS: dict[str, tuple[str, Benchmark]] = {
    "conv": ("A layer of message passing, forward and backward.", ConvBenchmark()),
    "ffn": ("An MLP layer, forward and backward; ours and others'.", FFNBenchmark()),
    "order": ("Sum first or transform first: every order, and the one that is chosen.", OrderBenchmark()),
    "router": ("The routers' share of a layer.", RouterBenchmark()),
    "vote": ("Attention votes: naive, in blocks, over neighbors.", VoteBenchmark()),
    "train": ("Where an epoch's time goes: data, forward, backward, optimizer, rest.", TrainBenchmark()),
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
    try:
        found = config.run()
    except (ValueError, FileNotFoundError) as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(2)
    console = Console()
    table = config.table(found)
    wide = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    console.width = max(console.width, wide)  # a narrow table would cut figures
    console.print(table)
    where = environment()
    console.print(measured_on(where, config.device), highlight=False)
    if config.json is not None and not config.keeps_json:
        settings = {name: value for name, value in asdict(config).items() if name not in ("json", "data_root")}
        write_json(config.json, {"config": settings, "variants": found, "environment": where})


if __name__ == "__main__":
    main()
