"""What anybody with a CUDA device can find out by one command, in one file to send back.

Are results those of the CPU, in every way in which people run layers; does a training step of a
layer wait for the device; how long does a step of a whole model take beside PyG's and timm's?

It was written without such a device: nothing in this project was ever run on one by its authors.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch._C._autograd import DeviceType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm

from experiments.benchmark.measure import Measurement, Step, wait_for
from experiments.benchmark.models import ROWS as MODELS
from experiments.benchmark.models import power_law_graph
from experiments.benchmark.step import StepBenchmark
from experiments.benchmark.step import summary as step_summary
from experiments.benchmark.tables import said_of
from gmoe import GNNMoE, MLPExperts, MoE, MoEConv, SoftMoE, SoftSlots
from gmoe._checks import check, check_choice
from gmoe.routers import build_router

WAITS = frozenset(
    prefix + name
    for prefix in ("cuda", "hip")
    for name in ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize", "Memcpy")
)
"""Calls of the driver in which the host waits for the device."""

STEP = "training step"
"""Name of what is profiled."""

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest difference from the CPU, over the largest number there."""

SIZES = {"nodes": 300, "tokens": 256, "images": 4}
"""Of inputs: the CPU computes results, too."""

NODE = 128
"""Width of a node."""

TOKEN = 192
"""Width of a token, whose MLPs are four times as wide inside."""

HEADS = 4
"""Of convs with attention, whose heads share the width."""

CLASSES = 10
"""Of models."""


class Inputs(NamedTuple):
    """Random inputs on the CPU, by what a layer takes."""

    graph: tuple[Tensor, Tensor]
    tokens: tuple[Tensor]
    images: tuple[Tensor]


class Row(NamedTuple):
    """A layer or a model with experts, and which inputs it takes."""

    takes: Literal["graph", "tokens", "images"]
    build: Callable[[], nn.Module]


