"""From a configuration to its model, and dense baselines of equal cost."""

from __future__ import annotations

import copy
import inspect
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch_geometric.data import HeteroData

import gmoe
from experiments.train.config import (
    GraphConfig,
    HeteroConfig,
    ImageConfig,
    MoleculeConfig,
    NodeConfig,
    RouterOptions,
    RunConfig,
)
from experiments.train.data.task import Task
from experiments.train.user_code import code_of, frames_of, load_conv, load_object
from gmoe._checks import check, described

if TYPE_CHECKING:
    from gmoe.models.vit import ViTSize

TWINS = 5
"""Draws of the MoE that a dense baseline is matched to, where its cost follows from the routing."""


def build_model(config: RunConfig, task: Task) -> nn.Module:
    """The model of a run; with ``equal`` the dense baseline, widened to the cost of its MoE.

    Raises:
        ValueError: an option that the router does not know, or a combination that makes no sense.
    """
    fits = config.equal is None or (config.router == "dense" and config.model is None)
    check(fits, "equal", config.equal, "none, or router='dense' and no model of your own")
    if config.model is not None:
        return _own_model(config.model, task)
    if config.equal is not None:
        cost, dense = cost_by(config, task), replace(config, equal=None, options=RouterOptions())
        # Whole widths cannot meet the cost of a narrow model; `matched` tells how near they come
        width = gmoe.match_width(
            lambda width: cost(_build(replace(dense, hidden=width), task)),
            cost_of_twin(config, task),
            tolerance=0.5,
        )
        config = replace(dense, hidden=width)
    model: Any = _build(config, task)
    if isinstance(config, ImageConfig) and config.mlp_scale != 1:  # where a MoE would have experts
        scale = config.mlp_scale
        for block in model.encoder.layers[config.every - 1 :: config.every]:
            block.mlp.register_forward_hook(lambda *call: scale * call[-1])
    built: nn.Module = model
    return built


def _own_model(name: str, task: Task) -> nn.Module:
    """What the user's function returns for the sizes of the data."""
    sizes = [task.in_channels, task.num_classes]
    if isinstance(task.graph, HeteroData):
        sizes.append(task.graph.metadata())
    model = load_object("model", name)(*sizes)
    check(
        isinstance(model, nn.Module),
        "model",
        f"{name}, which returns a {type(model).__name__}",
        "an nn.Module",
    )
    return model


def _check_logits(name: str, model: nn.Module, config: RunConfig, task: Task) -> None:
    """Refuse a user's model that gives anything but a row of logits for each row of a batch."""
    batch = next(iter(task.loader("train", config.batch_size, None)))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        logits = copy.deepcopy(model).train()(*batch.inputs)
    fits = isinstance(logits, Tensor) and logits.dim() == 2 and logits.size(1) == task.num_classes
    try:
        fits = fits and len(batch.counted(logits)) == len(batch.target)
    except IndexError:
        fits = False
    check(
        fits,
        "model",
        f"{name}, which gives {described(logits)}",
        f"logits, {task.num_classes} columns, a row for each node, graph or image",
    )


def costs_of(model: nn.Module, config: RunConfig, task: Task) -> dict[str, Any]:
    """What a model costs, and its steps an epoch.

    A conv that does not run on the data is a ``ValueError``.
    """
    if config.model is not None:
        _check_logits(config.model, model, config, task)
    inputs = example(config, task)
    try:
        active = flops(model, inputs)
    except (TypeError, RuntimeError, AssertionError, AttributeError) as error:
        if not isinstance(config, GraphConfig | MoleculeConfig) or config.model is not None:
            raise
        if frames_of(error, *code_of(config)):  # a fault of the user's code, not of a choice
            raise
        raise ValueError(
            f"conv: got {', '.join(config.conv)}, expected one that runs with these sizes and data "
            f"({type(error).__name__}: {error})"
        ) from error
    if isinstance(config, GraphConfig) and config.evaluation == "layerwise":
        why = fails_by_layer(model, task.graph)
        check(not why, "evaluation", f"'layerwise' ({why})", "'full' or 'sampled'")
    matched = None
    if config.equal is not None:  # 1 but for what whole widths cannot meet
        matched = cost_by(config, task)(model) / cost_of_twin(config, task)
    return {
        "flops": active,
        "images": len(inputs[0]) if isinstance(config, ImageConfig) else None,
        "parameters": num_parameters(model),
        "active_parameters": gmoe.active_parameters(model),
        "matched": matched,
        "hidden": getattr(model, "mlp_dim", getattr(model, "hidden_channels", None)),
        "steps": task.steps(config.batch_size),
    }


