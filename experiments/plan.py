"""What training a preset takes, before it begins: ``python -m experiments.plan PRESET [options]``.

    python -m experiments.plan cifar10 --data-root DIR --devices 2 --json plan.json

Trains one process's share of the batches for half a minute, by the loop of ``python -m experiments.train``, whose
options it takes; of several processes on this machine's CPU also the network is measured. Prints memory a process,
bytes moved, steps, and seconds an epoch. A whole graph is evaluated as a whole, however long that takes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.utils._pytree import tree_leaves

from experiments.config import RunConfig
from experiments.data import Batch, Split, Task, load_tasks
from experiments.loop import fit, peak_memory, prepare, restart_peak_memory, set_up
from experiments.presets import PRESETS
from experiments.processes import make_fabric
from experiments.progress import Progress
from experiments.runs import environment, write_json
from experiments.train import parse
from gmoe import Router

SECONDS = 24.0
"""Of calibration; a pass over training or validation is cut off after a quarter of it."""
WARM = 2
"""Steps before the clock counts."""
GIGABYTES = 1.0
"""A second, between processes, where neither the network nor ``--bandwidth`` says: about 10 Gbit Ethernet."""


class EnoughError(Exception):
    """The calibration is over."""


@dataclass
class Pass:
    """A pass over a split, or a part of it: when it began, seconds, targets and bytes of each batch."""

    began: float
    laps: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)


class Share:
    """The loader of the first of several processes, which watches the clock and the memory of whoever asks for batches.

    Args:
        task: whose batches they are.
        world: how many processes.
        device: whose memory counts.
    """

    def __init__(self, task: Task, world: int, device: torch.device) -> None:
        self.task, self.world, self.device = task, world, device
        self.passes: dict[Split, list[Pass]] = {"train": [], "val": [], "test": []}
        self.memory = {"preparation": 0, "start": 0, "step": 0}

    def __call__(
        self, split: Split, batch_size: int, seed: int | None, shard: tuple[int, int] | None = None
    ) -> Iterable[Batch]:
        if shard is None:  # to prepare, and whole graphs, which are not shared out
            return self.task.loader(split, batch_size, seed)
        return self._watched(split, self.task.loader(split, batch_size, seed, (0, self.world)))

    def _watched(self, split: Split, batches: Iterable[Batch]) -> Iterator[Batch]:
        before = self.passes[split]
        first = split == "train" and not before
        if first:
            self.memory |= {"preparation": peak(self.device), "start": in_use(self.device)}
        one = Pass(time.perf_counter())
        before.append(one)
        if split == "train" and one.began - before[0].began > SECONDS:
            raise EnoughError
        lap = one.began
        for batch in batches:
            one.rows.append(len(batch.target))
            one.bytes.append(nbytes([batch.inputs, batch.target]))
            yield batch  # and here it is used
            now = time.perf_counter()
            one.laps.append(now - lap)
            lap = now
            if len(one.laps) > WARM and now - one.began > SECONDS / 4:
                break
        if first:
            self.memory["step"] = peak(self.device)


def nbytes(tree: Any) -> int:
    """Of all tensors in it."""
    total = 0
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            parts = [leaf.crow_indices(), leaf.col_indices(), leaf.values()] if leaf.is_sparse_csr else [leaf]
            total += sum(part.nbytes for part in parts)
    return total


def peak(device: torch.device) -> int:
    """See :func:`experiments.loop.peak_memory`; in bytes."""
    return int(peak_memory(device) * 2**20)


def in_use(device: torch.device) -> int:
    """Memory in use now, in bytes; the peak counts from here."""
    restart_peak_memory(device)
    return peak(device)


@contextmanager
def router_sums() -> Iterator[list[int]]:
    """Bytes of each sum over tokens for which routers in training ask all processes."""
    summed, found = Router.summed, list[int]()

    def counting(router: Router, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        if parts and router.training and torch.is_grad_enabled():
            found.append(nbytes(parts))
        return summed(router, parts)

    with patch.object(Router, "summed", counting):
        yield found


class Moved(NamedTuple):
    """What processes exchange in a step: bytes of gradients, buffers and routers' sums, and how many sums there are."""

    gradients: int
    buffers: int
    routers: int
    sums: int

    def by_process(self, world: int) -> dict[str, int]:
        """Bytes that each sends: a sum goes around the ring twice, buffers come from the first process."""
        around = 2 * (world - 1) / world
        found = {"gradients": around * self.gradients, "routers": around * self.routers}
        return {name: round(value) for name, value in found.items()} | {"buffers": self.buffers if world > 1 else 0}

    def seconds(self, config: RunConfig, device: torch.device, bandwidth: float | None) -> tuple[float, str]:
        """A step's, none of which is hidden behind the backward pass, and where that is from; see :func:`plan`."""
        world = config.devices * config.nodes
        if world == 1:
            return 0.0, "one process"
        cores = os.cpu_count() or 1
        if bandwidth is None and config.nodes == 1 and device.type == "cpu" and world <= cores:
            with TemporaryDirectory() as folder:
                spawn(_sum_often, (world, self.gradients, Path(folder)), nprocs=world)
                large, small = json.loads((Path(folder) / "seconds.json").read_text())
            return large + (self.sums + 2) * small, f"measured: gloo between {world} processes"
        given = GIGABYTES if bandwidth is None else bandwidth
        return sum(self.by_process(world).values()) / (given * 1e9), f"assumed: {given:g} GB/s, no latency"