def conv_row(conv: str | list[str]) -> Row:
    """A layer of message passing."""
    if conv in ("gat", "gatv2", "transformer"):
        return Row("graph", partial(MoEConv, conv, NODE, NODE // HEADS, heads=HEADS))
    return Row("graph", partial(MoEConv, conv, NODE, NODE))


def mlp_row(router: str, **options: Any) -> Row:
    """MLP experts under a router."""

    def build() -> nn.Module:
        experts = MLPExperts(TOKEN, 4 * TOKEN, TOKEN, num_experts=8)
        if router == "soft_slots":
            return SoftMoE(SoftSlots(TOKEN, num_experts=8, slots=8), experts)
        return MoE(build_router(router, TOKEN, num_experts=8, k=1, kwargs=options), experts)

    return Row("tokens", build)


def vit_row() -> Row:
    """A ViT of CIFAR's size."""
    from gmoe.models.vit import ViTMoE

    return Row("images", partial(ViTMoE, 32))


CONVS = ("gcn", "sage", "graph", "gin", "gat", "gatv2", "transformer")
ROUTERS = (
    "token_choice",
    "expert_choice",
    "attention_vote",
    "multi_centroid",
    "random",
    "uniform",
    "soft_slots",
)

ROWS: dict[str, Callable[[], Row]] = {
    **{name: partial(conv_row, name) for name in CONVS},
    "mixed": partial(conv_row, ["gcn", "sage", "gin", "graph"]),
    **{name: partial(mlp_row, name) for name in ROUTERS},
    "capacity": partial(mlp_row, "token_choice", capacity_factor=1.0),
    "gnn": partial(Row, "graph", partial(GNNMoE, NODE, NODE, CLASSES, 3)),
    "vit": vit_row,
}
"""What is compared with the CPU: convs, MLPs under each router, and two models."""


@dataclass(frozen=True, kw_only=True)
class GpuBenchmark(Measurement):
    """Layers on a CUDA device: equal to the CPU (float64, float32, second gradients) and to
    themselves (compiled, captured, bfloat16, FSDP2), and waits of a training step as the profiler
    counts them; then training steps of whole models beside PyG's and timm's, as `benchmark step`
    times them. Send the file of `--json` back to us. `--device cpu` is a dry run."""

    device: Literal["cpu", "cuda", "mps"] = "cuda"
    """Device."""
    rows: tuple[str, ...] = (*ROWS, *MODELS)
    """Convs, routers and models; then the rows of `benchmark step`."""

    def measured(self) -> dict[str, Any]:
        """By row what :func:`checked` finds, or by model what a step takes. A row that fails has
        an ``error`` in its place, and the others go on."""
        for name in self.rows:
            check_choice("rows", name, (*ROWS, *MODELS))
        there = self.device != "cuda" or torch.cuda.is_available()
        legal = "a machine that has one, or --device cpu (a dry run)"
        check(there, "device", "'cuda' without such a device", legal)
        by_variant: dict[str, Any] = {}
        for name in tqdm(self.rows, desc="rows", disable=None):
            found = tried(partial(self.of_row, name))
            found = {name: found} if "error" in found else found
            for variant, figures in found.items():
                tqdm.write(f"{variant}: {summary(figures)}", file=sys.stderr)
            by_variant |= found
        return by_variant

    def of_row(self, name: str) -> dict[str, dict[str, Any]]:
        """What is found of a row, by variant."""
        if name in ROWS:
            return {name: checked(ROWS[name](), torch.device(self.device))}
        steps = StepBenchmark(device=self.device, repeats=self.repeats, seconds=0)
        return {f"{name}, {model}": found for model, found in steps.of_row(name).items()}


def checked(row: Row, device: torch.device) -> dict[str, Any]:
    """``equal`` to the CPU by dtype, ``ways`` to run it, and by precision the ``waits`` of a
    training step by the name of the call, and the ``places`` in the code where torch saw them."""
    # In evaluation, where routers draw no noise: generators differ by device.
    model = opened(row.build()).eval()
    inputs = getattr(inputs_of(**SIZES), row.takes)
    found: dict[str, Any] = {
        "equal": compared(model, inputs, device),
        "ways": compared_ways(model, inputs, device),
        "waits": {},
        "places": {},
    }
    trained = opened(row.build()).to(device)
    given = on(device, inputs, torch.float32)
    for precision in ("fp32", "bf16"):
        step = training_step(trained, given, bf16=precision == "bf16")
        step()  # the first step makes what later ones keep
        found["waits"][precision] = waits_of(step, device)
        found["places"][precision] = places_of_waits(step, device)
    return found


def inputs_of(nodes: int, tokens: int, images: int) -> Inputs:
    """Random inputs of these sizes."""
    graph = (torch.randn(nodes, NODE), power_law_graph(nodes, 5 * nodes))
    return Inputs(graph, (torch.randn(tokens, TOKEN),), (torch.randn(images, 3, 32, 32),))


@torch.no_grad()
def opened(model: nn.Module) -> nn.Module:
    """Let routed experts that start at zero count in the output."""
    for part in model.modules():
        if isinstance(gain := getattr(part, "gain", None), nn.Parameter):
            gain.fill_(0.5)
    heads = getattr(model, "heads", None)  # of a ViT, which starts at zero too
    if isinstance(heads, nn.Module):
        for parameter in heads.parameters():
            nn.init.normal_(parameter, std=0.1)
    return model


def compared(model: nn.Module, inputs: tuple[Tensor, ...], device: torch.device) -> dict[str, Any]:
    """By dtype the largest differences of outputs and gradients from the CPU's, and whether they
    are within bounds."""
    by_dtype: dict[str, Any] = {}
    for dtype, tolerance in TOLERANCES.items():
        outputs = run(model, inputs, torch.device("cpu"), dtype)
        # By default torch rounds the inputs of convolutions on a GPU, as of a ViT's patches, to
        # ten bits.
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            others = run(model, inputs, device, dtype)
        by_dtype[str(dtype).removeprefix("torch.")] = differences(outputs, others, tolerance)
    return by_dtype


def training_step(layer: nn.Module, inputs: tuple[Any, ...], bf16: bool) -> Step:
    """Forward and backward, with bfloat16 autocast if asked for; it leaves no gradients behind."""

    def step() -> None:
        with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=bf16):
            y = layer(*inputs)
        y.backward(torch.ones_like(y))
        layer.zero_grad()
        inputs[0].grad = None

    return step


def waits_of(step: Step, device: torch.device) -> dict[str, int]:
    """How often the step, which ran before, calls what waits for the device; by name."""
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device.type == "cuda")]
    wait_for(device)
    with profile(activities=activities) as profiled, record_function(STEP):
        step()
    events = profiled.events() or []
    # Not what comes after the step, where the profiler itself waits; of its two spans that of
    # the host.
    spans = [
        event for event in events if event.name == STEP and event.device_type == DeviceType.CPU
    ]
    span = spans[0].time_range
    inside = [event for event in events if span.start <= event.time_range.start < span.end]
    return dict(Counter(event.name for event in inside if event.name in WAITS))


