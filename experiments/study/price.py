"""What the cells of a study would cost: hours, FLOPs, and the share of them that is routed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gmoe
from experiments.benchmark.measure import take_turns
from experiments.show.cells import read_prices
from experiments.show.tables import known, markdown
from experiments.train.build import build_model
from experiments.train.config import RunConfig
from experiments.train.data.load import load_tasks
from experiments.train.kinds import kind_of
from experiments.train.processes import make_fabric
from experiments.train.results import write_json
from experiments.train.training import set_up
from gmoe.moe import MoELayer

STEPS = 5
"""Timed calls; their median counts."""


def price_cells(cells: Mapping[str, RunConfig], folder: Path) -> str:
    """The prices of cells, which ``prices.json`` of a study's folder holds from then on.

    A few steps of each are trained, here and now. Prices of other cells stay.
    """
    prices = {cell: price(config) for cell, config in cells.items()}
    write_json(folder / "prices.json", read_prices(folder) | prices)
    return price_table(prices)


def price_table(prices: Mapping[str, Mapping[str, float]]) -> str:
    """A line a cell, and the hours of all."""
    hours = sum(one["hours"] for one in prices.values())
    lines = [
        {
            "cell": f"`{cell}`",
            "runs": str(one["runs"]),
            "core-hours": f"{one['hours']:.2f}",
            "MFLOPs": f"{one['flops'] / 1e6:,.1f}",
            "routed, of FLOPs": _share(one["routed_flops"]),
            "routed, of seconds": _share(one["routed_seconds"]),
            "a second of a core": f"{one['per_second']:,.0f}",
        }
        for cell, one in prices.items()
    ]
    about = f"{hours:.1f} core-hours in all; reading the data comes on top"
    return f"{markdown(known(lines))}\n\n{about}"


def _share(value: float) -> str:
    return f"{value:.0%}" if value else "–"


def price(config: RunConfig) -> dict[str, float]:
    """What a cell costs on this machine.

    ``runs``, core-``hours`` of all with their validation, ``flops`` of a forward pass in training
    (of images, an image), ``per_second`` rows that are trained on, and the share of
    ``routed_flops`` and of ``routed_seconds`` in a forward pass: routers and routed experts, no
    shared ones.
    """
    task = load_tasks(config)(config.seeds[0])
    fabric = make_fabric(config)
    torch.manual_seed(config.seeds[0])
    model = build_model(config, task)
    inputs = kind_of(config).example(task)
    images = kind_of(config).num_images(inputs)
    with torch.no_grad():
        flops, routed_flops = routed_part(model, inputs, gmoe.count_flops)
        seconds, routed_seconds = routed_part(model, inputs, core_seconds)
    with set_up(fabric, model, config, task) as training:
        batch = fabric.to_device(next(iter(training.batches("train", 0))))
        each = core_seconds(training.update, batch, len(batch.target))
        begin = time.process_time()
        training.evaluate("val")
        of_validation = time.process_time() - begin
    steps = config.epochs * task.steps(config.step_size)
    seconds = steps * each + config.epochs / config.eval_every * of_validation
    return {
        "runs": len(config.seeds),
        "hours": len(config.seeds) * seconds / 3600,
        "flops": flops / (images or 1),
        "per_second": len(batch.target) / each,
        "routed_flops": routed_flops / flops,
        "routed_seconds": routed_seconds / seconds,
    }


def routed_part(
    model: nn.Module, inputs: tuple[Any, ...], measure: Callable[..., float]
) -> tuple[float, float]:
    """What ``measure(call, *inputs)`` says of the model, and of its routers and routed experts."""
    calls: list[tuple[int, Any, Any, Any]] = []
    hooks = []

    def watch(module: nn.Module, sign: int) -> None:
        def note(module: nn.Module, args: Any, kwargs: Any, _: Any) -> None:
            calls.append((sign, module, args, kwargs))

        # Behind the call, where its arguments hold a routing that others give to it
        hooks.append(module.register_forward_hook(note, with_kwargs=True))

    for layer in model.modules():
        if isinstance(layer, MoELayer):
            watch(layer, 1)
            if isinstance(layer.shared_expert, nn.Module):
                watch(layer.shared_expert, -1)
    model(*inputs)
    for hook in hooks:
        hook.remove()
    routed = sum(sign * measure(call, *args, **kwargs) for sign, call, args, kwargs in calls)
    return measure(model, *inputs), routed


def core_seconds(call: Callable[..., object], *args: Any, **kwargs: Any) -> float:
    """The median of some calls, in seconds of a core."""
    step = partial(call, *args, **kwargs)
    times = take_turns({"call": step}, STEPS, torch.device("cpu"), warmup=1)
    median: float = times["call"]["cpu"]["median"]
    return median
