"""What runs on one of OGB's sets say together: ``python -m experiments.ensemble RUN...``

For each run the line that OGB's leaderboards ask for, then the score of the mean of all their
seeds' probabilities, by OGB's own evaluator. See :mod:`experiments.train.predictions`.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import tyro

from experiments.train.checks import check
from experiments.train.command_line import program
from experiments.train.files import check_finished
from experiments.train.scores import scored

SEEDS = 10
"""That OGB's leaderboards ask for."""


def ensemble(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    data_root: Path | None = None,
    trust: bool = False,
) -> None:
    """Print a line of each run, and one of all of them together.

    Args:
        runs: run folders of one data set.
        data_root: root folder of the data; by default where they were trained on them.
        trust: import the router, conv, model and data that a run's config.json names, where
            they are code. It can do whatever you can.
    """
    folders = [run.resolve() for run in runs]
    twice = [str(run) for run in runs if folders.count(run.resolve()) > 1]
    check(not twice, "runs", f"{' and '.join(twice)}, one folder", "each run once")
    check_finished(*runs)
    from experiments.train.predictions import (  # and so torch, which --help does without
        mean_of,
        score,
    )
    from experiments.train.run_folder import read_run

    warnings.filterwarnings(
        "ignore", "Sparse (CSR tensor support is in beta|invariant checks are implicitly)"
    )
    data_root = data_root or read_run(runs[0], None, trust).config.data_root  # all on the same data
    read = [read_run(folder, data_root, trust) for folder in runs]
    sets = sorted({run.config.dataset for run in read})
    # On other data sets, one seed may test on what another trains on.
    is_one_of_ogb = len(sets) == 1 and sets[0].startswith(("ogbn-", "ogbg-"))
    got = f"those of {', '.join(sets) or 'none'}"
    check(is_one_of_ogb, "runs", got, "runs of one of OGB's data sets")
    for run in read:
        print(f"{run.folder}: {submission(run.summary)}")
        if before := run.summary.get("uncorrected"):
            print(f"{run.folder}, without C&S: {submission({**run.summary, **before})}")
    files = [
        run.folder / f"seed-{seed}" / "predictions.safetensors"
        for run in read
        for seed in run.config.seeds
    ]
    if missing := [str(file) for file in files if not file.exists()]:
        raise ValueError(
            f"{missing[0]}: is missing; runs on OGB's molecules, or its sets of one node type in "
            "memory, can write it"
        )
    for run in reversed(read):  # an error where it was trained on others
        task = run.load_task()
    probability = mean_of(files)
    metric = task.metric_name
    test, val = (
        scored(metric, {"mean": score(task, probability, part), "std": None})
        for part in ("test", "val")
    )
    print(f"ensemble of {len(files)}: test {test}, validation {val} (one score, without a spread)")


def submission(summary: Any) -> str:
    """Test and validation, mean ± sample standard deviation over seeds, parameters, hardware."""
    where = summary["environment"]
    n = summary["test"]["n"]
    test, val = (scored(summary["metric"], summary[part]) for part in ("test", "val"))
    line = f"test {test}, validation {val}, {n} seeds"
    line += f"; {summary['parameters']:,} parameters; {where['gpu'] or where['cpu']}"
    return line if n >= SEEDS else f"{line} (a submission takes {SEEDS} seeds)"


main = program("ensemble", ensemble, __doc__)
