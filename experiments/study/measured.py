"""What a cell of the table of routers holds beside the summary of its run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from experiments.benchmark.measure import take_turns
from experiments.train.build import build_model
from experiments.train.config import GraphConfig, RunConfig, dense_of
from experiments.train.data.load import load_tasks
from experiments.train.data.task import Task
from experiments.train.files import load_weights
from experiments.train.kinds import kind_of
from experiments.train.processes import make_fabric
from experiments.train.results import spread
from experiments.train.routing_stats import noting_added, switched_off, switches
from experiments.train.training import set_up


def measured(config: RunConfig) -> dict[str, Any]:
    """What the cell of a finished run holds beside its summary.

    That is what the routed experts add, and step times; of images of several domains also how it
    does on each.
    """
    task_of = load_tasks(config)
    by_seed = [routed_part(config, task_of(seed), seed) for seed in config.seeds]
    shares = [spread(list(values)) for values in zip(*(share for _, share in by_seed), strict=True)]
    routed = {"off": spread([off for off, _ in by_seed]), "share": shares} if shares else None
    part = {"routed": routed, "time": step_times(config, task_of(config.seeds[0]))}
    if task_of(config.seeds[0]).domains:
        part["domains"] = on_domains(config, task_of)
    return part


def trained(config: RunConfig, task: Task, seed: int) -> nn.Module:
    """The model of a seed, as validation selected it."""
    model = build_model(config, task)
    path = config.folder() / f"seed-{seed}" / "checkpoint" / "best.safetensors"
    load_weights(model, path)
    return model


@torch.no_grad()
def on_domains(config: RunConfig, task_of: Callable[[int], Task]) -> dict[str, Any]:
    """The accuracy on the test images of each domain, and how well mean colors tell the domain."""
    task = task_of(config.seeds[0])
    by_seed = list[Tensor]()
    for seed in config.seeds:
        model = trained(config, task_of(seed), seed).eval()
        batches = task_of(seed).loader("test", config.batch_size, None)
        right = [model(*batch.inputs).argmax(dim=1) == batch.target for batch in batches]
        by_seed.append(torch.cat(right).float())
    accuracy = {
        name: spread([float(right[task.tested["domain"] == number].mean()) for right in by_seed])
        for number, name in enumerate(task.domains)
    }
    return {"accuracy": accuracy, "color": color_probe(task)}


def color_probe(task: Task) -> dict[str, float]:
    """What a linear model of an image's mean color knows of its domain.

    Its accuracy on the test images, and ``"largest"``, the share of their largest domain.
    """
    parts = {}
    for part in ("train", "test"):
        batches = list(task.loader(part, 512, None))
        color = torch.cat([batch.inputs[0].mean(dim=(2, 3)) for batch in batches])
        domain = torch.cat([batch.domain for batch in batches if batch.domain is not None])
        parts[part] = (color.numpy(), domain.numpy())
    probe = LogisticRegression(max_iter=1000).fit(*parts["train"])
    largest = task.tested["domain"].bincount().max() / len(task.tested["domain"])
    return {"accuracy": float(probe.score(*parts["test"])), "largest": float(largest)}


def routed_part(config: RunConfig, task: Task, seed: int) -> tuple[float, list[float]]:
    """What the routed experts of a trained seed do on the test set: the metric with these switched
    off, and by layer the norm of what they add over that of the layer's output."""
    model = trained(config, task, seed)
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
    """Seconds of a training step of the cell and of the dense model, in turns; of graphs on
    ``edge_index``, and ``dense-csr`` is the dense model on a matrix, where it runs on one."""
    dense = dense_of(config)
    # An oracle's batches bring what it is told, which a dense model does not take.
    of_dense = load_tasks(dense)(config.seeds[0]) if config.router == "oracle" else task
    arms = {"dense": (dense, of_dense), "cell": (config, task)}
    if isinstance(config, GraphConfig) and config.sampling == "full":
        kinds: dict[str, Any] = {
            "dense": (dense, "edge_index"),
            "cell": (config, "edge_index"),
            "dense-csr": (dense, "auto"),
        }
        for name, (own, adjacency) in kinds.items():
            own = replace(own, adjacency=adjacency)
            arms[name] = (own, load_tasks(own)(config.seeds[0]))
        own, data = arms["dense-csr"]
        if not kind_of(own).example(data)[1].is_sparse_csr:
            del arms["dense-csr"]
    fabric = make_fabric(config)
    with ExitStack() as stack:
        steps: dict[str, Callable[[], object]] = {}
        for name, (own, data) in arms.items():
            training = stack.enter_context(set_up(fabric, build_model(own, data), own, data))
            batch = fabric.to_device(next(iter(data.loader("train", own.batch_size, 0))))
            steps[name] = partial(training.update, batch, len(batch.target))
        return take_turns(steps, repeats, fabric.device, warmup=3)
