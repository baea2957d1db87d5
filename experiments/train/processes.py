"""The processes of a run: how they find each other, and what they share."""

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

from experiments.train.config import RunConfig
from gmoe.distributed import world_size

T = TypeVar("T")
TIMEOUT = timedelta(hours=2)
"""So long processes wait for the first one, which evaluates whole graphs alone. One that ends
is noticed at once."""


def make_fabric(config: RunConfig) -> Fabric:
    """Device, precision, and the connection to other processes, which ``torchrun`` starts."""
    there = int(os.environ.get("WORLD_SIZE", "1"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", config.devices))  # on this machine
    if config.devices != there:
        raise ValueError(
            f"devices: got {config.devices} in {there} process{'es' if there > 1 else ''}, "
            f"expected {config.launcher} -m experiments.train ..., with --devices N of all machines"
        )
    on_gpu = torch.cuda.is_available() and config.device not in ("cpu", "mps")
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"  # numbers and objects go by the CPU
    ddp = DDPStrategy(timeout=TIMEOUT, process_group_backend=backend, gradient_as_bucket_view=True)
    try:
        fabric = Fabric(
            accelerator=config.device,
            devices=here,
            num_nodes=config.devices // here,
            strategy=ddp if there > 1 else "auto",
            precision=config.precision,
        )
    except (RuntimeError, ValueError, ImportError) as error:
        raise ValueError(
            f"device: got {config.device!r}, expected one that is there ({error})"
        ) from error
    joins = there > 1 and not dist.is_initialized()
    if joins:
        # Every process would say that it is there
        logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    fabric.launch()
    # And leaves: gloo's threads end a process by SIGABRT where they are still there as it exits
    if joins:
        atexit.register(dist.destroy_process_group)
    return fabric


def from_first(fabric: Fabric, call: Callable[[], T]) -> T:
    """What ``call`` returns in the first process, which alone calls it."""
    value: Any = call() if fabric.is_global_zero else None
    return fabric.broadcast(value)


def of_all(value: Any) -> list[Any]:
    """The values of all processes, in the order of their numbers; every one has to call it."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


@torch.no_grad()
def share(tensors: Iterable[Tensor]) -> None:
    """Give all processes the first one's values, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def lost_another(error: RuntimeError) -> bool:
    """Whether it says that another process has ended."""
    return isinstance(error, dist.DistError) or (world_size() > 1 and "gloo" in str(error).lower())
