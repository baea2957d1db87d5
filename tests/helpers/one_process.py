"""A group of one process, in which modules are sharded or trained in parallel."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist


@contextmanager
def one_process(folder: Path) -> Iterator[None]:
    """Let this process be a group of its own; it finds itself by a file in the folder."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
    try:
        yield
    finally:
        # A DDP that outlives its group frees it under the GIL, for which the group's own thread may
        # be waiting.
        gc.collect()
        dist.destroy_process_group()
