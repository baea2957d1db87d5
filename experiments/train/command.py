"""Train a preset: ``python -m experiments.train PRESET [options]``.

    python -m experiments.train digits-graph --router expert_choice --experts 8 --k 1 --seeds 0 1 2
    python -m experiments.train graph --data-root FILE.npz
    python -m experiments.train --config runs/digits-graph-expert_choice/config.json --seeds 3

Writes a run folder (config.json, seed-N/metrics.csv, seed-N/checkpoint/, summary.json), prints
the summary. Ctrl-C keeps what was trained, and says how to continue.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from experiments.train.checks import check, check_first
from experiments.train.command_line import fail
from experiments.train.config import (
    ERRORS,
    OF_MODEL,
    OF_VIT,
    RunConfig,
    dense_of,
)
from experiments.train.presets import OWN_GRAPH, PRESETS
from experiments.train.saved import read_options
from experiments.train.scores import paired, scored, unit
from experiments.train.signals import interrupt
from experiments.train.user_code import check_trusted, code_of

if TYPE_CHECKING:
    from experiments.train.results import Summary

PROG = "python -m experiments.train"
FILES = """

--config FILE begins with the options of a JSON file, such as the config.json of a run.
Code that the file names is imported with --trust only; options of the command line are trusted."""
COMPARE = """

