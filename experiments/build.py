"""From a configuration to a model, and dense baselines of equal cost."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Data, HeteroData

import gmoe
from experiments.config import GraphConfig, HeteroConfig, ImageConfig, RouterOptions, RunConfig, load_object
from experiments.data import Task
from gmoe import OracleRouter, Router
from gmoe.conv.kinds import CONVS
from gmoe.convert import choose_blocks

if TYPE_CHECKING:
    from gmoe.models.vit import ViTSize


def build_model(config: RunConfig, task: Task) -> nn.Module:
    """The model of a run; with ``equal`` the dense baseline, widened to the cost of its MoE.

    Raises:
        ValueError: an option that the router does not know, or a combination that makes no sense.
    """
    if config.equal is not None and config.router != "dense":
        raise ValueError(f"equal: got {config.equal!r} with router={config.router!r}, expected router='dense'")
    if config.model is not None:
        return _own_model(config.model, task)
    own = config if config.equal is None else _without_experts(config, matched_width(config, task))
    return _scaled(_build(own, task), config)


def _own_model(name: str, task: Task) -> nn.Module:
    """What the user's function returns for the sizes of the data."""
    sizes = [task.in_channels, task.num_classes]
    if isinstance(task.graph, HeteroData):
        sizes.append(task.graph.metadata())
    model = load_object("model", name)(*sizes)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: got {name}, which returns a {type(model).__name__}, expected an nn.Module")
    return model


class ScaledMLP(nn.Module):
    """An MLP whose output is multiplied by a factor, as experts' outputs are by their weights.

    Args:
        mlp: the MLP.
        factor: the factor.
    """

    def __init__(self, mlp: nn.Module, factor: float) -> None:
        super().__init__()
        self.mlp = mlp
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.factor * self.mlp(x)
        return out


def _scaled(model: nn.Module, config: RunConfig) -> nn.Module:
    """A dense ViT with its MLPs scaled where a MoE would have experts; other models as they are."""
    if isinstance(config, ImageConfig) and config.mlp_scale != 1:
        vit: Any = model
        blocks = vit.encoder.layers
        for i in choose_blocks(len(blocks), config.every, config.moe_blocks or None):
            blocks[i].mlp = ScaledMLP(blocks[i].mlp, config.mlp_scale)
    return model


def _without_experts(config: RunConfig, hidden: int) -> RunConfig:
    """The dense model of a baseline, of some width."""
    no_blocks: dict[str, Any] = {"moe_blocks": ()} if isinstance(config, ImageConfig) else {}
    return replace(config, hidden=hidden, equal=None, options=RouterOptions(), **no_blocks)


def first_flops(model: nn.Module, config: RunConfig, task: Task) -> int:
    """Active FLOPs of the model's first forward, which shows that it runs on the data as it will be evaluated.

    Raises:
        ValueError: it does not.
    """
    with _refusing(config, task, "runs"):
        found = flops(model, example(config, task))
    if isinstance(config, GraphConfig) and config.evaluation == "layerwise":
        tiny = Data(x=torch.zeros(2, task.in_channels), edge_index=torch.tensor([[0, 1], [1, 0]]))
        with _refusing(config, task, "can be evaluated layer by layer"):
            copied: Any = copy.deepcopy(model).eval()
            copied.inference(tiny)
    return found


def example(config: RunConfig, task: Task) -> tuple[Any, ...]:
    """The inputs of one call of the model in training."""
    return next(iter(task.loader("train", config.batch_size, None))).inputs


@contextmanager
def _refusing(config: RunConfig, task: Task, what: str) -> Iterator[None]:
    """A conv's own complaint, as one about the configuration."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        if not isinstance(config, GraphConfig) or config.model is not None:
            raise
        raise ValueError(
            f"conv: got {', '.join(config.conv)}, expected one that {what} with these sizes and data "
            f"({type(error).__name__}: {error})"
        ) from error


def matched_width(config: RunConfig, task: Task) -> int:
    """The hidden width at which the dense model costs what the MoE ``equal_to`` costs, to 2 % or the nearest width.

    With attention heads, which divide it, their nearest multiple.
    """
    twin = build_twin(config, task)
    step = config.heads if isinstance(config, GraphConfig) else 1

    def dense(steps: int) -> nn.Module:
        return _build(_without_experts(config, steps * step), task)

    if config.equal == "parameters":
        target = float(num_parameters(twin))
        return step * gmoe.match_width(lambda steps: num_parameters(dense(steps)), target, tolerance=0.5)
    inputs = example(config, task)
    target = float(flops(twin, inputs))
    return step * gmoe.match_width(lambda steps: flops(dense(steps), inputs), target, tolerance=0.5)


def build_twin(config: RunConfig, task: Task) -> nn.Module:
    """The MoE that a dense baseline is matched to."""
    scale: dict[str, Any] = {"mlp_scale": 1.0} if isinstance(config, ImageConfig) else {}
    return _build(replace(config, router=config.equal_to, equal=None, **scale), task)


def matched_ratio(config: RunConfig, task: Task, model: nn.Module) -> float | None:
    """Cost of a matched dense baseline over that of its MoE: 1 but for what whole widths cannot meet."""
    if config.equal is None:
        return None
    twin = build_twin(config, task)
    if config.equal == "parameters":
        return num_parameters(model) / num_parameters(twin)
    inputs = example(config, task)
    return flops(model, inputs) / flops(twin, inputs)


def num_parameters(model: nn.Module) -> int:
    """All parameters."""
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def flops(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Active FLOPs of one forward pass in training mode; of a copy, since it moves counters and fills convs' caches."""
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
        made = gmoe.ROUTERS[router] if isinstance(router, str) else router
        if made is not None and "check_finite" in inspect.signature(made).parameters:  # others may not have it
            router_kwargs["check_finite"] = config.check_finite
        return gmoe.ViTMoE(
            vit_size(config, task.in_channels),
            task.num_classes,
            router,
            blocks=config.moe_blocks or None,
            **common,
        )
    assert isinstance(config, GraphConfig | HeteroConfig)
    common |= {
        "in_proj": config.in_proj,
        "norm": config.norm,
        "residual": config.residual,
        "check_finite": config.check_finite,
    }
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
    return gmoe.GNNMoE(
        task.in_channels,
        config.hidden,
        task.num_classes,
        config.layers,
        conv=kinds_of_experts(config),
        router=router,
        shared_router=config.shared_router,
        jk=config.jk,
        input_dropout=config.input_dropout,
        **common,
        **_conv_kwargs(config, task),
    )


