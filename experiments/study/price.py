"""What the cells of a study would cost: hours and FLOPs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

import gmoe
from experiments.benchmark.measure import take_turns
from experiments.show.cells import read_prices
from experiments.show.tables import markdown
from experiments.train.build import build_model
from experiments.train.config import RunConfig
from experiments.train.data.load import load_tasks
from experiments.train.kinds import kind_of
from experiments.train.processes import make_fabric
from experiments.train.results import write_json
from experiments.train.training import set_up

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
            "core-hours": f"{one['hours']:.2g}",
            "MFLOPs": f"{one['flops'] / 1e6:,.1f}",
            "a second of a core": f"{one['per_second']:,.0f}",
        }
        for cell, one in prices.items()
    ]
    about = f"{hours:.1f} core-hours in all; reading the data comes on top"
    return f"{markdown(lines)}\n\n{about}"


def price(config: RunConfig) -> dict[str, float]:
    """What a cell costs on this machine.

    ``runs``, core-``hours`` of all with their validation, ``flops`` of a forward pass in training
    (of images, an image), and ``per_second`` rows that are trained on.
    """
    task = load_tasks(config)(config.seeds[0])
    fabric = make_fabric(config)
    torch.manual_seed(config.seeds[0])
    model = build_model(config, task)
    inputs = kind_of(config).example(task)
    images = kind_of(config).num_images(inputs)
    with torch.no_grad():
        flops = gmoe.count_flops(model, *inputs)
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
    }


def core_seconds(call: Callable[..., object], *args: Any, **kwargs: Any) -> float:
    """The median of some calls, in seconds of a core."""
    step = partial(call, *args, **kwargs)
    times = take_turns({"call": step}, STEPS, torch.device("cpu"), warmup=1)
    median: float = times["call"]["cpu"]["median"]
    return median
