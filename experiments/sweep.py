"""Run a study, a fixed list of arms: ``python -m experiments.sweep STUDY [options]``.

    python -m experiments.sweep mosaic --runs runs/mosaic --results results

Every arm is a run folder; finished arms are skipped and an unfinished one goes on, so that a study may be cut off at
any time and started again. At the end, and after every arm, ``results/STUDY.json`` holds all that is finished.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console

from experiments.runs import run, write_json
from experiments.studies import STUDIES
from experiments.tables import study_table


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A study and where it goes."""

    study: Annotated[str, tyro.conf.Positional]
    """Name of the study."""
    runs: Path | None = None
    """Folder of the run folders; by default runs/STUDY."""
    results: Path = Path("results")
    """Folder of the result files."""
    only: str = ""
    """Run only arms whose name contains this."""
    data_root: Path = Path("data")
    """Root folder of the data."""
    threads: int = 0
    """CPU threads; 0 leaves torch's default."""
    progress: bool = True
    """Show progress bars."""


def sweep(config: SweepConfig) -> dict[str, Any]:
    """Run what is not finished, and return the study's results.

    Raises:
        ValueError: an unknown study.
    """
    if config.study not in STUDIES:
        raise ValueError(f"study: got {config.study!r}, expected one of {', '.join(STUDIES)}")
    if config.threads > 0:
        torch.set_num_threads(config.threads)
    folder = config.runs if config.runs is not None else Path("runs") / config.study
    study = STUDIES[config.study]
    for arm in study.arms:
        if config.only in arm.name:
            out = folder / arm.name
            run(replace(arm.config, out=out, resume=True, progress=config.progress, data_root=config.data_root))
            write_json(config.results / f"{config.study}.json", collect(config.study, folder))
    return collect(config.study, folder)


def collect(name: str, folder: Path) -> dict[str, Any]:
    """The results of the arms that are finished, in the order of the study."""
    study = STUDIES[name]
    arms = []
    for arm in study.arms:
        path = folder / arm.name / "summary.json"
        if path.exists():
            arms.append({"arm": arm.name, "label": arm.label, **json.loads(path.read_text())})
    return {"study": name, "about": study.about, "reference": study.reference, "wide": study.wide, "arms": arms}


def main(args: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = tyro.cli(SweepConfig, args=args, prog="python -m experiments.sweep", description=__doc__)
    try:
        results = sweep(config)
    except (ValueError, FileNotFoundError) as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {error}", highlight=False)
        sys.exit(2)
    print(study_table(results))


if __name__ == "__main__":
    main()
