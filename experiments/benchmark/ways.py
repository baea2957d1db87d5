"""Ways to run a layer on a device, each compared with the plain way there or on the CPU."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel

Inputs = tuple[Tensor, ...]
Values = list[Tensor]
"""The output first, then gradients of the first input and of the parameters; on the CPU."""


class Autocast(nn.Module):
    """A model under autocast to bfloat16, as mixed precision runs it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        """The output of the model, in float32."""
        with torch.autocast(inputs[0].device.type, torch.bfloat16):
            y: Tensor = self.model(*inputs)
        return y.float()


def sharded(model: nn.Module) -> Any:
    """The model under FSDP2, in a group of one process."""
    device = next(model.parameters()).device
    return fully_shard(model, mesh=init_device_mesh(device.type, (1,)))


WAYS: dict[str, tuple[Callable[[nn.Module], Any], float]] = {
    "compiled": (torch.compile, 1e-4),
    "captured": (partial(torch.compile, mode="reduce-overhead"), 1e-4),
    "bf16": (Autocast, 0.1),
    "sharded": (sharded, 1e-4),
}
"""By name how a model on a device is wrapped, and how far it may be from the plain one.

``captured`` is by CUDA graphs, which other devices than CUDA do without."""


def on(device: torch.device, inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Copies on the device; floats in the dtype, and the first with a gradient."""
    values = [
        value.to(device, dtype if value.is_floating_point() else None, copy=True)
        for value in inputs
    ]
    values[0].requires_grad_()
    return tuple(values)


def run(
    model: nn.Module,
    inputs: Inputs,
    device: torch.device,
    dtype: torch.dtype,
    wrap: Callable[[nn.Module], Any] | None = None,
) -> Values:
    """Run a copy of the model on a device, forward and backward.

    Where it is wrapped, three times: code that is captured is replayed from the third run on.
    """
    model = copy.deepcopy(model).to(device, dtype)
    values = on(device, inputs, dtype)
    wrapped = model if wrap is None else wrap(model)
    for _ in range(1 if wrap is None else 3):
        values[0].grad = None
        wrapped.zero_grad()
        y = wrapped(*values)
        # The same numbers on all devices, and no two alike: a sum would hide much.
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y).to(device))
    found = [y, *(value.grad for value in (values[0], *model.parameters()))]
    return [_whole(value).detach().cpu() for value in found if value is not None]


def run_twice(model: nn.Module, inputs: Inputs, device: torch.device) -> Values:
    """The gradients of the squared gradient of the input, in float64, as forces are trained."""
    model = copy.deepcopy(model).to(device, torch.float64)
    values = on(device, inputs, torch.float64)
    with sdpa_kernel(SDPBackend.MATH):  # torch's fast attention has no second derivative
        y = model(*values)
        (slope,) = torch.autograd.grad(y.square().sum(), values[0], create_graph=True)
        slope.square().sum().backward()
    found = [slope, *(value.grad for value in (values[0], *model.parameters()))]
    return [value.detach().cpu() for value in found if value is not None]


def differences(values: Values, others: Values, tolerance: float) -> dict[str, Any]:
    """The largest differences of the first value and of the gradients, over the largest number."""
    scales = [
        float(values[0].abs().max()),
        max(float(value.abs().max()) for value in values[1:]),
    ]
    off = [float((a - b).abs().max()) for a, b in zip(values, others, strict=True)]
    figures = {"output": off[0] / scales[0], "gradients": max(off[1:]) / scales[1]}
    within = all(figure <= tolerance for figure in figures.values())
    return figures | {"within": within, "tolerance": tolerance}


def compared_ways(model: nn.Module, inputs: Inputs, device: torch.device) -> dict[str, Any]:
    """By way the differences from the plain way on the device; or the ``error`` of a way.

    ``twice`` are second gradients beside the CPU's.
    """
    by_way: dict[str, Any] = {}
    plain = run(model, inputs, device, torch.float32)
    for name, (wrap, tolerance) in WAYS.items():
        if name == "captured" and device.type != "cuda":
            continue
        torch.compiler.reset()
        try:
            with one_process():
                found = run(model, inputs, device, torch.float32, wrap)
            by_way[name] = differences(plain, found, tolerance)
        except Exception as error:  # of one way, on hardware that nobody has tried
            by_way[name] = {"error": f"{type(error).__name__}: {error}"}
    try:
        of_cpu = run_twice(model, inputs, torch.device("cpu"))
        found = run_twice(model, inputs, device)
        by_way["twice"] = differences(of_cpu, found, tolerance=1e-9)
    except Exception as error:
        by_way["twice"] = {"error": f"{type(error).__name__}: {error}"}
    return by_way


@contextmanager
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        meet = f"file://{Path(folder, 'meet')}"
        distributed.init_process_group(init_method=meet, rank=0, world_size=1)
        try:
            yield
        finally:
            distributed.destroy_process_group()


def _whole(value: Tensor) -> Tensor:
    """The value itself, of one that is sharded too."""
    gather = getattr(value, "full_tensor", None)
    return value if gather is None else gather()
