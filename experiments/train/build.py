"""The model of a run, what it costs, and dense baselines of equal cost."""

from __future__ import annotations

import copy
import statistics
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

import gmoe
from experiments.train.config import RouterOptions, RunConfig, moe_of
from experiments.train.data.task import Batch, Task
from experiments.train.kinds import kind_of
from experiments.train.user_code import code_of, frames_of, load_object
from gmoe._checks import check, described

TWINS = 5
"""Draws of the MoE that a dense baseline is matched to, where its cost follows from the routing."""


def build_model(config: RunConfig, task: Task) -> nn.Module:
    """The model of a run; with ``equal`` the dense baseline, widened to the cost of its MoE.

    Raises:
        ValueError: an option that the router does not know, or a combination that makes no sense.
    """
    is_baseline = config.router == "dense" and config.model is None
    legal = "none, or router='dense' and no model of your own"
    check(config.equal is None or is_baseline, "equal", config.equal, legal)
    if config.model is not None and not config.own_models():
        model = _own_model(config.model, kind_of(config).sizes(task))
    else:
        config = config if config.equal is None else widened(config, task)
        model = kind_of(config).model(task)
    return model


def _own_model(name: str, sizes: list[Any]) -> nn.Module:
    """What the user's function returns for the sizes of the data."""
    model = load_object("model", name)(*sizes)
    got = f"{name}, which returns a {type(model).__name__}"
    check(isinstance(model, nn.Module), "model", got, "an nn.Module")
    return model


def widened(config: RunConfig, task: Task) -> RunConfig:
    """A dense baseline with the hidden width at which it costs what its MoE does."""
    dense = replace(config, equal=None, options=RouterOptions())
    cost = cost_by(config, task)
    # Whole widths cannot meet the cost of a narrow model; `matched` tells how near they come
    width = match_width(
        lambda width: cost(kind_of(replace(dense, hidden=width)).model(task)),
        cost_of_twin(config, task),
    )
    return replace(dense, hidden=width)


def match_width(cost: Callable[[int], float], target: float) -> int:
    """The width whose cost, which grows with it, is nearest to the target."""
    known = cache(cost)  # the search meets its last widths again
    # Double the width until it costs enough, since wide models are slow to measure. Not by powers
    # of two, where a model may have a special case (input and hidden width agree: no projection).
    low = high = 1
    while known(high) < target:
        low, high = high, 2 * high + 1
    width = bisect_left(range(high), target, lo=low, key=known)
    return min(max(width - 1, 1), width, key=lambda width: abs(known(width) - target))


def cost_by(config: RunConfig, task: Task) -> Callable[[nn.Module], int]:
    """What ``equal`` counts of a model: parameters, or active FLOPs on one batch."""
    if config.equal == "parameters":
        return num_parameters
    with torch.random.fork_rng(devices=[]):  # sampled neighborhoods are drawn
        torch.manual_seed(0)
        return partial(flops, inputs=kind_of(config).example(task))


def cost_of_twin(config: RunConfig, task: Task) -> float:
    """What the MoE of ``equal_to`` costs before training, the mean over the seeds 0 to 4.

    One draw is enough where the cost does not follow from the routing. The generator is left as it
    was, so that the dense model is as wide for every seed, and whenever it is built again.
    """
    cost = cost_by(config, task)
    costs: list[int] = []
    with torch.random.fork_rng(devices=[]):
        for seed in range(TWINS):
            torch.manual_seed(seed)
            costs.append(cost(build_twin(config, task)))
            if seed == 1 and costs[0] == costs[1]:
                break
    return statistics.fmean(costs)


def build_twin(config: RunConfig, task: Task) -> nn.Module:
    """The MoE that a dense baseline is matched to."""
    router = config.equal_to
    legal = "a router, since a dense model equals itself"
    check(router != "dense", "equal_to", repr(router), legal)
    try:
        return kind_of(moe_of(config)).model(task)
    except ValueError as error:
        raise ValueError(f"{error} (of the MoE with equal_to={router!r})") from error


def costs_of(model: nn.Module, config: RunConfig, task: Task) -> dict[str, Any]:
    """What a model costs, and its steps an epoch.

    A conv that does not run on the data is a ``ValueError``.
    """
    kind = kind_of(config)
    if config.model is not None:
        batch = next(iter(task.loader("train", config.batch_size, None)))
        _check_logits(config.model, model, batch, task.num_classes)
    inputs = kind.example(task)
    try:
        active = flops(model, inputs)
    except (TypeError, RuntimeError, AssertionError, AttributeError) as error:
        is_of_conv = config.convs() and config.model is None
        if not is_of_conv or frames_of(error, *code_of(config)):  # a fault of the user's code
            raise
        raise ValueError(
            f"conv: got {', '.join(config.convs())}, expected one that runs with these sizes and "
            f"data ({type(error).__name__}: {error})"
        ) from error
    kind.check_evaluation(model, task)
    matched = None
    if config.equal is not None:  # 1 but for what whole widths cannot meet
        matched = cost_by(config, task)(model) / cost_of_twin(config, task)
    return {
        "flops": active,
        "images": kind.num_images(inputs),
        "parameters": num_parameters(model),
        "active_parameters": gmoe.active_parameters(model),
        "matched": matched,
        "hidden": getattr(model, "mlp_dim", getattr(model, "hidden_channels", None)),
        "steps": task.steps(config.step_size),
    }


def _check_logits(name: str, model: nn.Module, batch: Batch, num_classes: int) -> None:
    """Refuse a user's model that gives anything but a row of logits for each row of a batch."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        logits = copy.deepcopy(model).train()(*batch.inputs)
    is_table = isinstance(logits, Tensor) and logits.dim() == 2
    has_columns = is_table and logits.size(1) == num_classes
    try:
        has_rows = has_columns and len(batch.counted(logits)) == len(batch.target)
    except IndexError:
        has_rows = False
    legal = f"logits, {num_classes} columns, a row for each node, graph or image"
    check(has_rows, "model", f"{name}, which gives {described(logits)}", legal)


def num_parameters(model: nn.Module) -> int:
    """All parameters."""
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def flops(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Active FLOPs of one forward pass in training mode.

    Counted on a copy, since a pass moves counters and fills convs' caches. Its parameters need no
    gradients: torch's counter fails where a module is given a view of one that does, as in CaiT.
    """
    return gmoe.count_flops(copy.deepcopy(model).train().requires_grad_(False), *inputs)


@torch.no_grad()
def init_centroids(model: nn.Module, inputs: tuple[Tensor, ...], seed: int) -> None:
    """Begin every multi-centroid router with the k-means centroids of what it sees.

    One forward pass shows them all.
    """
    copied = copy.deepcopy(model).train()  # whose counters, norms and caches may move
    routers = [module for module in copied.modules() if isinstance(module, gmoe.MultiCentroid)]
    check(routers, "kmeans_init", True, "False, since the model has no multi-centroid router")
    for router in routers:
        router.register_forward_pre_hook(
            lambda router, args: router.init_from_data(args[0], seed=seed)
        )
    copied(*inputs)
    begun = {
        name: value
        for name, value in copied.state_dict().items()
        if name.endswith(("centroid", "center_D"))
    }
    model.load_state_dict({**model.state_dict(), **begun})
