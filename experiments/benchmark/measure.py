"""What all benchmarks share: settings, turns, costs, and how far they are."""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close
from torch_geometric.utils import to_undirected
from tqdm import tqdm

import gmoe
from experiments.run_folder import environment, write_json

T = TypeVar("T")
Step = Callable[[], object]
Steps = Mapping[str, Step]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Where and how long to measure."""

    device: str = "cpu"
    """Device, by torch's name."""
    threads: int = 0
    """CPU threads; 0 leaves torch's default."""
    repeats: int = 7
    """Timed runs of each variant."""
    seed: int = 0
    """Of all that is drawn."""
    json: Path | None = None
    """Where to write the figures."""
    quick: bool = False
    """A small case, of less than two minutes on one core: to see that all runs."""

    SMALL: ClassVar[Mapping[str, Any]] = {"repeats": 3}
    """Values with `quick`, of options that have their defaults."""

    def run(self) -> dict[str, Any]:
        """Measure, write the figures if there is where to, and return those of each variant.

        Raises:
            ValueError: an option out of range.
            AssertionError: variants that compute the same thing differ.
        """
        small = {name: value for name, value in self.SMALL.items() if getattr(self, name) == getattr(type(self), name)}
        own = replace(self, **small) if self.quick else self
        torch.manual_seed(own.seed)
        found = own.measured()
        if own.json is not None:
            write_json(own.json, own.content(found))
        return found

    def measured(self) -> dict[str, Any]:
        """By variant, the figures of :func:`measure`."""
        device = self.torch_device()
        with device:
            steps = self.steps()
        return measure(steps, self.repeats, device, self.reference)

    def steps(self) -> Steps:
        """What is timed, by variant; made on the device."""
        raise NotImplementedError

    def reference(self, variant: str) -> str:
        """The variant that ratios of this one are to."""
        raise NotImplementedError

    def content(self, found: dict[str, Any]) -> dict[str, Any]:
        """The content of the file."""
        settings = {name: value for name, value in asdict(self).items() if name not in ("json", "data_root", "folder")}
        return {"config": settings, "variants": found, "environment": environment()}

    def torch_device(self) -> torch.device:
        """The device.

        Raises:
            ValueError: there is none of that name.
        """
        try:
            return torch.empty(0, device=self.device).device
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device: got {self.device!r}, expected one that torch finds here ({error})") from error


def told(items: Iterable[T], unit: str, every: float = 0.0) -> Iterator[T]:
    """The items, with the time gone and left: a bar in a terminal; in a file a line for each that is done.

    Args:
        items: what is gone through.
        unit: name of one of them.
        every: seconds between lines, at least.
    """
    items = list(items)
    started = last = time.monotonic()
    in_terminal = sys.stderr.isatty()
    for done, item in enumerate(tqdm(items, desc=unit, leave=False, disable=not in_terminal), 1):
        yield item
        now = time.monotonic()
        if in_terminal or now - last < every:
            continue
        last = now
        name = "" if isinstance(item, int) else f" ({' '.join(map(str, item)) if isinstance(item, tuple) else item})"
        gone, left = (tqdm.format_interval(s) for s in (now - started, (now - started) / done * (len(items) - done)))
        print(f"{unit} {done} of {len(items)}{name}: {gone}, about {left} left", file=sys.stderr, flush=True)


def take_turns(
    steps: Steps, repeats: int, device: torch.device, warmup: int = 1, tell: Callable[..., Iterable[int]] = iter
) -> dict[str, dict[str, Any]]:
    """Run every variant ``warmup + repeats`` times, round by round, each round beginning with another variant.

    So a slow moment of the machine hits all of them.

    Args:
        steps: what is timed, by variant.
        repeats: timed runs of each variant.
        device: where the variants compute; on a GPU its work is waited for.
        warmup: runs before the clock starts (default 1).
        tell: goes through the rounds.

    Returns:
        For each variant ``wall`` and ``cpu``, seconds as ``{"median", "min", "max", "values"}``; CPU time is that of
        all threads of the process.

    Raises:
        ValueError: ``repeats`` below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats: got {repeats}, expected at least 1")
    names = list(steps)
    times: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in names}
    for turn in tell(range(warmup + repeats)):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            wait_for(device)
            wall, cpu = time.perf_counter(), time.process_time()
            steps[name]()
            wait_for(device)
            if turn >= warmup:
                times[name]["wall"].append(time.perf_counter() - wall)
                times[name]["cpu"].append(time.process_time() - cpu)
    return {name: {clock: spread(values) for clock, values in of.items()} for name, of in times.items()}


def measure(
    steps: Steps, repeats: int, device: torch.device, reference: Callable[[str], str]
) -> dict[str, dict[str, Any]]:
    """What :func:`take_turns` finds, and what one run costs.

    Returns:
        For each variant ``wall`` and ``cpu``; ``flops`` of one run; ``memory``, the most bytes that it holds at once
        beyond what was there before; and ``ratio``, each of these (of times the median) over the reference variant's.
    """
    found = take_turns(steps, repeats, device, tell=partial(told, unit="round"))
    for name in told(found, "costs"):
        found[name] |= {"flops": gmoe.count_flops(steps[name]), "memory": peak_bytes(steps[name], device)}
    for name, figures in found.items():
        base = found[reference(name)]
        figures["ratio"] = {clock: figures[clock]["median"] / base[clock]["median"] for clock in ("wall", "cpu")}
        for cost in ("flops", "memory"):
            figures["ratio"][cost] = figures[cost] / base[cost] if base[cost] else None
    return found


def peak_bytes(step: Step, device: torch.device) -> int:
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


def layer_step(layer: nn.Module, inputs: tuple[Any, ...], grad: Tensor, bf16: bool = False) -> Step:
    """Forward and backward of a layer, which leaves no gradients behind.

    Args:
        layer: what is called.
        inputs: of the layer.
        grad: that of the output.
        bf16: under bfloat16 autocast.
    """

    def step() -> None:
        with torch.autocast(grad.device.type, torch.bfloat16, enabled=bf16):
            y = layer(*inputs)
        y.backward(grad.to(y.dtype))
        layer.zero_grad()
        inputs[0].grad = None

    return step


@torch.no_grad()
def check_equal(name: str, found: Tensor, expected: Tensor) -> None:
    """Refuse a variant that does not compute what it is compared with, up to rounding."""
    assert_close(found, expected, rtol=1e-3, atol=1e-4, msg=lambda text: f"{name} and gmoe differ: {text}")


def power_law_edges(nodes: int, edges: int) -> Tensor:
    """Uniform nodes cite others by weights of a power law (exponent 2.7); then both directions of every edge."""
    cited = torch.multinomial(torch.rand(nodes).pow(-1 / 1.7), edges, replacement=True)
    return to_undirected(torch.stack([cited, torch.randint(nodes, (edges,))]), num_nodes=nodes)