def places_of_waits(step: Step, device: torch.device) -> list[str]:
    """The lines of Python from which torch says that it waits.

    It does not say so of all waits.
    """
    if device.type != "cuda":
        return []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [
        warning for warning in caught if "synchronizing CUDA operation" in str(warning.message)
    ]
    return sorted({f"{Path(wait.filename).name}:{wait.lineno}" for wait in waits})


def summary(figures: dict[str, Any]) -> str:
    """One line of a row, as it is found."""
    if "error" in figures:
        return str(figures["error"]).partition("\n")[0]
    if "least" in figures:
        return step_summary(figures)
    waits = sum(sum(of.values()) for of in figures["waits"].values())
    compared = figures["equal"] | figures["ways"]
    return ", ".join(
        [f"{waits} waits", *(f"{name} {said_of(of)}" for name, of in compared.items())]
    )


# ways to run a layer, each compared with the plain way there or on the CPU ------------------------

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


def on(device: torch.device, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Copies on the device; floats in the dtype, and the first with a gradient."""
    values = [
        value.to(device, dtype if value.is_floating_point() else None, copy=True)
        for value in inputs
    ]
    values[0].requires_grad_()
    return tuple(values)


def run(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
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
        # The same numbers on all devices, and no two alike: a sum would hide much. All of one
        # sign: where they cancel in a gradient, bfloat16 leaves its rounding alone.
        y.backward(torch.linspace(0, 1, y.numel(), dtype=dtype).view_as(y).to(device))
    found = [y, *(value.grad for value in (values[0], *model.parameters()))]
    return [_whole(value).detach().cpu() for value in found if value is not None]


def run_twice(model: nn.Module, inputs: tuple[Tensor, ...], device: torch.device) -> Values:
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


def compared_ways(
    model: nn.Module, inputs: tuple[Tensor, ...], device: torch.device
) -> dict[str, Any]:
    """By way the differences from the plain way on the device; or the ``error`` of a way.

    ``twice`` are second gradients beside the CPU's.
    """
    plain = run(model, inputs, device, torch.float32)

    def wrapped(wrap: Callable[[nn.Module], Any], tolerance: float) -> dict[str, Any]:
        torch.compiler.reset()
        with one_process():
            return differences(plain, run(model, inputs, device, torch.float32, wrap), tolerance)

    def twice() -> dict[str, Any]:
        values, others = (run_twice(model, inputs, one) for one in (torch.device("cpu"), device))
        return differences(values, others, tolerance=1e-9)

    ways = [name for name in WAYS if name != "captured" or device.type == "cuda"]
    return {name: tried(partial(wrapped, *WAYS[name])) for name in ways} | {"twice": tried(twice)}


def tried(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is found, or the ``error``: on hardware that nobody has tried, others go on."""
    try:
        return call()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


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
