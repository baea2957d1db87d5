"""Run a study, a fixed list of variants: ``python -m experiments.sweep STUDY [options]``.

    python -m experiments.sweep mosaic --runs runs/mosaic --results results
    python -m experiments.sweep grid --preset minesweeper --routers token_choice expert_choice --experts 4 8 --ks 1 2
    python -m experiments.sweep grid --preset cora --routers token_choice --jobs 8
    python -m experiments.sweep grid --preset cora --routers token_choice --jobs 64 --ray auto

``grid`` is a study of your own: a preset over routers, numbers of experts and experts per token. Every variant is a run
folder; finished variants are skipped and an unfinished one goes on, so that a study may be cut off at any time and
started again. After every variant, ``results/STUDY.json`` holds all that is finished; a variant that it holds already,
with the same configuration, is finished also where its run folder is gone. A variant that cannot be run is named at the
end, and the exit status is then 1.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape

from experiments.config import RouterName, fail
from experiments.grid import grid
from experiments.studies import STUDIES, Study
from experiments.tables import study_table

ROUTERS: tuple[RouterName, ...] = ("random", "uniform", "token_choice", "expert_choice", "multi_centroid")
"""Of a grid, by default."""
OF_GRIDS = ("preset", "routers", "experts", "ks", "seeds", "epochs")
"""Options that a study has fixed."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A study and where it goes."""

    study: Annotated[str, tyro.conf.Positional]
    """Name of the study, or `grid`."""
    preset: str | None = None
    """Of a grid: the preset."""
    routers: tuple[RouterName, ...] | None = None
    """Of a grid: the routers; by default random, uniform, token_choice, expert_choice and multi_centroid. A dense
    model, and one four times as wide, are always there."""
    experts: tuple[int, ...] | None = None
    """Of a grid: numbers of experts, E; by default 8."""
    ks: tuple[int, ...] | None = None
    """Of a grid: experts per token, K; by default 1 and 2."""
    seeds: tuple[int, ...] | None = None
    """Of a grid: the seeds; by default those of the preset."""
    epochs: int | None = None
    """Of a grid: epochs; by default those of the preset."""
    runs: Path | None = None
    """Folder of the run folders; by default runs/STUDY, or runs/grid-PRESET."""
    results: Path = Path("results")
    """Folder of the result files."""
    only: str = ""
    """Run only variants whose name contains this."""
    data_root: Path = Path("data")
    """Root folder of the data, in which facebook.npz lies; of a grid over `graph`, your own file."""
    jobs: int = 1
    """Seeds of variants that are trained at once, each in a process, or a task of Ray; results do not depend on it."""
    threads: int = 0
    """CPU threads of each process; 0 divides torch's default among them, and with `--ray` is 1."""
    ray: str | None = None
    """Address of a Ray cluster over whose machines the jobs are spread, `auto` or HOST:PORT; `local` starts one."""
    progress: bool = True
    """Report progress: a bar, or where the output is a file, a line every few epochs."""


