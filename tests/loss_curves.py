"""Loss curves of seven short trainings, which a change that computes the same leaves alone.

Each is twenty steps of a preset on data that ships with the dependencies, in float64 on one thread;
dropout, noise and balance are those of the preset. ``tests/loss_curves.json`` holds the curves, and
``tests/test_loss_curves.py`` compares. After a change that is meant to alter what is computed,
write them anew by ``python -m tests.loss_curves``, and say why in the commit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from experiments.train.build import build_model
from experiments.train.config import RunConfig
from experiments.train.data.task import Batch, Task
from experiments.train.kinds import kind_of
from experiments.train.presets import DIGITS, DIGITS_GRAPH, MOSAIC
from experiments.train.processes import make_fabric
from experiments.train.training import set_up

STEPS = 20
FILE = Path(__file__).with_suffix(".json")

CURVES: dict[str, RunConfig] = {
    "images, experts choose": DIGITS,
    "images, tokens choose, copies": replace(DIGITS, router="token_choice", start="copies"),
    "images, slots beside the MLP": replace(DIGITS, router="soft_slots"),
    "a graph, routed once, copies": DIGITS_GRAPH,
    "attention, a router a layer": replace(
        DIGITS_GRAPH, conv=("gat",), shared_router=False, start="shared", k=2
    ),
    "mixed kinds, centroids": replace(
        DIGITS_GRAPH,
        conv=("gcn", "sage", "graph"),
        experts=6,
        router="multi_centroid",
        start="plain",
    ),
    "planted regions": replace(MOSAIC, hidden=16),
}
"""Each curve's preset, and what it changes."""


def batches(config: RunConfig, task: Task) -> Iterator[Batch]:
    """Those of training, epoch after epoch."""
    epoch = 0
    while True:
        yield from task.loader("train", config.batch_size, epoch)
        epoch += 1


def losses(name: str) -> list[float]:
    """The loss of each step, with the routers' own losses."""
    config = replace(CURVES[name], precision="64-true", device="cpu", progress=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            task = kind_of(config).tasks()(0)
            fabric = make_fabric(config)
            torch.manual_seed(0)
            model = build_model(config, task)
            found = []
            with set_up(fabric, model, config, task) as training:
                for _, batch in zip(range(STEPS), batches(config, task), strict=False):
                    ((values, _, _),) = training.update(batch, len(batch.target))
                    found.append((values["loss"] + values["aux"]).item())
            return found
    finally:
        torch.set_num_threads(threads)


def main() -> None:
    """Write all curves."""
    curves = {name: losses(name) for name in CURVES}
    FILE.write_text(json.dumps(curves, indent=1) + "\n")
    for name, curve in curves.items():
        print(f"{name}: {curve[0]:.6f} to {curve[-1]:.6f}")


if __name__ == "__main__":
    main()