def fails_by_layer(model: Any, graph: Any) -> str:
    """Why a model has no layer-wise inference of a graph, tried on a node of it.

    Empty if it has.
    """
    try:
        model.eval().inference(graph.subgraph(torch.tensor([0])), batch_size=1, return_routing=True)
    except (AttributeError, RuntimeError, TypeError) as error:
        return str(error)
    finally:
        model.train()
    return ""


def example(config: RunConfig, task: Task) -> tuple[Any, ...]:
    """The inputs of one call of the model in training."""
    return next(iter(task.loader("train", config.batch_size, None))).inputs


def cost_by(config: RunConfig, task: Task) -> Callable[[nn.Module], int]:
    """What ``equal`` counts of a model: parameters, or active FLOPs on one batch."""
    if config.equal == "parameters":
        return num_parameters
    with torch.random.fork_rng(devices=[]):  # sampled neighborhoods are drawn
        torch.manual_seed(0)
        return partial(flops, inputs=example(config, task))


def cost_of_twin(config: RunConfig, task: Task) -> float:
    """What the MoE of ``equal_to`` costs before training, the mean over the seeds 0 to 4.

    One draw is enough where the cost does not follow from the routing. The generator is left as it
    was, so that the dense model is as wide for every seed, and whenever it is built again.
    """
    cost, found = cost_by(config, task), list[int]()
    with torch.random.fork_rng(devices=[]):
        for seed in range(TWINS):
            torch.manual_seed(seed)
            found.append(cost(build_twin(config, task)))
            if found[0] == found[-1] and seed == 1:
                break
    return statistics.fmean(found)


def build_twin(config: RunConfig, task: Task) -> nn.Module:
    """The MoE that a dense baseline is matched to."""
    scale: dict[str, Any] = {"mlp_scale": 1.0} if isinstance(config, ImageConfig) else {}
    router = config.equal_to
    legal = "a router, since a dense model equals itself"
    check(router != "dense", "equal_to", repr(router), legal)
    try:
        return _build(replace(config, router=router, equal=None, **scale), task)
    except ValueError as error:
        raise ValueError(f"{error} (of the MoE with equal_to={router!r})") from error


