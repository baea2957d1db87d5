"""Arms of a benchmark take turns, so that a slow moment of the machine hits all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def take_turns(
    arms: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, warmup: int = 1
) -> dict[str, dict[str, Any]]:
    """Run every arm ``warmup + repeats`` times, round by round, each round beginning with another arm.

    Args:
        arms: what is timed, by name.
        repeats: timed runs of each arm.
        device: where the arms compute; on a GPU its work is waited for.
        warmup: runs before the clock starts (default 1).

    Returns:
        For each arm ``wall`` and ``cpu``, seconds as ``{"median", "min", "max", "values"}``; CPU time is that of all
        threads of the process.

    Raises:
        ValueError: ``repeats`` below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats: got {repeats}, expected at least 1")
    names = list(arms)
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            wait_for(device)
            started, used = time.perf_counter(), time.process_time()
            arms[name]()
            wait_for(device)
            if turn >= warmup:
                wall[name].append(time.perf_counter() - started)
                cpu[name].append(time.process_time() - used)
    return {name: {"wall": spread(wall[name]), "cpu": spread(cpu[name])} for name in names}


def spread(values: list[float]) -> dict[str, Any]:
    """Median, extremes and all values."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": values}


def wait_for(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
