"""A layer while another process takes one of its cores.

Threads that work in step wait for the one that has none.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tqdm import tqdm

from experiments.benchmark.layers import power_law_graph
from experiments.benchmark.measure import Benchmark, Steps, layer_step, spread, take_turns
from gmoe import MoEConv
from gmoe._checks import check, check_counts
from gmoe.conv.kinds import factory_of

BURN = "import os; os.sched_setaffinity(0, [{core}])\nwhile True: pass"
"""What the other process runs."""


@dataclass(frozen=True, kw_only=True)
class BusyBenchmark(Benchmark):
    """One layer on as many cores as it has threads, alone and while a process takes one of them.

    Both take turns; a ratio is to the same layer alone. The default size is that of Cora. Linux
    only.
    """

    device: Literal["cpu"] = "cpu"
    """Device."""
    threads: int = 2
    """CPU threads, and cores."""
    conv: str = "gat"
    """The conv, by the name that MoEConv takes."""
    nodes: int = 2708
    edges: int = 5278
    """Edges, before the reverse of each is added."""
    width: int = 1433
    """Features of a node."""
    out: int = 64
    """Features of an output."""

    def measured(self) -> dict[str, Any]:
        """By layer and company ``wall`` and ``cpu``, and ``ratio`` of these to those alone."""
        check_counts(threads=self.threads)
        there = cores_of_process()
        enough = f"at least {self.threads} cores"
        check(len(there) >= self.threads, "threads", f"{self.threads} on {len(there)}", enough)
        cores = there[: self.threads]
        steps = self._steps()
        times: dict[str, dict[str, list[float]]] = {
            f"{name}, {company}": {"wall": [], "cpu": []}
            for name in steps
            for company in ("alone", "a core taken")
        }
        with pinned_to(cores):
            for _ in tqdm(range(self.repeats), desc="companies", leave=False, disable=None):
                self._add(times, "alone", steps)
                with neighbor_on(cores[0]):
                    self._add(times, "a core taken", steps)
        by_variant: dict[str, Any] = {
            name: {clock: spread(values) for clock, values in of.items()}
            for name, of in times.items()
        }
        for name, figures in by_variant.items():
            alone = by_variant[f"{name.partition(', ')[0]}, alone"]
            figures["ratio"] = {
                clock: figures[clock]["median"] / alone[clock]["median"]
                for clock in ("wall", "cpu")
            }
        return by_variant

    def _steps(self) -> Steps:
        edge_index, _ = power_law_graph(self.nodes, self.edges)
        inputs = (torch.randn(self.nodes, self.width), edge_index)
        layers = {
            "dense": factory_of(self.conv)(self.width, self.out),
            "MoEConv": MoEConv(self.conv, self.width, self.out),
            "MoEConv with shared expert": MoEConv(self.conv, self.width, self.out, start="shared"),
        }
        return {name: layer_step(layer, inputs) for name, layer in layers.items()}

    def _add(self, times: dict[str, Any], company: str, steps: Steps) -> None:
        """Time each step once more, after one that is not timed."""
        for name, of in take_turns(steps, 1, torch.device(self.device)).items():
            for clock, figures in of.items():
                times[f"{name}, {company}"][clock] += figures["values"]


def cores_of_process() -> list[int]:
    """The cores that this process may use."""
    check(
        hasattr(os, "sched_getaffinity"), "system", sys.platform, "one that pins processes to cores"
    )
    return sorted(os.sched_getaffinity(0))


@contextmanager
def pinned_to(cores: list[int]) -> Iterator[None]:
    """All threads of this process on these cores."""
    before = cores_of_process()
    pin_threads(cores)
    try:
        yield
    finally:
        pin_threads(before)


def pin_threads(cores: list[int]) -> None:
    """Those that there are; later ones follow the one that starts them."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), cores)


@contextmanager
def neighbor_on(core: int) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that never rests, on a core."""
    process = subprocess.Popen([sys.executable, "-S", "-c", BURN.format(core=core)])
    try:
        yield process
    finally:
        process.kill()
        process.wait()
