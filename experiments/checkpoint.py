"""What holds a run together: its processes, the signals that stop it, and its checkpoint."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from safetensors.torch import save_file
from torch import Tensor

from experiments.config import RunConfig
from gmoe.distributed import world_size

T = TypeVar("T")

TIMEOUT = timedelta(hours=2)
"""So long processes wait for the first one, which evaluates whole graphs alone. One that ends is noticed at once."""
SECONDS = 60.0
"""At most so much training is lost where a process is killed."""


def make_fabric(config: RunConfig) -> Fabric:
    """Device, precision, and the connection to the other processes, which ``torchrun`` has started."""
    there = int(os.environ.get("WORLD_SIZE", "1"))
    if config.world != there:
        raise ValueError(
            f"devices: got {config.devices} x {config.nodes} nodes in {there} process{'es' if there > 1 else ''}, "
            f"expected {config.launcher} -m experiments.train ..., with --devices N --nodes M as they are"
        )
    on_gpu = torch.cuda.is_available() and config.device not in ("cpu", "mps")
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"  # numbers and objects go by the CPU
    ddp = DDPStrategy(timeout=TIMEOUT, process_group_backend=backend, gradient_as_bucket_view=True)
    try:
        fabric = Fabric(
            accelerator=config.device,
            devices=config.devices,
            num_nodes=config.nodes,
            strategy=ddp if there > 1 else "auto",
            precision=config.precision,
        )
    except (RuntimeError, ValueError, ImportError) as error:
        raise ValueError(f"device: got {config.device!r}, expected one that is there ({error})") from error
    if there > 1 and not dist.is_initialized():
        logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # every process would say that it is there
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


class InterruptedRunError(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived in training; what was trained is on disk."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Checkpoint:
    """What ``state`` gives, on disk, replaced in one step; its ``"best"`` weights also in safetensors.

    The first process writes, all read, and all have to call every method. Several machines need the same folder.
    """

    def __init__(self, fabric: Fabric, folder: Path, state: Callable[[], dict[str, Any]]) -> None:
        self.fabric, self.folder, self.state = fabric, folder, state
        self.signal: int | None = None
        self._last = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The state, or ``None`` where there is none."""
        path = self.folder / "state.ckpt"
        if not from_first(self.fabric, path.exists):
            return None
        try:
            return self.fabric.load(path, weights_only=True)
        except Exception as error:  # torch raises what pickle, zip and its own reader raise
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise ValueError(f"{path}: cannot be read ({reason}); delete it to begin this seed anew") from error

    def save(self) -> None:
        """Write the state to a new file that then takes the old one's place."""
        state = self.state()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.fabric.save(self.folder / "state.new", state)
        if self.fabric.is_global_zero:
            save_file({name: value.contiguous() for name, value in state["best"].items()}, self.folder / "best.new")
            (self.folder / "state.new").replace(self.folder / "state.ckpt")
            (self.folder / "best.new").replace(self.folder / "best.safetensors")
        self.fabric.barrier()  # or a process might be ended by another that has ended, before it has written
        self._last = time.monotonic()

    def tick(self, rows: int = 0) -> int:
        """Call it where the state is whole: saves what is older than a minute, or if a signal arrived, which it raises.

        Returns the sum over processes of ``rows``, of the next batch: another collective would be one more to wait for.
        """
        is_due = time.monotonic() - self._last > SECONDS
        signals, due, counts = numbers_of_all(self.signal or 0, is_due, rows)
        if any(signals) or any(due):
            self.save()
        if any(signals):
            raise InterruptedRunError(max(signals))
        return sum(counts)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """SIGINT and SIGTERM wait for the next :meth:`tick`; the second of them does not."""
        if threading.current_thread() is not threading.main_thread():  # which alone gets signals
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def note(number: int, _: Any) -> None:
            self.signal = number
            restore()

        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            restore()
