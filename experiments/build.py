"""From a configuration to a model, and dense controls of equal cost."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import gmoe
from experiments.config import RouterOptions, TrainConfig
from experiments.data import Task
from gmoe import GNNMoE, OracleRouter, Router
from vision import SIZES, ViTMoE


def build_model(config: TrainConfig, task: Task) -> nn.Module:
    """The model of a run; with ``equal`` the dense control, widened to the cost of its MoE.

    Raises:
        ValueError: an option that the router does not know, or a combination that makes no sense.
    """
    if config.equal is None:
        return _build(config, task)
    if config.router != "dense":
        raise ValueError(f"equal: got {config.equal!r} with router={config.router!r}, expected router='dense'")
    width = matched_width(config, task)
    return _build(replace(config, hidden=width, equal=None, options=RouterOptions()), task)


def matched_width(config: TrainConfig, task: Task) -> int:
    """The hidden width at which the dense model costs what the MoE ``equal_to`` costs, to 2 % or the nearest width."""
    twin = build_twin(config, task)

    def dense(width: int) -> nn.Module:
        return _build(replace(config, hidden=width, equal=None, options=RouterOptions()), task)

    if config.equal == "parameters":
        target = float(num_parameters(twin))
        return gmoe.match_width(lambda width: num_parameters(dense(width)), target, tolerance=0.5)
    inputs = next(iter(task.loader("train", config.batch_size, None))).inputs
    target = float(flops(twin, inputs))
    return gmoe.match_width(lambda width: flops(dense(width), inputs), target, tolerance=0.5)


def build_twin(config: TrainConfig, task: Task) -> nn.Module:
    """The MoE that a dense control is matched to."""
    return _build(replace(config, router=config.equal_to, equal=None), task)


def matched_ratio(config: TrainConfig, task: Task, model: nn.Module) -> float | None:
    """Cost of a matched dense control over that of its MoE: 1 but for what whole widths cannot meet."""
    if config.equal is None:
        return None
    twin = build_twin(config, task)
    if config.equal == "parameters":
        return num_parameters(model) / num_parameters(twin)
    inputs = next(iter(task.loader("train", config.batch_size, None))).inputs
    return flops(model, inputs) / flops(twin, inputs)


def num_parameters(model: nn.Module) -> int:
    """All parameters."""
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def flops(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Active FLOPs of one forward pass in training mode, which leaves the model's counters as they were."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    count = gmoe.count_flops(model.train(), *inputs)
    model.load_state_dict(state)
    return count


def _build(config: TrainConfig, task: Task) -> nn.Module:
    router, router_kwargs = _router(config, task)
    if task.kind == "image":
        size = replace(SIZES[task.in_channels], mlp_dim=config.hidden, num_layers=config.layers)
        return ViTMoE(
            size,
            task.num_classes,
            router,
            num_experts=config.experts,
            k=config.k,
            every=config.every,
            dropout=config.dropout,
            router_kwargs={**router_kwargs, "check_finite": config.check_finite} if router is not None else None,
        )
    return GNNMoE(
        task.in_channels,
        config.hidden,
        task.num_classes,
        config.layers,
        config.conv,
        router,
        num_experts=config.experts,
        k=config.k,
        routing=config.routing,
        route_on=config.route_on,
        route_hops=config.route_hops,
        every=config.every,
        dropout=config.dropout,
        norm=config.norm,
        jk=config.jk,
        residual=config.residual,
        router_kwargs=router_kwargs,
        check_finite=config.check_finite,
        **_conv_kwargs(config),
    )


def _conv_kwargs(config: TrainConfig) -> dict[str, Any]:
    return {"aggr": "mean"} if config.conv == "sage" else {}


def _router(config: TrainConfig, task: Task) -> tuple[str | Callable[..., Router] | None, dict[str, Any]]:
    """The router by name or factory, and its options."""
    given = config.options.given()
    if config.router == "dense":
        if given:
            raise ValueError(f"options: got {given} with router='dense', expected none")
        return None, {}
    known: Any
    if config.router == "oracle":
        if task.planted is None:
            raise ValueError(f"router: got 'oracle' for {task.name}, expected another, since no routing is planted")
        if config.experts != int(task.planted.max()) + 1:
            raise ValueError(f"experts: got {config.experts}, expected the {int(task.planted.max()) + 1} planted ones")
        known = partial(OracleRouter, assignment=task.planted)
    else:
        known = gmoe.ROUTERS[config.router]
    legal = set(inspect.signature(known).parameters)
    for name, value in given.items():
        if name not in legal:
            raise ValueError(f"{name}: got {value!r}, but the router {config.router!r} has no such option")
    return (known if config.router == "oracle" else config.router), given


@torch.no_grad()
def init_centroids(model: nn.Module, inputs: tuple[Tensor, ...], seed: int) -> None:
    """Begin every multi-centroid router with the k-means centroids of what it sees, in one forward pass.

    Raises:
        ValueError: the model has no such router.
    """
    routers = [module for module in model.modules() if isinstance(module, gmoe.MultiCentroid)]
    if not routers:
        raise ValueError("kmeans_init: got True, expected False, since the model has no multi-centroid router")

    def begin(router: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(router, gmoe.MultiCentroid)
        router.init_from_data(args[0], seed=seed)

    handles = [router.register_forward_pre_hook(begin) for router in routers]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        model.train()(*inputs)  # in training, since threshold inference has no cut scores yet
    finally:
        for handle in handles:
            handle.remove()
    begun = {name: value for name, value in model.state_dict().items() if name.endswith(("centroid", "center_D"))}
    model.load_state_dict({**before, **begun})  # counters and norms as they were
