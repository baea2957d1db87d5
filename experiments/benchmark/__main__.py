"""``python -m experiments.benchmark NAME [options]``: variants take turns.

Ratios are those of minima in one run.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import tyro

from experiments.train.command_line import SPARSE, chosen, fail, stop

BENCHMARKS: dict[str, tuple[str, str]] = {
    "step": (
        "Training steps of whole models beside PyG's and timm's own, optimizer included.",
        "step.StepBenchmark",
    ),
    "gpu": (
        "A CUDA device: equal to the CPU, waits, and steps of whole models.",
        "gpu.GpuBenchmark",
    ),
}
"""By the name of the command line: a line of help, and the class, which is imported when it is
asked for."""


def main(args: Sequence[str] | None = None) -> None:
    """Entry point."""
    name, place, rest = chosen("benchmark", BENCHMARKS, __doc__, args)
    module, kind = place.split(".")
    made: Any = getattr(import_module(f"experiments.benchmark.{module}"), kind)
    config = tyro.cli(made, args=rest, prog=f"python -m experiments.benchmark {name}")
    import pandas as pd  # help does without them
    import torch

    from experiments.benchmark.tables import benchmark_lines

    if config.threads > 0:
        torch.set_num_threads(config.threads)
    warnings.filterwarnings("ignore", SPARSE)
    try:
        variants = config.run()
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        stop()
    print(pd.DataFrame(benchmark_lines(variants)).to_string(index=False))
    print(config.measured_on())


if __name__ == "__main__":
    main()
