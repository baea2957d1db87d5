"""Train a preset: ``python -m experiments.train PRESET [options]``.

    python -m experiments.train digits-graph --router expert_choice --experts 8 --k 1 --seeds 0 1 2
    python -m experiments.train graph --data-root FILE.npz
    python -m experiments.train --config runs/digits-graph-expert_choice/config.json --seeds 3

Writes a run folder (config.json, seed-N/metrics.csv, seed-N/checkpoint/, routing/, summary.json), prints the summary.
Ctrl-C keeps what was trained, and says how to continue.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import closing, nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.table import Table

from experiments import options
from experiments.config import RunConfig, restore
from experiments.files import read_json
from experiments.presets import PRESETS
from experiments.progress import show_progress_of

if TYPE_CHECKING:
    from types import FrameType

    from experiments.run_folder import Summary

PROG = "python -m experiments.train"


def parse(args: Sequence[str] | None = None) -> RunConfig:
    """The configuration from the command line: a preset, a file, and what is changed of them."""
    args = list(sys.argv[1:] if args is None else args)
    file, args = _take(args, "--config")
    if file is None:
        about = __doc__.partition("\n\n    ")[0] + "\n\n--config FILE begins with the options of a JSON file."
        return options.choose(PRESETS, args, PROG, "preset", about)
    preset = args.pop(0) if args and args[0] in PRESETS else None
    base = read_config_file(Path(file), preset)
    return options.parse(type(base), args, f"{PROG} --config {file}", default=base)


def _take(args: list[str], option: str) -> tuple[str | None, list[str]]:
    """The value of an option, and the arguments without it."""
    for place, arg in enumerate(args):
        if arg == option and place + 1 < len(args):
            return args[place + 1], args[:place] + args[place + 2 :]
        if arg.startswith(f"{option}="):
            return arg.partition("=")[2], args[:place] + args[place + 1 :]
    return None, args


def read_config_file(path: Path, preset: str | None) -> RunConfig:
    """What a JSON file says, on top of a preset where there is one; a run's own ``config.json`` is such a file."""
    base = None if preset is None else PRESETS[preset][1]
    try:
        given = read_json(path, dict[str, Any])
        if base is None:
            return restore(given, Path("data"))
        if given.get("dataset", base.dataset) != base.dataset:
            raise ValueError(f"dataset: got {given['dataset']!r}, expected {base.dataset}, as {preset}")
        return restore(base.science() | given, base.data_root)
    except ValueError as error:
        raise ValueError(f"config: {error}" if str(path) in str(error) else f"config: {path}: {error}") from error


def show(config: RunConfig, summary: Summary, console: Console) -> None:
    """Print a summary as a table."""
    table = Table(title=config.folder().name)
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


def resume_command(config: RunConfig, args: Sequence[str]) -> str:
    """What continues the run that ``args`` began."""
    _, rest = _take([arg for arg in args if arg != "--resume"], "--out")
    return f"{config.launcher} -m experiments.train {shlex.join([*rest, '--out', str(config.folder()), '--resume'])}"


def main(args: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = list(sys.argv[1:] if args is None else args)
    rank = int(os.environ.get("RANK", "0"))
    try:
        config = parse(args)
        from experiments.checkpoint import InterruptedRunError, from_first, lost_another, make_fabric  # and so torch,
        from experiments.loop import run  # which --help does without
        from experiments.run_folder import place
    except (ValueError, OSError) as error:
        if rank:  # the first one says it
            sys.exit(2)
        options.fail(error)

    def stop(number: int, _: FrameType | None) -> None:
        raise InterruptedRunError(number)

    def stopped(why: str, status: int) -> NoReturn:
        if not rank:
            kept = (config.folder() / "config.json").exists()
            then = f"continue with: {resume_command(config, args)}" if kept else "nothing was trained yet"
            print(f"{why}; {then}", file=sys.stderr)
        sys.exit(status)

    if not rank:
        show_progress_of("gmoe")
    before = signal.signal(signal.SIGTERM, stop)
    try:
        fabric = make_fabric(config)
        config = replace(config, out=from_first(fabric, lambda: place(config)))
        if config.jobs > 1:
            from experiments.jobs import train_apart

            with closing(train_apart([config])) as ready:
                for _, why in ready:
                    if why:
                        stopped(why, 1)
        with nullcontext() if not rank else redirect_stdout(None):
            summary = run(config)
    except (ValueError, OSError) as error:
        options.fail(error, f" (process {rank})" if rank else "")
    except KeyboardInterrupt as wish:
        stopped("stopped", 128 + getattr(wish, "number", signal.SIGINT))
    except RuntimeError as error:
        if not lost_another(error):
            raise
        stopped("stopped, since another process has ended", 1)
    finally:
        signal.signal(signal.SIGTERM, before)
    if not rank:
        show(config, summary, Console())


if __name__ == "__main__":
    main()
