"""``python -m experiments.benchmark NAME [options]``: the arms take turns; ratios are those of medians in one run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.benchmark.conv import ConvBenchmark
from experiments.benchmark.ffn import FFNBenchmark
from experiments.benchmark.options import Benchmark
from experiments.benchmark.vit import VitBenchmark
from experiments.runs import environment, write_json

BENCHMARKS: dict[str, tuple[str, Benchmark]] = {
    "conv": ("A layer of message passing, forward and backward.", ConvBenchmark()),
    "ffn": ("A layer of perceptrons, forward and backward; ours and others'.", FFNBenchmark()),
    "vit": ("A ViT whose experts run in a loop with nonzero, in a loop, padded and grouped.", VitBenchmark()),
}
"""By the name of the command line."""


def show(found: dict[str, Any]) -> Table:
    """The figures as a table."""
    table = Table(title="medians; × is the ratio to the reference arm's", title_justify="left")
    for column in ("", "wall (ms)", "min to max", "CPU (ms)", "× wall", "× CPU"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, figures in found.items():
        wall, cpu, ratio = figures["wall"], figures["cpu"], figures["ratio"]
        table.add_row(
            name,
            f"{1000 * wall['median']:,.1f}",
            f"{1000 * wall['min']:,.0f} to {1000 * wall['max']:,.0f}",
            f"{1000 * cpu['median']:,.1f}",
            f"{ratio['wall']:.3f}",
            f"{ratio['cpu']:.3f}",
        )
    return table


def main(args: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = tyro.extras.overridable_config_cli(BENCHMARKS, args=args, prog="python -m experiments.benchmark")
    if config.threads > 0:
        torch.set_num_threads(config.threads)
    try:
        found = config.run()
    except ValueError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(2)
    console = Console()
    console.width = max(console.width, 100)  # a narrow table would cut figures
    console.print(show(found))
    if config.json is not None:
        settings = {name: value for name, value in asdict(config).items() if name != "json"}
        write_json(config.json, {"config": settings, "arms": found, "environment": environment()})


if __name__ == "__main__":
    main()