def sweep(config: SweepConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """Run what is not finished.

    Returns:
        The study's results, and by variant why it could not be run.

    Raises:
        ValueError: see :func:`check`.
    """
    name, study = check(config)
    import torch

    from experiments.jobs import Processes, RayTasks, train_apart
    from experiments.loop import Progress, run
    from experiments.run_folder import differences_of, write_json

    threads = config.threads or (1 if config.ray else max(torch.get_num_threads() // config.jobs, 1))
    torch.set_num_threads(threads)
    folder = config.runs if config.runs is not None else Path("runs") / name
    path = config.results / f"{name}.json"
    known = (
        {variant["variant"]: variant for variant in json.loads(path.read_text())["variants"]} if path.exists() else {}
    )
    finished: dict[str, dict[str, Any]] = {}
    todo = []
    for variant in study.variants:
        root = config.data_root
        if variant.config.dataset == "graph":
            root = root / variant.config.data_root
        run_config = replace(
            variant.config, out=folder / variant.name, resume=True, progress=config.progress, data_root=root
        )
        if variant.name in known and not differences_of(run_config, known[variant.name]["config"]):
            finished[variant.name] = {**known[variant.name], "label": variant.label}
        elif config.only in variant.name or (folder / variant.name / "summary.json").exists():
            todo.append((variant, run_config))
    if config.study == "grid":  # what an earlier grid over the same preset left stays
        finished = {
            variant: found for variant, found in known.items() if variant not in {a.name for a in study.variants}
        } | finished
    failed: dict[str, str] = {}
    apart = config.jobs > 1 or config.ray is not None
    progress = Progress(sum(len(one.seeds) * one.epochs for _, one in todo), config.progress and not apart)
    ready: Generator[tuple[int, str | None], None, None] = ((place, None) for place in range(len(todo)))
    if apart:
        workers = Processes(threads) if config.ray is None else RayTasks(config.ray, threads)
        ready = train_apart([one for _, one in todo], config.jobs, workers, config.progress)
    with closing(ready):
        for place, why in ready:
            variant, run_config = todo[place]
            try:
                if why is not None:
                    raise ValueError(why)
                summary = run(run_config, progress)
            except (ValueError, OSError) as error:  # of this variant; the others go on
                failed[variant.name] = str(error)
                progress.skip(len(run_config.seeds) * run_config.epochs)
                progress.finish(len(run_config.seeds) * run_config.epochs)
                continue
            finished[variant.name] = {"variant": variant.name, "label": variant.label, **summary}
            write_json(path, collect(name, study, finished))
    return collect(name, study, finished), failed


def check(config: SweepConfig) -> tuple[str, Study]:
    """The study, and its name.

    Raises:
        ValueError: an unknown study, an option that it has fixed, or one out of range.
    """
    if config.jobs < 1:
        raise ValueError(f"jobs: got {config.jobs}, expected at least 1")
    if config.study != "grid":
        if config.study not in STUDIES:
            raise ValueError(f"study: got {config.study!r}, expected one of {', '.join([*STUDIES, 'grid'])}")
        for name in OF_GRIDS:
            value = getattr(config, name)
            if value is not None:
                raise ValueError(f"{name}: got {value!r} with {config.study}, expected none: only grid takes it")
        return config.study, STUDIES[config.study]
    if config.preset is None:
        raise ValueError("preset: got none, expected --preset NAME for a grid")
    sizes = (config.experts or (8,), config.ks or (1, 2), config.seeds or ())
    made = grid(config.preset, config.routers or ROUTERS, *sizes, config.epochs)
    name = f"grid-{config.preset}"
    if config.seeds:
        name += "-seeds-" + "-".join(map(str, config.seeds))
    return name if config.epochs is None else f"{name}-epochs-{config.epochs}", made


def collect(name: str, study: Study, finished: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The results of the variants that are finished, in the order of the study, and then others."""
    names = [variant.name for variant in study.variants if variant.name in finished]
    variants = [finished[variant] for variant in [*names, *(variant for variant in finished if variant not in names)]]
    return {
        "study": name,
        "about": study.about,
        "reference": study.reference,
        "wide": study.wide,
        "chosen_on": list(study.chosen_on),
        "variants": variants,
    }


def main(args: Sequence[str] | None = None) -> None:
    """Entry point."""
    try:
        config = tyro.cli(SweepConfig, args=args, prog="python -m experiments.sweep", description=__doc__)
        check(config)
        from experiments.config import InterruptedRunError  # and so torch, which --help does without
    except ValueError as error:
        fail(error)
    console = Console(stderr=True, soft_wrap=True)

    def stop(number: int, _: FrameType | None) -> None:
        raise InterruptedRunError(number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        results, failed = sweep(config)
    except KeyboardInterrupt as stopped:
        console.print("stopped; the same command continues", highlight=False)
        sys.exit(128 + getattr(stopped, "number", signal.SIGINT))
    except (ValueError, OSError) as error:
        fail(error)
    finally:
        signal.signal(signal.SIGTERM, before)
    print(study_table(results))
    for variant, reason in failed.items():
        console.print(f"[bold red]{variant}:[/] {escape(reason)}", highlight=False)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