def _sum_often(rank: int, world: int, size: int, folder: Path) -> None:
    """Measure sums over processes: of as many bytes as gradients have, and of a few."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    found = []
    for count in (size // 4, 16):
        value, laps = torch.zeros(count), list[float]()
        for _ in range(7):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(value)
            laps.append(time.perf_counter() - began)
        found.append(statistics.median(laps[WARM:]))
    if rank == 0:
        (folder / "seconds.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def plan(config: RunConfig, bandwidth: float | None = None) -> dict[str, Any]:
    """Calibrate, and return the figures as JSON: bytes and seconds.

    Args:
        config: of the run, with as many processes as it is to have.
        bandwidth: GB/s between processes; by default measured over gloo where they are all of this machine's CPU and
            each has a core, else :data:`GIGABYTES`.

    Raises:
        ValueError: what cannot be run, as in training.
    """
    if bandwidth is not None and not bandwidth > 0:
        raise ValueError(f"bandwidth: got {bandwidth}, expected GB/s, a number above 0")
    world = config.devices * config.nodes
    if world > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # as torchrun has it
    alone = replace(config, devices=1, nodes=1, epochs=10**6, eval_every=1)  # it ends when the time is over
    device, seed = make_fabric(alone).device, config.seeds[0]
    memory = {"libraries": in_use(device)}
    task = load_tasks(config)(seed)
    loading, memory["data"] = peak(device), in_use(device) - memory["libraries"]
    share = Share(task, world, device)
    own = replace(task, loader=share)
    prepared = prepare(alone, own, seed)
    with (
        TemporaryDirectory() as folder,
        router_sums() as sums,
        set_up(prepared.fabric, prepared.model, alone, own) as it,
    ):
        with suppress(EnoughError):
            fit(it, seed, Path(folder) / "seed", Progress(1, shown=False))
        training, states = peak(device), nbytes(it.optimizer.state_dict())
        last = sum(nbytes(list(vars(routing).values())) for routing in it.routings)
    *passes, end = share.passes["train"]
    taken = sum(len(one.laps) for one in passes)
    weights, gradients = (
        nbytes([p for p in it.model.parameters() if only in (p.requires_grad, None)]) for only in (None, True)
    )
    moved = Moved(gradients, nbytes(list(it.model.buffers())), sum(sums) // taken, len(sums) // taken)
    between = [then.began - one.began - sum(one.laps) for one, then in itertools.pairwise([*passes, end])]
    evaluation = statistics.fmean(between[1:] or between)  # and what is written; the first time is slow
    kept = 0
    if share.passes[
        "val"
    ]:  # in batches: what was not evaluated takes its time too, and all routings of a split are kept
        assert task.split is not None
        val = share.passes["val"]
        rows = sum(sum(one.rows) for one in val)
        left = len(task.split["val"]) / world - rows / len(val)
        evaluation += max(left, 0.0) * sum(sum(one.laps) for one in val) / rows
        kept = round(last * max(len(task.split["test"]) / max(val[-1].rows[-1], 1) - 1, 0))
    seconds = {"step": statistics.fmean([lap for one in passes for lap in one.laps][WARM:])}
    seconds["communication"], network = moved.seconds(config, device, bandwidth)
    seconds["evaluation"] = evaluation / config.eval_every
    steps = task.steps(config.batch_size)
    seconds["epoch"] = steps * (seconds["step"] + seconds["communication"]) + seconds["evaluation"]
    start = share.memory["start"]
    memory |= {"libraries": start - memory["data"] - weights, "parameters": weights, "gradients": gradients}
    memory |= {"optimizer": states, "activations": max(share.memory["step"] - start - gradients - states, 0)}
    memory["buckets"] = gradients if world > 1 else 0  # in which DDP copies gradients
    top = max(loading, share.memory["preparation"], training + kept) + memory["buckets"]
    memory |= {"evaluation": top - sum(memory.values()), "peak": top}
    a_step = moved.by_process(world) | {
        "batch": round(statistics.fmean(itertools.chain(*(one.bytes for one in passes))))
    }
    return {
        "config": config.science(),
        "processes": world,
        "device": device.type,
        "steps": steps,
        "memory": memory,
        "bytes": {"step": a_step, "epoch": {name: steps * value for name, value in a_step.items()}},
        "seconds": seconds,
        "network": network,
        "calibration": {"steps": taken, "seconds": end.began - passes[0].began},
        "environment": environment(),
    }


def show(found: dict[str, Any], console: Console) -> None:
    """Print it as a table."""
    config, calibration = found["config"], found["calibration"]
    title = f"{config['dataset']}, {found['processes']} of {found['device']}, batches of {config['batch_size']}"
    table = Table("", "", "", title=title, show_header=False)
    for name, value in found["memory"].items():
        table.add_row("MiB a process" if name == "libraries" else "", name, f"{value / 2**20:,.1f}")
    for part, figures in found["bytes"].items():
        for name, value in figures.items():
            table.add_row(f"MB a process and {part}" if name == "gradients" else "", name, f"{value / 1e6:,.3f}")
    table.add_row("steps an epoch", "", f"{found['steps']:,}")
    for name, value in found["seconds"].items():
        each = "a step" if name in ("step", "communication") else "an epoch"
        table.add_row(f"seconds {each}", name, f"{value:,.4g}")
    console.print(table)
    of = f"{calibration['steps']} steps in {calibration['seconds']:.0f} s, {found['environment']['threads']} threads"
    console.print(f"calibration: {of}; network: {found['network']}")


def main(args: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        "python -m experiments.plan",
        description=__doc__.partition("\n\n    ")[0],
        epilog="All other options are those of: python -m experiments.train PRESET --help",
        allow_abbrev=False,
    )
    parser.add_argument("preset", metavar="PRESET", choices=PRESETS, help="as in experiments.train")
    parser.add_argument("--bandwidth", type=float, metavar="GB/s", help="between processes, in place of measuring it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    own, rest = parser.parse_known_args(args)
    try:
        found = plan(parse([own.preset, *rest]), own.bandwidth)
    except (ValueError, OSError) as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(2)
    show(found, Console())
    if own.json is not None:
        write_json(own.json, found)


if __name__ == "__main__":
    main()
