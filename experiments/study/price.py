"""What the cells of a study would cost: hours and FLOPs."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

import gmoe
from experiments.benchmark.measure import peak_bytes, take_turns
from experiments.show.cells import read_prices
from experiments.show.tables import markdown
from experiments.study.running import tried
from experiments.train.build import build_model
from experiments.train.command_line import SPARSE
from experiments.train.config import RunConfig
from experiments.train.kinds import kind_of
from experiments.train.processes import make_fabric
from experiments.train.results import write_json
from experiments.train.training import Training, set_up

STEPS = 5
"""Timed calls; their median counts."""


def price_cells(cells: Mapping[str, RunConfig], folder: Path) -> tuple[str, dict[str, str]]:
    """The prices of cells, and by cell why it has none.

    A few steps of each are trained, here and now. Behind each, ``prices.json`` of a study's folder
    holds its price. Those of other cells stay.
    """
    prices = dict[str, dict[str, float]]()

    def price_cell(cell: str, config: RunConfig) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", SPARSE)
            prices[cell] = price(config)
        write_json(folder / "prices.json", read_prices(folder) | prices)

    failed = tried(cells, price_cell)
    return price_table(prices) if prices else "No cell has a price.", failed


def price_table(prices: Mapping[str, Mapping[str, float]]) -> str:
    """A line a cell, and the hours of all."""
    hours = sum(one["hours"] for one in prices.values())
    lines = [
        {
            "cell": f"`{cell}`",
            "runs": str(one["runs"]),
            "core-hours": f"{one['hours']:.2g}",
            "MFLOPs": f"{one['flops'] / 1e6:,.1f}",
            "seconds a step": f"{one['step']:.2g}",
        }
        for cell, one in prices.items()
    ]
    about = f"{hours:.1f} core-hours in all; reading the data comes on top"
    return f"{markdown(lines)}\n\n{about}"


def price(config: RunConfig) -> dict[str, float]:
    """What a cell costs on this machine.

    ``runs``, core-``hours`` of all with their validation, ``flops`` of a forward pass in training
    (of images, an image), seconds of a core that a training ``step`` takes and ``inference``, a
    forward pass without gradients, and the bytes of ``memory`` that training holds.
    """
    task = kind_of(config).tasks()(config.seeds[0])
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
        memory = memory_of(training, partial(training.update, batch, len(batch.target)))
        begin = time.process_time()
        training.evaluate("val")
        of_validation = time.process_time() - begin
        with torch.no_grad():  # the model was left in evaluation
            inference = core_seconds(training.forward, batch.inputs)
    steps = config.epochs * task.steps(config.step_size)
    seconds = steps * each + config.epochs / config.eval_every * of_validation
    return {
        "runs": len(config.seeds),
        "hours": len(config.seeds) * seconds / 3600,
        "flops": flops / (images or 1),
        "step": each,
        "inference": inference,
        "memory": memory,
    }


def memory_of(training: Training, step: Callable[[], object]) -> int:
    """Bytes of weights and the optimizer's state, and the most that a step holds beside them."""
    states = training.optimizer.state.values()
    held = [*training.model.parameters(), *training.model.buffers()]
    held += [value for state in states for value in state.values()]
    return sum(value.nbytes for value in held) + peak_bytes(step, torch.device("cpu"))


def core_seconds(call: Callable[..., object], *args: Any, **kwargs: Any) -> float:
    """The median of some calls, in seconds of a core."""
    step = partial(call, *args, **kwargs)
    times = take_turns({"call": step}, STEPS, torch.device("cpu"), warmup=1)
    median: float = times["call"]["cpu"]["median"]
    return median
