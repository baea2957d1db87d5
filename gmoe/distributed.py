"""Sums over the processes of ``torch.distributed``, for statistics of the global batch.

Under data parallelism every process sees a part of the batch. Loads, balance losses and running
means of routers follow from sums over tokens. Summed over processes, these give what one process
with the whole batch would compute.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """The number of processes: 1 if ``torch.distributed`` was not initialized."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size(group)
    return 1


def world_sum(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum of ``x`` over the processes; every process has to call it.

    Its gradient is that of the local term times the number of processes.
    ``DistributedDataParallel`` averages gradients over processes, which turns this into the
    gradient of the sum.

    Args:
        x: of the same shape everywhere.
        group: of the processes (default: all).
    """
    size = world_size(group)
    if size == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total, group=group)
    if not x.requires_grad:
        return total
    return total + size * (x - x.detach())  # adds zero, with the gradient
