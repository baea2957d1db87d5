"""What all benchmarks share: options, turns, costs, records."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile
from torch_geometric import seed_everything
from tqdm import tqdm

from experiments.benchmark.tables import measured_on
from experiments.train.results import environment, write_json
from gmoe._checks import check, check_at_least, check_counts

Step = Callable[[], object]
Steps = Mapping[str, Step]
"""What is timed, by variant."""

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # or the profiler prints when it starts and stops


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What to measure, where, and where to write it."""

    rows: tuple[str, ...]
    repeats: int = 15
    """Timed steps of each model, after some that are not."""
    device: Literal["cpu", "cuda", "mps"] = "cpu"
    """Device."""
    threads: int = 0
    """CPU threads; 0 leaves torch's default."""
    json: Path | None = None
    """Where to write the figures."""

    def run(self) -> dict[str, Any]:
        """Measure, write the figures if there is where to, and return those of each variant.

        Raises:
            ValueError: an option of which nothing can be measured, or a file that is a folder.
        """
        self.check_options()
        seed_everything(0)
        variants = self.measured()
        if self.json is not None:
            write_json(self.json, self.content(variants))
        return variants

    def check_options(self) -> None:
        """Refuse options of which nothing can be measured, and a folder in place of a file."""
        check(self.rows, "rows", "nothing", "at least one")
        check_counts(repeats=self.repeats)
        check_at_least(0, threads=self.threads)
        is_folder = self.json is not None and self.json.is_dir()
        check(not is_folder, "json", self.json, "a file, not a folder")

    def measured(self) -> dict[str, Any]:
        """The figures of each variant."""
        raise NotImplementedError

    def content(self, variants: dict[str, Any]) -> dict[str, Any]:
        """The content of the file."""
        settings = {name: value for name, value in asdict(self).items() if name != "json"}
        return {"config": settings, "variants": variants, "environment": environment()}

    def measured_on(self) -> str:
        """A line for below the figures: hardware, versions, commit."""
        return measured_on(environment(), self.device)


def take_turns(
    steps: Steps, repeats: int, device: torch.device, warmup: int = 1
) -> dict[str, dict[str, Any]]:
    """Run every variant ``warmup + repeats`` times, round by round, each round beginning with
    another variant.

    So a slow moment of the machine hits all of them, as it does not with one timer each
    (``torch.utils.benchmark``). For each there are ``wall`` and ``cpu``, seconds as
    :func:`spread` has them; CPU time is that of all threads.
    """
    names = list(steps)
    times: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in names}
    for turn in tqdm(range(warmup + repeats), desc="round", leave=False, disable=None):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            wait_for(device)
            wall = time.perf_counter()
            cpu = time.process_time()
            steps[name]()
            wait_for(device)
            if turn >= warmup:
                times[name]["wall"].append(time.perf_counter() - wall)
                times[name]["cpu"].append(time.process_time() - cpu)
    return {
        name: {clock: spread(values) for clock, values in of.items()} for name, of in times.items()
    }


def peak_bytes(step: Step, device: torch.device) -> int:
    """The most memory that one run holds at once.

    What was there before it does not count.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return int(torch.cuda.max_memory_allocated(device)) - before
    return max(itertools.accumulate(_memory_changes(step), initial=0))


def kept_bytes(forward: Step, device: torch.device) -> int:
    """The memory that a forward pass leaves behind while its result is alive.

    Its backward pass needs it.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        result = forward()
        kept = int(torch.cuda.memory_allocated(device)) - before
        del result
        return kept
    return sum(_memory_changes(forward))


def _memory_changes(step: Step) -> list[int]:
    """Bytes that a run on the CPU takes and frees, in order; its result stays alive."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = step()
    del result
    events = profiled.profiler.kineto_results.events()
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    return [size for _, size in changes]


def spread(values: list[float]) -> dict[str, Any]:
    """Median, extremes and all values."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "values": values,
    }


def wait_for(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
