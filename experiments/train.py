"""Train a preset: ``python -m experiments.train PRESET [options]``.

    python -m experiments.train digits-graph --router expert_choice --experts 8 --k 1 --seeds 0 1 2

Writes a run folder (config.json, seed-N/metrics.csv, seed-N/checkpoint/, routing/, summary.json), prints the summary.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.config import TrainConfig
from experiments.presets import PRESETS
from experiments.runs import run


def parse(args: Sequence[str] | None = None) -> TrainConfig:
    """The configuration from the command line: a preset, and what is changed of it."""
    return tyro.extras.overridable_config_cli(PRESETS, args=args, prog="python -m experiments.train")


def show(config: TrainConfig, summary: dict[str, Any], console: Console) -> None:
    """Print a summary as a table."""
    table = Table(title=f"{config.dataset}, {config.router}")
    for column in ("", "mean", "std", "n"):
        table.add_column(column, justify="left" if not column else "right")
    for name in ("val", "test"):
        figures = summary[name]
        std = "–" if figures["std"] is None else f"{100 * figures['std']:.2f}"
        table.add_row(f"{name} {summary['metric']} (%)", f"{100 * figures['mean']:.2f}", std, str(figures["n"]))
    console.print(table)
    if summary["routing"]:
        routing = Table(title="routing, by MoE layer", title_justify="left")
        routing.add_column("", no_wrap=True)
        for layer in range(len(summary["routing"])):
            routing.add_column(str(layer + 1), justify="right", no_wrap=True)
        for name in summary["routing"][0]:
            routing.add_row(name.replace("_", " "), *(f"{figures[name]['mean']:.3f}" for figures in summary["routing"]))
        console.width = max(console.width, 24 + 10 * len(summary["routing"]))  # a narrow table would cut figures
        console.print(routing)
    console.print(
        f"{summary['active_parameters']:,} of {summary['parameters']:,} parameters and {summary['flops']:,} FLOPs "
        f"active in a forward pass; {summary['seconds']['mean']:.1f} s a seed, {summary['peak_memory']:,} MiB at most; "
        f"written to {config.folder()}"
    )


def main(args: Sequence[str] | None = None) -> None:
    """Entry point."""
    console = Console()
    try:
        config = parse(args)
        summary = run(config)
    except (ValueError, OSError) as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(2)
    show(config, summary, console)


if __name__ == "__main__":
    main()
