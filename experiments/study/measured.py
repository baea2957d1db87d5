"""What a cell of the table of routers holds beside the summary of its run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

import gmoe
from experiments.benchmark.measure import take_turns
from experiments.train.build import build_model, example, make_fabric
from experiments.train.config import GraphConfig, RouterOptions, RunConfig
from experiments.train.data.load import load_tasks
from experiments.train.data.task import Task
from experiments.train.loop import Training, set_up
from experiments.train.routing_stats import noting_added, switched_off, switches
from experiments.train.run_folder import spread


def measured(config: RunConfig) -> dict[str, Any]:
    """Of a finished run, what a cell holds beside its summary: what the routed experts add, and step times."""
    task_of = load_tasks(config)
    found = [routed_part(config, task_of(seed), seed) for seed in config.seeds]
    shares = [spread(list(values)) for values in zip(*(share for _, share in found), strict=True)]
    routed = {"off": spread([off for off, _ in found]), "share": shares} if shares else None
    return {"routed": routed, "time": step_times(config, task_of(config.seeds[0]))}


def routed_part(config: RunConfig, task: Task, seed: int) -> tuple[float, list[float]]:
    """What the routed experts of a trained seed do on the test set: the metric with these switched off, and by layer
    the norm of what they add over that of the layer's output."""
    model = build_model(config, task)
    model.load_state_dict(
        load_file(config.folder() / f"seed-{seed}" / "checkpoint" / "best.safetensors")
    )
    sums = defaultdict[nn.Module, list[float]](lambda: [0.0, 0.0])

    def count(layer: nn.Module, *values: Tensor) -> None:
        for place, value in enumerate(values):
            sums[layer][place] += float(value.square().sum())

    off = 0.0
    for tested in (noting_added(model, count), switched_off(model)) if switches(model) else ():
        with set_up(make_fabric(config), tested, config, task) as training:
            off, _ = training.evaluate("test")
    return off, [(added / whole) ** 0.5 for added, whole in sums.values()]


def step_times(config: RunConfig, task: Task, repeats: int = 15) -> dict[str, Any]:
    """Seconds of a training step of the cell and of the dense model, in turns; of graphs on ``edge_index``, and
    ``dense-csr`` is the dense model on a matrix, where it runs on one."""
    dense = replace(config, router="dense", equal=None, kmeans_init=False, options=RouterOptions())
    arms = {"dense": (dense, task), "cell": (config, task)}
    if isinstance(config, GraphConfig) and config.sampling == "full":
        kinds: dict[str, Any] = {
            "dense": (dense, "edge_index"),
            "cell": (config, "edge_index"),
            "dense-csr": (dense, "auto"),
        }
        for name, (own, adjacency) in kinds.items():
            own = replace(own, adjacency=adjacency)
            arms[name] = (own, load_tasks(own)(config.seeds[0]))
        if not example(*arms["dense-csr"])[1].is_sparse_csr:
            del arms["dense-csr"]
    fabric = make_fabric(config)
    with ExitStack() as stack:
        steps: dict[str, Callable[[], None]] = {}
        for name, (own, data) in arms.items():
            training = stack.enter_context(set_up(fabric, build_model(own, data), own, data))
            batch = fabric.to_device(next(iter(data.loader("train", own.batch_size, 0))))
            steps[name] = partial(train_step, training, batch)
        return take_turns(steps, repeats, fabric.device, warmup=3)


def train_step(training: Training, batch: Any) -> None:
    """Forward, loss, backward and optimizer, without the counts that a run keeps."""
    training.model.train()
    training.optimizer.zero_grad()
    loss = training.task.loss(batch.counted(training.forward(batch.inputs)), batch.target)
    training.fabric.backward(loss + gmoe.aux_loss(training.routings))
    training.optimizer.step()