def vit_size(config: ImageConfig, image_size: int) -> ViTSize:
    """The sizes of the ViT: those of the image size's preset, but for what is given.

    Raises:
        ValueError: an image size without a preset, and not all of patch, width and heads are given.
    """
    from gmoe.models.vit import SIZES, ViTSize  # torchvision, which graphs do without

    given = {"patch_size": config.patch, "hidden_dim": config.dim, "num_heads": config.vit_heads}
    sizes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    sizes |= {"mlp_dim": config.hidden, "num_layers": config.layers}
    if image_size in SIZES:
        return replace(SIZES[image_size], **sizes)
    if None in given.values():
        raise ValueError(
            f"image_size: got {image_size}, expected patch, dim and vit_heads with it, or one of {sorted(SIZES)}"
        )
    return ViTSize(image_size=image_size, **sizes)


def kinds_of_experts(config: GraphConfig) -> str | list[str]:
    """The conv of all experts, or the kind of each; the first alone for the dense model.

    Raises:
        ValueError: a number of experts in which the kinds do not go evenly.
    """
    if len(config.conv) == 1 or config.router == "dense":
        return config.conv[0]
    times, rest = divmod(config.experts, len(config.conv))
    if rest:
        raise ValueError(f"experts: got {config.experts}, expected a multiple of the {len(config.conv)} kinds of conv")
    return list(config.conv) * times


def _conv_kwargs(config: GraphConfig, task: Task) -> dict[str, Any]:
    """Arguments that every kind of conv takes."""
    found: dict[str, Any] = {}
    takes = [frozenset(inspect.signature(CONVS[kind].__init__).parameters) for kind in config.conv if kind in CONVS]
    if config.conv == ("sage",):
        found["aggr"] = "mean"
    if config.heads > 1:
        if not all("heads" in names for names in takes) or len(takes) < len(config.conv):
            raise ValueError(f"heads: got {config.heads}, but {' or '.join(config.conv)} takes none")
        found["heads"] = config.heads
    if config.sampling == config.evaluation == "full" and config.conv == ("gcn",):
        found["cached"] = True  # there is one graph only: for the dense model, whose convs are PyG's
    return found


def _router(config: RunConfig, task: Task) -> tuple[str | Callable[..., Router] | None, dict[str, Any]]:
    """The router by name or factory, and its options."""
    given = config.options.given()
    if config.router == "dense":
        if given:
            raise ValueError(f"options: got {given} with router='dense', expected none")
        return None, {}
    known: Any
    if ":" in config.router:
        router = known = load_object("router", config.router)
        if not (isinstance(known, type) and issubclass(known, Router)):
            raise ValueError(f"router: got {config.router!r}, expected a subclass of gmoe.Router")
    elif config.router == "oracle":
        if task.planted is None:
            raise ValueError(f"router: got 'oracle' for {task.name}, expected another, since no routing is planted")
        if config.experts != int(task.planted.max()) + 1:
            raise ValueError(f"experts: got {config.experts}, expected the {int(task.planted.max()) + 1} planted ones")
        router = known = partial(OracleRouter, assignment=task.planted)
    else:
        router, known = config.router, gmoe.ROUTERS[config.router]
    legal = set(inspect.signature(known).parameters)
    for name, value in given.items():
        if name not in legal:
            raise ValueError(f"{name}: got {value!r}, but the router {config.router!r} has no such option")
    if given.get("balance") == "none":
        given["balance"] = None
    return router, given


@torch.no_grad()
def init_centroids(model: nn.Module, inputs: tuple[Tensor, ...], seed: int) -> None:
    """Begin every multi-centroid router with the k-means centroids of what it sees, in one forward pass.

    Raises:
        ValueError: the model has no such router.
    """
    copied = copy.deepcopy(model).train()  # whose counters, norms and caches may move
    routers = [module for module in copied.modules() if isinstance(module, gmoe.MultiCentroid)]
    if not routers:
        raise ValueError("kmeans_init: got True, expected False, since the model has no multi-centroid router")

    def begin(router: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(router, gmoe.MultiCentroid)
        router.init_from_data(args[0], seed=seed)

    for router in routers:
        router.register_forward_pre_hook(begin)
    copied(*inputs)  # in training, since threshold inference has no cut scores yet
    begun = {name: value for name, value in copied.state_dict().items() if name.endswith(("centroid", "center_D"))}
    model.load_state_dict({**model.state_dict(), **begun})
