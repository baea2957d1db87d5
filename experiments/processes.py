"""Data parallel training: one process a device, which ``torchrun`` starts; every one runs the same program."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import Tensor

from experiments.config import RunConfig, check_world
from gmoe.distributed import world_size

T = TypeVar("T")

TIMEOUT = timedelta(hours=2)
"""So long processes wait for the first one, which evaluates whole graphs alone. One that ends is noticed at once."""


def make_fabric(config: RunConfig) -> Fabric:
    """Device, precision, and the connection to the other processes.

    Raises:
        ValueError: there is no such device, or not as many processes as the run has.
    """
    world = config.devices * config.nodes
    check_world(config, int(os.environ.get("WORLD_SIZE", "1")))
    on_gpu = torch.cuda.is_available() and config.device not in ("cpu", "mps")
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"  # numbers and objects go by the CPU
    try:
        fabric = Fabric(
            accelerator=config.device,
            devices=config.devices,
            num_nodes=config.nodes,
            strategy=DDPStrategy(timeout=TIMEOUT, process_group_backend=backend, gradient_as_bucket_view=True)
            if world > 1
            else "auto",
            precision=config.precision,
        )
    except (RuntimeError, ValueError, ImportError) as error:
        raise ValueError(f"device: got {config.device!r}, expected one that is there ({error})") from error
    if world > 1:
        logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # every process would say that it is there
        if not dist.is_initialized():
            atexit.register(_leave)
        fabric.launch()
    return fabric


def _leave() -> None:
    """Join gloo's threads, which end a process by SIGABRT where they are still there as it exits."""
    if dist.is_initialized():
        dist.destroy_process_group()


def from_first(fabric: Fabric, call: Callable[[], T]) -> T:
    """What ``call`` returns in the first process, which alone calls it."""
    found: Any = call() if fabric.is_global_zero else None
    return fabric.broadcast(found)


def of_all(value: Any) -> list[Any]:
    """The values of all processes, in the order of their numbers; every one has to call it."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def numbers_of_all(*numbers: int) -> list[tuple[int, ...]]:
    """Of each number those of all processes, in one collective; every one has to call it."""
    if world_size() == 1:
        return [(number,) for number in numbers]
    found = [torch.empty(len(numbers), dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(found, torch.tensor(numbers))
    return list(zip(*torch.stack(found).tolist(), strict=True))


@torch.no_grad()
def share(tensors: Iterable[Tensor]) -> None:
    """Give all processes the first one's values, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def lost_another(error: RuntimeError) -> bool:
    """Whether it says that another process has ended."""
    return isinstance(error, dist.DistError) or (world_size() > 1 and "gloo" in str(error).lower())
