"""What runs on one of OGB's sets say together: ``python -m experiments.ensemble RUN...``

For each run the line that OGB's leaderboards ask for, then the score of the mean of all their seeds' probabilities, by
OGB's own evaluator.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from experiments.config import fail
from experiments.files import naming

SEEDS = 10
"""That OGB's leaderboards ask for."""


def ensemble(runs: tyro.conf.Positional[tuple[Path, ...]], data_root: Path | None = None) -> list[str]:
    """Lines of each run, and of all of them together.

    Args:
        runs: run folders of one data set.
        data_root: root folder of the data; by default where they were trained on them.
    """
    from safetensors.torch import load_file

    from experiments.predictions import score
    from experiments.run_folder import read_run

    warnings.filterwarnings("ignore", "Sparse (CSR tensor support is in beta|invariant checks are implicitly)")
    found = [read_run(folder, data_root) for folder in runs]
    sets = sorted({run.config.dataset for run in found})
    if len(sets) != 1:
        raise ValueError(f"runs: got those of {', '.join(sets) or 'none'}, expected runs of one data set")
    files = [run.folder / f"seed-{seed}" / "predictions.safetensors" for run in found for seed in run.config.seeds]
    if missing := [str(file) for file in files if not file.exists()]:
        raise ValueError(f"{missing[0]}: is missing; runs on OGB's sets of one node type write it")
    task, total = found[0].load_task(), None
    for file in files:
        with naming(file):
            part = load_file(file)["probability"]
            total = part if total is None else total.add_(part)
    assert total is not None
    lines = [f"{run.folder}: {submission(run.summary)}" for run in found]
    test, val = (f"{100 * score(task, total / len(files), part):.2f}" for part in ("test", "val"))
    return [*lines, f"ensemble of {len(files)}: test {test}, validation {val} (one score, without a spread)"]


def submission(summary: Any) -> str:
    """Test and validation, mean ± sample standard deviation over seeds, parameters, hardware."""
    from experiments.tables import percent

    where, n = summary["environment"], summary["test"]["n"]
    line = f"test {percent(summary['test'])}, validation {percent(summary['val'])}, {n} seeds"
    line += f"; {summary['parameters']:,} parameters; {where['gpu'] or where['cpu']}"
    return line if n >= SEEDS else f"{line} (a submission takes {SEEDS} seeds)"


def main(args: Sequence[str] | None = None) -> None:
    """Entry point."""
    try:
        lines = tyro.cli(ensemble, args=args, prog="python -m experiments.ensemble", description=__doc__)
    except (ValueError, OSError) as error:
        fail(error)
    print("\n".join(lines), file=sys.stdout)


if __name__ == "__main__":
    main()
