"""What training a preset takes, before it begins: ``python -m experiments.plan PRESET [options]``.

    python -m experiments.plan cifar10 --data-root DIR --devices 2 --json plan.json

Trains one process's share of the batches for half a minute, by the loop of ``python -m experiments.train``; of several
processes it measures the network too. Then it says what memory a process needs, how many bytes are moved, and how long
an epoch takes. A whole graph is evaluated as a whole, however long that is.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
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
"""Steps that do not count."""
GIGABYTES = 1.0
"""A second between processes, where that is neither measured nor given: about 10 Gbit Ethernet."""


class EnoughError(Exception):
    """The calibration is over."""


class Share:
    """The loader of the first of ``world`` processes, which notes what time and memory the use of its batches takes."""

    def __init__(self, task: Task, world: int, device: torch.device) -> None:
        self.task, self.world, self.device = task, world, device
        self.laps: dict[Split, list[tuple[float, int, int]]] = {"train": [], "val": []}  # seconds, targets, bytes
        self.began, self.ended = list[float](), list[float]()  # passes over training batches
        self.preparing = self.before = self.stepping = 0  # bytes: peak before the first pass, in use, peak of the pass

    def __call__(self, split: Split, batch_size: int, seed: int | None, shard: Any = None) -> Iterable[Batch]:
        if shard is None:  # to prepare, and whole graphs, which are not shared out
            return self.task.loader(split, batch_size, seed)
        return self._watched(split, self.task.loader(split, batch_size, seed, (0, self.world)))

    def _watched(self, split: Split, batches: Iterable[Batch]) -> Iterator[Batch]:
        began = lap = time.perf_counter()
        if split == "train":
            if not self.began:
                self.preparing, self.before = peak(self.device), in_use(self.device)
            self.began.append(began)
            if began - self.began[0] > SECONDS:
                raise EnoughError
        for number, batch in enumerate(batches, 1):
            yield batch  # and here it is used
            now = time.perf_counter()
            self.laps[split].append((now - lap, len(batch.target), nbytes([batch.inputs, batch.target])))
            lap = now
            if number > WARM and now - began > SECONDS / 4:
                break
        if split == "train":
            self.ended.append(lap)
            self.stepping = self.stepping or peak(self.device)


def nbytes(tree: Any) -> int:
    """Of all tensors in it."""
    found = 0
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            sparse = leaf.is_sparse_csr
            found += nbytes([leaf.crow_indices(), leaf.col_indices(), leaf.values()]) if sparse else leaf.nbytes
    return found


def peak(device: torch.device) -> int:
    """See :func:`experiments.loop.peak_memory`; in bytes."""
    return int(peak_memory(device) * 2**20)


def in_use(device: torch.device) -> int:
    """Memory in use now, in bytes; the peak counts from here."""
    restart_peak_memory(device)
    return peak(device)


@contextmanager
def router_sums() -> Iterator[list[int]]:
    """Bytes of each sum for which routers in training ask all processes."""
    summed, found = Router.summed, list[int]()

    def counting(router: Router, *parts: Tensor) -> Sequence[Tensor]:
        if router.training and torch.is_grad_enabled():
            found.append(nbytes(parts))
        return summed(router, *parts)

    with patch.object(Router, "summed", counting):
        yield found


def time_sums(rank: int, world: int, size: int, folder: str) -> None:
    """One of several gloo processes: write the seconds of an all-reduce of ``size`` bytes, and of one of a few."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    laps: list[list[float]] = [[], []]
    for _ in range(WARM + 5):
        for found, value in zip(laps, (torch.zeros(size // 4), torch.zeros(16)), strict=True):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(value)
            found.append(time.perf_counter() - began)
    if rank == 0:
        Path(folder, "sums.json").write_text(json.dumps([median(found[WARM:]) for found in laps]))
    dist.destroy_process_group()


def plan(config: RunConfig, bandwidth: float | None = None) -> dict[str, Any]:
    """Calibrate, and return the figures as JSON, in bytes and seconds; nothing moved is hidden behind a backward pass.

    Args:
        config: of the run, with as many processes as it is to have.
        bandwidth: GB/s between processes; by default measured, where each has a core of this machine, else
            :data:`GIGABYTES`.

    Raises:
        ValueError: what cannot be run, as in training.
    """
    if bandwidth is not None and not bandwidth > 0:
        raise ValueError(f"bandwidth: got {bandwidth}, expected GB/s, a number above 0")
    world = config.devices * config.nodes
    if world > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # as torchrun has it
    alone = replace(config, devices=1, nodes=1, epochs=10**6, eval_every=1)  # ends when the time is over
    device, seed = make_fabric(alone).device, config.seeds[0]
    imported = in_use(device)
    task = load_tasks(config)(seed)
    loading, data = peak(device), in_use(device) - imported
    share = Share(task, world, device)
    own = replace(task, loader=share)
    prepared = prepare(alone, own, seed)
    local = config.nodes == 1 < world <= (os.cpu_count() or 1) and device.type == "cpu" and bandwidth is None
    with TemporaryDirectory() as folder:
        with router_sums() as sums, set_up(prepared.fabric, prepared.model, alone, own) as trained:
            with suppress(EnoughError):
                fit(trained, seed, Path(folder, "seed"), Progress(1, shown=False))
            training, states = peak(device), nbytes(trained.optimizer.state_dict())
            routed = nbytes([list(vars(routing).values()) for routing in trained.routings])
        parameters, buffers = nbytes(list(trained.model.parameters())), nbytes(list(trained.model.buffers()))
        gradients = nbytes([parameter for parameter in trained.model.parameters() if parameter.requires_grad])
        if local:
            spawn(time_sums, (world, gradients, folder), nprocs=world)
            large, small = json.loads(Path(folder, "sums.json").read_text())
    laps, _, sizes = zip(*share.laps["train"], strict=True)
    steps, step = task.steps(config.batch_size), fmean(laps[min(WARM, len(laps) - 1) :])

    around = 2 * (world - 1) / world  # a sum goes around the ring of processes twice
    moved = {"gradients": round(around * gradients), "routers": round(around * sum(sums) / len(laps))}
    moved |= {"buffers": buffers if world > 1 else 0}
    if local:  # beside gradients and routers' parts, the counts of targets and the signals are summed
        network, reduce = "measured, gloo", large + (len(sums) // len(laps) + 2) * small
    else:
        given = bandwidth or GIGABYTES
        network, reduce = f"assumed, {given:g} GB/s" if world > 1 else "none", sum(moved.values()) / given / 1e9

    between = [later - ended for ended, later in zip(share.ended, share.began[1:], strict=True)]
    evaluation = fmean(between[1:] or between)  # and what is written; the first time is slow
    kept = 0  # of the test set's routings, which are kept, what the last call did not give
    if share.laps["val"]:
        assert task.split is not None
        spent, rows, _ = zip(*share.laps["val"], strict=True)
        left = len(task.split["val"]) / world - sum(rows) / len(between)  # of a pass that was cut off
        evaluation += max(left, 0.0) * sum(spent) / sum(rows)
        kept = round(routed * max(len(task.split["test"]) / max(rows[-1], 1) - 1, 0.0))
    seconds = {"step": step, "all_reduce": reduce, "evaluation": evaluation / config.eval_every}

    buckets = gradients if world > 1 else 0  # to which DDP copies gradients
    top = max(loading, share.preparing, training + kept) + buckets
    memory = {
        "libraries": share.before - data - parameters,
        "data": data,
        "parameters": parameters,
        "gradients": gradients + buckets,
        "optimizer": states,
        "activations": max(share.stepping - share.before - gradients - states, 0),
    }
    moved["batch"] = round(fmean(sizes))
    return {
        "config": config.science(),
        "processes": world,
        "device": device.type,
        "steps": steps,
        "memory": memory | {"evaluation": top - sum(memory.values()), "peak": top},
        "bytes": {"step": moved, "epoch": {name: steps * value for name, value in moved.items()}},
        "seconds": seconds | {"epoch": steps * (step + reduce) + seconds["evaluation"]},
        "network": network,
        "calibration": {"steps": len(laps), "seconds": share.began[-1] - share.began[0]},
        "environment": environment(),
    }


def show(found: dict[str, Any], console: Console) -> None:
    """Print it as a table."""
    steps, world, size = found["steps"], found["processes"], found["config"]["batch_size"]
    table = Table("", "step", "epoch", title=f"{found['config']['dataset']}: {steps:,} steps of {size:,} / {world}")
    for name, value in found["memory"].items():
        table.add_row(f"{name}, MiB a process", f"{value / 2**20:,.1f}")
    for name, value in found["bytes"]["step"].items():
        table.add_row(f"{name}, MB a process", f"{value / 1e6:,.3f}", f"{steps * value / 1e6:,.1f}")
    for name, value in found["seconds"].items():
        each = name in ("step", "all_reduce")
        table.add_row(f"{name}, s", f"{value:,.4f}" if each else "", f"{value * (steps if each else 1):,.3f}")
    console.print(table)
    count, threads = found["calibration"]["steps"], found["environment"]["threads"]
    console.print(f"from {count:,} steps on {found['device']}, {threads} threads; network: {found['network']}")


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