def num_parameters(model: nn.Module) -> int:
    """All parameters."""
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def flops(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Active FLOPs of one forward pass in training mode.

    Of a copy, since it moves counters and fills convs' caches.
    """
    return gmoe.count_flops(copy.deepcopy(model).train(), *inputs)


def _build(config: RunConfig, task: Task) -> nn.Module:
    router, router_kwargs = _router(config, task)
    common: dict[str, Any] = {
        "num_experts": config.experts,
        "k": config.k,
        "every": config.every,
        "dropout": config.dropout,
        "router_kwargs": router_kwargs,
        **config.layer_options(),
    }
    if isinstance(config, ImageConfig):
        size = vit_size(config, task.in_channels)
        model = gmoe.ViTMoE
        if config.router == "oracle":
            from experiments.train.told_domain import DomainViT  # and so torchvision

            model = DomainViT
        model = model(size, task.num_classes, router, **common)
        if config.router == "soft_slots":
            for block in model.encoder.layers[config.every - 1 :: config.every]:
                block.mlp = SoftMLP(block.mlp, size, config)
        for module in model.modules():
            if isinstance(module, gmoe.Router):
                module.check_finite = config.check_finite
        return model
    assert isinstance(config, NodeConfig | MoleculeConfig)
    common |= {
        "norm": config.norm,
        "residual": config.residual,
        "check_finite": config.check_finite,
    }
    if isinstance(config, MoleculeConfig):
        return _build_molecules(config, task, router, common)
    if isinstance(config, HeteroConfig):
        assert isinstance(task.graph, HeteroData)
        return gmoe.HeteroGNNMoE(
            {kind: width for kind, width in task.in_channels.items() if width is not None},
            config.hidden,
            task.num_classes,
            task.graph.metadata(),
            config.layers,
            router,
            target=task.target,
            num_nodes_dict=task.graph.num_nodes_dict,
            **common,
        )
    assert isinstance(config, GraphConfig)
    if config.sampling == config.evaluation == "full" and config.conv == ("gcn",):
        # There is one graph only: for the dense model, whose convs are PyG's
        common["cached"] = True
    kinds = kinds_of_experts(config)
    return gmoe.GNNMoE(
        task.in_channels,
        config.hidden,
        task.num_classes,
        config.layers,
        conv=[load_conv(kind) for kind in kinds] if isinstance(kinds, list) else load_conv(kinds),
        router=router,
        shared_router=config.shared_router,
        jk=config.jk,
        input_dropout=config.input_dropout,
        **common,
    )


def _build_molecules(
    config: MoleculeConfig, task: Task, router: Any, common: dict[str, Any]
) -> nn.Module:
    """The GNN of molecules."""
    from experiments.train.molecule_gnn import (  # ogb, which others do without
        MoleculeGNN,
        conv_of,
    )

    kinds = kinds_of_experts(config)
    convs = {name: conv_of(name, config.hidden) for name in config.conv}
    return MoleculeGNN(
        config.hidden,
        task.num_classes,
        config.layers,
        conv=convs[kinds] if isinstance(kinds, str) else [convs[kind] for kind in kinds],
        router=router,
        shared_router=config.shared_router,
        virtual_node=config.virtual_node,
        pool=config.pool,
        input_dropout=config.input_dropout,
        **common,
    )


class SoftMLP(nn.Module):
    """The MLP of a block, and slots that start at zero beside it.

    An image has as many slots as tokens.
    """

    def __init__(self, mlp: nn.Module, size: ViTSize, config: ImageConfig) -> None:
        super().__init__()
        tokens, width, experts = (
            (size.image_size // size.patch_size) ** 2 + 1,
            size.hidden_dim,
            config.experts,
        )
        self.mlp = mlp
        self.experts = gmoe.MLPExperts(
            width, size.mlp_dim, width, num_experts=experts, dropout=config.dropout, zero_init=True
        )
        self.soft = gmoe.SoftMoE(
            gmoe.SoftSlots(width, num_experts=experts, slots=-(-tokens // experts)), self.experts
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mlp(x) + self.soft(x)
        return y


def vit_size(config: ImageConfig, image_size: int) -> ViTSize:
    """The sizes of the ViT: those of the image size's preset, but for what is given.

    Without a preset, all of them.
    """
    from gmoe.models.vit import SIZES, ViTSize  # torchvision, which graphs do without

    given = {"patch_size": config.patch, "hidden_dim": config.dim, "num_heads": config.vit_heads}
    sizes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    sizes |= {"mlp_dim": config.hidden, "num_layers": config.layers}
    if image_size in SIZES:
        return replace(SIZES[image_size], **sizes)
    legal = f"patch, dim and vit_heads with it, or one of {sorted(SIZES)}"
    check(None not in given.values(), "image_size", image_size, legal)
    return ViTSize(image_size=image_size, **sizes)


def kinds_of_experts(config: GraphConfig | MoleculeConfig) -> str | list[str]:
    """The conv of all experts by name, or of each; the first alone for the dense model."""
    if len(config.conv) == 1 or config.router == "dense":
        return config.conv[0]
    times, rest = divmod(config.experts, len(config.conv))
    check(
        not rest, "experts", config.experts, f"a multiple of the {len(config.conv)} kinds of conv"
    )
    return list(config.conv) * times


def _router(
    config: RunConfig, task: Task
) -> tuple[str | Callable[..., gmoe.Router] | None, dict[str, Any]]:
    """The router by name or factory, and its options."""
    given = config.options.given()
    if config.router in ("dense", "soft_slots"):
        check(not given, "options", f"{given} with router={config.router!r}", "none")
        fits = config.router == "dense" or isinstance(config, ImageConfig)
        check(fits, "router", f"{config.router!r} for {task.name}", "another, or images")
        return None, {}
    router: Any = config.router
    if ":" in config.router:
        router = load_object("router", config.router)
        fits = isinstance(router, type) and issubclass(router, gmoe.Router)
        check(fits, "router", repr(config.router), "a subclass of gmoe.Router")
    elif config.router == "oracle":
        router = _oracle(config, task)
    legal = inspect.signature(gmoe.ROUTERS.get(router, router)).parameters
    for name, value in given.items():
        check(
            name in legal,
            name,
            repr(value),
            f"none, since the router {config.router!r} has no such option",
        )
    if router == "token_choice" and given.get("balance") not in ("switch", "importance_load"):
        check(
            "balance_coef" not in given,
            "balance_coef",
            "a number",
            "none: only switch and importance_load have one",
        )
    if given.get("balance") == "none":
        given["balance"] = None
    return router, given


def _oracle(config: RunConfig, task: Task) -> Callable[..., gmoe.Router]:
    """The router that knows the expert of each node, or of each image's domain."""
    if task.domains:
        from experiments.train.told_domain import DomainRouter

        number = len(task.domains)
        legal = f"{number}, one for each of {', '.join(task.domains)}"
        check(config.experts == number, "experts", config.experts, legal)
        return DomainRouter
    if task.planted is None:
        legal = "another, since no routing is planted"
        raise ValueError(f"router: got 'oracle' for {task.name}, expected {legal}")
    planted = int(task.planted.max()) + 1
    check(config.experts == planted, "experts", config.experts, f"the {planted} planted ones")
    return partial(gmoe.OracleRouter, assignment=task.planted)


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
