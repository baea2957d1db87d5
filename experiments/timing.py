"""Variants of a benchmark take turns, so that a slow moment of the machine hits all; and what memory they take."""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def take_turns(
    variants: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, warmup: int = 1
) -> dict[str, dict[str, Any]]:
    """Run every variant ``warmup + repeats`` times, round by round, each round beginning with another variant.

    Args:
        variants: what is timed, by name.
        repeats: timed runs of each variant.
        device: where the variants compute; on a GPU its work is waited for.
        warmup: runs before the clock starts (default 1).

    Returns:
        For each variant ``wall`` and ``cpu``, seconds as ``{"median", "min", "max", "values"}``; CPU time is that of
        all threads of the process.

    Raises:
        ValueError: ``repeats`` below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats: got {repeats}, expected at least 1")
    names = list(variants)
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            wait_for(device)
            started, used = time.perf_counter(), time.process_time()
            variants[name]()
            wait_for(device)
            if turn >= warmup:
                wall[name].append(time.perf_counter() - started)
                cpu[name].append(time.process_time() - used)
    return {name: {"wall": spread(wall[name]), "cpu": spread(cpu[name])} for name in names}


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most memory that one run has allocated and not yet freed, beyond what was there before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return int(torch.cuda.max_memory_allocated(device)) - before
    with _silence(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = profiled.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate((size for _, size in changes), initial=0))


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing on the standard error stream, not from native code either: the profiler tells there when it starts."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def spread(values: list[float]) -> dict[str, Any]:
    """Median, extremes and all values."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": values}


def wait_for(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
