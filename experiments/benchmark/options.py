"""What all benchmarks take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.table import Table
from torch import Tensor, nn

import gmoe
from experiments.timing import peak_bytes, take_turns


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Where and how long to measure."""

    keeps_json: ClassVar[bool] = False
    """Whether :meth:`run` writes the file of `json` itself."""

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

    def run(self) -> dict[str, Any]:
        """By variant, the figures of :func:`measure`."""
        raise NotImplementedError

    def table(self, found: dict[str, Any]) -> Table:
        """What :meth:`run` returned, to read."""
        table = Table(title="medians; × is the ratio to the reference variant's", title_justify="left")
        for column in ("", "wall (ms)", "min to max", "CPU (ms)", "MiB", "× wall", "× CPU", "× FLOPs", "× memory"):
            table.add_column(column, justify="right" if column else "left", no_wrap=True)
        for name, figures in found.items():
            wall, cpu, ratio = figures["wall"], figures["cpu"], figures["ratio"]
            table.add_row(
                name,
                f"{1000 * wall['median']:,.1f}",
                f"{1000 * wall['min']:,.0f} to {1000 * wall['max']:,.0f}",
                f"{1000 * cpu['median']:,.1f}",
                f"{figures['memory'] / 2**20:,.1f}",
                *("–" if ratio[kind] is None else f"{ratio[kind]:.3f}" for kind in ("wall", "cpu", "flops", "memory")),
            )
        return table

    def torch_device(self) -> torch.device:
        """The device.

        Raises:
            ValueError: there is none of that name.
        """
        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device: got {self.device!r}, expected one that torch finds here ({error})") from error
        return device


def measure(
    variants: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, reference: Callable[[str], str]
) -> dict[str, dict[str, Any]]:
    """What :func:`~experiments.timing.take_turns` finds, and what one run costs.

    Args:
        variants: what is timed, by name.
        repeats: timed runs of each variant.
        device: where the variants compute.
        reference: from the name of a variant to that of its reference.

    Returns:
        For each variant ``wall`` and ``cpu``; ``flops`` of one run; ``memory``, the most bytes that it holds at once
        beyond what was there before; and ``ratio``, each of these (of times the median) over the reference variant's.
    """
    found = take_turns(variants, repeats, device)
    for name, figures in found.items():
        figures["flops"] = gmoe.count_flops(variants[name])
        figures["memory"] = peak_bytes(variants[name], device)
    for name, figures in found.items():
        base = found[reference(name)]
        ratio = {kind: figures[kind]["median"] / base[kind]["median"] for kind in ("wall", "cpu")}
        figures["ratio"] = ratio | {kind: _over(figures[kind], base[kind]) for kind in ("flops", "memory")}
    return found


def _over(value: float, base: float) -> float | None:
    return value / base if base else None


def layer_step(layer: nn.Module, inputs: tuple[Any, ...], grad: Tensor, bf16: bool = False) -> Callable[[], None]:
    """Forward and backward of a layer, which leaves no gradients behind.

    Args:
        layer: what is called.
        inputs: the first of them gets a gradient too.
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
