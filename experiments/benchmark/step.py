"""Training steps of whole models, optimizer included, beside PyG's and timm's own models.

The models of a row take turns in one process, and the fastest step of each counts: on a busy
machine minima vary least. The own model takes part twice. How far its two times are apart is what
a difference between others has to exceed.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from experiments.benchmark.measure import Measurement, kept_bytes, peak_bytes, take_turns
from experiments.benchmark.models import (
    ROWS,
    WARMUP,
    Times,
    Training,
    Variant,
    build_row,
    enough_repeats,
    least,
)
from experiments.train.results import write_json
from gmoe._checks import check_at_least, check_choice


@dataclass(frozen=True, kw_only=True)
class StepBenchmark(Measurement):
    """Whole models in training, optimizer included (Adam, fused): PyG's and timm's own, and ours
    in their place, on a plain edge_index and on a gmoe.Graph. Minima in turns, of CPU times;
    forward, backward and optimizer apart; memory at the peak, and what is kept for the backward
    pass. The first model of a row takes part twice: the noise."""

    rows: tuple[str, ...] = tuple(ROWS)
    """What is trained."""
    seconds: float = 3.0
    """Rows of quick models are repeated for so long."""
    threads: int = 1
    """CPU threads."""
    compiled: bool = False
    """Train each model under `torch.compile(model)` too, in turns with the eager first one."""

    def measured(self) -> dict[str, Any]:
        """By row and model what :func:`compare` finds."""
        check_at_least(0, seconds=self.seconds)
        for name in self.rows:
            check_choice("rows", name, ROWS)
        by_variant: dict[str, Any] = {}
        for name in tqdm(self.rows, desc="rows", disable=None):
            for variant, figures in self.of_row(name).items():
                by_variant[f"{name}, {variant}"] = figures
                tqdm.write(f"{name}, {variant}: {summary(figures)}", file=sys.stderr)
            if self.json is not None:  # all rows may take an hour
                write_json(self.json, self.content(by_variant))
        return by_variant

    def of_row(self, name: str) -> dict[str, dict[str, Any]]:
        """What is found of a row, by model."""
        device = torch.device(self.device)
        row = build_row(name, device)
        trainings = {variant: Training(made, device) for variant, made in row.items()}
        compare_all = partial(compare, repeats=self.repeats, seconds=self.seconds, device=device)
        by_variant = compare_all(trainings)
        own = next(iter(row))
        for variant in row if self.compiled else ():
            if variant == f"{own} again":
                continue
            # torch remembers by code object what it could not compile, and models of a row share
            # their code: each is compiled as if it were the only one.
            torch.compiler.reset()
            model: Any = torch.compile(copy.deepcopy(row[variant].model))
            compiled = Training(Variant(model, row[variant].loss), device)
            pair = compare_all({own: trainings[own], "compiled": compiled})
            by_variant[f"{variant}, compiled"] = pair["compiled"]
        return by_variant

    def content(self, variants: dict[str, Any]) -> dict[str, Any]:
        """The content of the file, with the load of the machine in the last minutes."""
        return super().content(variants) | {"load": os.getloadavg()}


def compare(
    trainings: Mapping[str, Training], repeats: int, seconds: float, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Let trainings take turns; say what each costs, and the ``ratio`` to the first of them.

    ``least`` are the minima of a step and its parts, ``wall`` and ``cpu`` times of a step,
    ``memory`` is the most that it holds at once, and ``kept`` what its forward pass leaves for
    the backward pass.
    """
    enough = enough_repeats(trainings.values(), repeats, seconds)
    by_variant = take_turns(trainings, enough, device, warmup=WARMUP)
    for name, training in trainings.items():
        figures = by_variant[name]
        parameters = training.model.parameters()
        for clock in ("wall", "cpu"):
            del figures[clock]["values"]  # of quick models hundreds
        figures["repeats"] = enough
        figures["least"] = least(training, enough)._asdict()
        figures["parameters"] = sum(parameter.numel() for parameter in parameters)
        figures["memory"] = peak_bytes(training, device)
        figures["kept"] = kept_bytes(training.forward, device)
    # The models of a row differ in what they compute: ratios say what a swap costs.
    base = by_variant[next(iter(trainings))]
    for figures in by_variant.values():
        of_parts = {part: figures["least"][part] / base["least"][part] for part in Times._fields}
        of_costs = {cost: figures[cost] / base[cost] for cost in ("parameters", "memory", "kept")}
        figures["ratio"] = of_parts | of_costs
    return by_variant


def summary(figures: Mapping[str, Any]) -> str:
    """What was found of a model, in a line."""
    milliseconds = 1000 * figures["least"]["step"]
    return f"{milliseconds:,.2f} ms, {figures['ratio']['step']:.2f} × the first"