--compare trains the dense model of the same seeds too, in the folder RUN-dense, and prints the
paired difference on the test set with its 95 % interval."""


def parse(args: Sequence[str]) -> RunConfig:
    """The configuration from the command line: a preset, a file, and what is changed of them."""
    file, args = _take(args, "--config")
    trusted, args = _take(args, "--trust", action="store_true")
    check(file is not None or not trusted, "trust", True, "it with --config FILE only")
    preset = args.pop(0) if args and args[0] in PRESETS else None
    if file is None and preset is None:
        if args and {"-h", "--help"}.isdisjoint(args):
            check_first("preset", args, PRESETS)
        about = __doc__.partition("\n\n    ")[0] + FILES + COMPARE
        return tyro.extras.overridable_config_cli(PRESETS, args=args, prog=PROG, description=about)
    base = None if preset is None else PRESETS[preset][1]
    if file is not None:
        base = read_options(Path(file), Path("data") if base is None else base.data_root, base)
    assert base is not None
    if _take(args, "--routing")[0] is not None:
        base = replace(base, router="oracle")
    about = f"The preset {preset}: {PRESETS[preset][0]}" if preset else f"The options of {file}."
    about += COMPARE
    about += OWN_GRAPH if base.dataset == "graph" else ""
    # what was given before the options, so that an error leads to the help that explains them
    prog = PROG if preset is None else f"{PROG} {preset}"
    prog += "" if file is None else f" --config {shlex.quote(file)}"
    config: Any = tyro.cli(type(base), args=args, prog=prog, description=about, default=base)
    named = {arg.partition("=")[0].replace("_", "-") for arg in args}
    if file is not None and not trusted:
        # Not values, of which one may be called as an option is
        given = {arg[2:].replace("-", "_") for arg in named if arg.startswith("--")}
        check_trusted(config, Path(file), given)
    if config.equal is None and "--equal-to" in named:  # a value may be the default: args tell
        got = f"{config.equal_to!r} with router={config.router!r} and no --equal"
        legal = "--router dense --equal flops (or parameters) with it"
        raise ValueError(f"equal_to: got {got}, expected {legal}")
    if getattr(config, "ffn", None) is not None and "--residual" not in named and file is None:
        config = replace(config, residual="identity")  # blocks have no other, whatever the preset
    if config.model is not None:
        options = {
            arg: arg.removeprefix("--").removeprefix("no-").replace("-", "_") for arg in named
        }
        others = OF_VIT if config.own_models() else OF_MODEL
        passed = sorted(arg for arg, option in options.items() if option in others)
        got = f"{config.model} and {', '.join(passed)}"
        check(not passed, "model", got, "none of these options beside a model of your own")
    return config


def _take(args: Sequence[str], *names: str, **kind: Any) -> tuple[Any, list[str]]:
    """The value of an option, and the arguments without it."""
    parser = ArgumentParser(prog=PROG, add_help=False, allow_abbrev=False)
    parser.add_argument(*names, dest="value", **kind)
    known, rest = parser.parse_known_args(args)
    return known.value, rest


def dense_beside(config: RunConfig) -> RunConfig:
    """The run of the dense model beside one with experts, for ``--compare``."""
    is_ours = config.router != "dense" and (config.model is None or config.own_models())
    got = f"router={config.router!r} and model={config.model!r}"
    check(is_ours, "compare", got, "a router, and no model of your own")
    folder = config.folder()
    return replace(dense_of(config), out=folder.with_name(f"{folder.name}-dense"))


def show(config: RunConfig, summary: Summary, dense: Summary | None) -> None:
    """Print scores, the routing in words and in figures, and costs.

    ``dense`` is the summary of the dense model, if it was trained for comparison.
    """
    import pandas as pd

    from experiments.train.results import flops_of
    from experiments.train.routing_stats import advice, in_words, values_of

    metric = summary["metric"]
    name = f"{metric}{unit(metric)}"
    figures = {f"{split} {name}": summary[split] for split in ("val", "test")}
    if "top5" in summary:
        figures["test top-5 (%)"] = summary["top5"]
    scores = pd.DataFrame(figures).T
    factor, form = (1, "{:.4f}") if metric in ERRORS else (100, "{:.2f}")
    scores[["mean", "std"]] = factor * scores[["mean", "std"]].astype(float)
    print(scores[["mean", "std", "n"]].to_string(float_format=form.format, na_rep="–"))
    if dense is not None:
        score = f"dense model: test {name} {scored(metric, dense['test'])}"
        ratio = f"{summary['flops'] / dense['flops']:.2f} times its active FLOPs"
        difference = paired(metric, summary["test"]["values"], dense["test"]["values"])
        print(f"\n{score}\nexperts − dense: {difference}, at {ratio}")
    elif config.router != "dense" and (config.model is None or config.own_models()):
        print("\ndense model, to compare: the same command with --compare")
    if summary["routing"]:
        layers = values_of(summary["routing"])
        print(f"\nrouting: {in_words(layers, config)}")
        if line := advice(layers, config):
            print(line)
        words = [str(config.folder())]
        if dense is not None:
            words.append(str(dense_beside(config).folder()))
        if code_of(config):
            words.append("--trust")
        print(f"what experts follow: python -m experiments.report {shlex.join(words)}")
        print("\nrouting, by MoE layer")
        means = [
            {name: figure["mean"] for name, figure in layer.items()} for layer in summary["routing"]
        ]
        print(
            pd.DataFrame(means, index=range(1, len(means) + 1)).T.to_string(
                float_format="{:.3f}".format
            )
        )
    flops, each = flops_of(summary)
    speed = ""
    if "images_per_second" in summary:
        speed = f", {summary['images_per_second']['mean']:,.0f} images a second in training"
    print(
        f"\n{summary['active_parameters']:,} of {summary['parameters']:,} parameters and "
        f"{flops:,.0f} FLOPs active {each}; {summary['seconds']['mean']:.1f} s "
        f"a seed{speed}; written to {config.folder()}"
    )


def resume_command(config: RunConfig, args: Sequence[str]) -> str:
    """What continues the run that ``args`` began."""
    _, rest = _take([arg for arg in args if arg != "--resume"], "--out")
    options = shlex.join([*rest, "--out", str(config.folder()), "--resume"])
    return f"{config.launcher} -m experiments.train {options}"


def main(args: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = list(sys.argv[1:] if args is None else args)
    rank = int(os.environ.get("RANK", "0"))
    before = signal.signal(signal.SIGTERM, interrupt)
    config = None
    try:
        compares, rest = _take(args, "--compare", action="store_true")
        config = parse(rest)
        # And so torch, which --help does without
        from experiments.train.loop import run
        from experiments.train.processes import from_first, lost_another, make_fabric
        from experiments.train.run_folder import place, so_far

        config = replace(config, out=from_first(make_fabric(config), partial(place, config)))
        runs = [config, dense_beside(config)] if compares else [config]
        for one in runs:
            so_far(one)  # refuses the folder of another run, before anything is trained
        with redirect_stdout(None) if rank else nullcontext():
            summaries = [run(one) for one in runs]
        if not rank:
            show(config, summaries[0], summaries[1] if compares else None)
        return
    except (ValueError, OSError) as error:
        # Of a full disk, what was trained is there all the same
        begun = config is not None and (config.folder() / "config.json").exists()
        if rank or not begun or not isinstance(error, OSError):
            fail(error, f" (process {rank})" if rank else "")
        why, status = f"error: {error}", 2
    except KeyboardInterrupt as wish:
        why, status = "stopped", 128 + getattr(wish, "number", signal.SIGINT)
    except RuntimeError as error:
        if config is None or not lost_another(error):
            raise
        why, status = "stopped, since another process has ended", 1
    finally:
        signal.signal(signal.SIGTERM, before)
    if not rank:
        then = "nothing was trained yet"
        if config is not None and (config.folder() / "config.json").exists():
            then = f"continue with: {resume_command(config, args)}"
        print(f"{why}; {then}", file=sys.stderr)
    sys.exit(status)
