"""What a model of somebody else's does around layers with experts, where their tokens compete.

A conv that was replaced sees what the model hands to it: not which nodes are of which graph, and
not that its nodes are a part of a graph. A router that decides token by token needs neither.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor, nn

from gmoe._checks import INTEGERS
from gmoe._torch import forward_hooks
from gmoe.moe import MoELayer
from gmoe.routers.from_call import Argument

LEGAL = (
    "a router that decides token by token (token choice, centroids, random, uniform, or expert "
    "choice with inference='threshold'), or GNNMoE"
)

REASONS = {
    "batch": "graphs, of which the layers do not hear, so that all graphs' nodes would compete",
    "num_sampled_nodes_per_hop": "a graph that is trimmed between layers, whose nodes compete",
    "num_sampled_edges_per_hop": "a graph that is trimmed between layers, whose nodes compete",
}
"""What a model is called with under these names, and why it is refused."""


def guard(model: nn.Module, layers: Iterable[MoELayer]) -> None:
    """Let a model refuse calls in which its layers would compete among the wrong nodes.

    It and the models in it that hold one of the layers refuse the arguments of :data:`REASONS`, and
    a method ``inference`` that runs the layers part by part.

    Args:
        model: a GNN.
        layers: with experts; those whose routers decide token by token are passed over.
    """
    competing = [
        layer for layer in layers if layer.router is not None and not layer.router.by_token
    ]
    host: Any
    for host in model.modules():
        inside = [*host.modules()]
        if isinstance(host, MoELayer) or not any(layer in inside for layer in competing):
            continue
        parameters = inspect.signature(host.forward).parameters
        names = [name for name in REASONS if name in parameters]
        refuse = _Refuse(tuple(Argument.of("model", name, host) for name in names))
        hooks, _ = forward_hooks(host)
        if names and refuse not in hooks.values():
            host.register_forward_pre_hook(refuse, with_kwargs=True)
        if _runs_by_parts(host):
            host.inference = _refuse_inference  # a function, which is copied and pickled by name


def _runs_by_parts(host: Any) -> bool:
    """True for a model that has PyG's layer-wise inference, or one of its own over a loader."""
    method = getattr(host, "inference", None)
    if not inspect.ismethod(method):
        return False
    return any("loader" in name for name in inspect.signature(method).parameters)


def _refuse_inference(*_: object, **__: object) -> NoReturn:
    raise ValueError(
        "inference: got layers in which nodes compete for experts, and which would see a part of "
        f"the graph at a time, expected a call of the model with the whole graph, or {LEGAL}"
    )


@dataclass(frozen=True)
class _Refuse:
    """Refuse arguments of a model, as a hook before its forward."""

    arguments: tuple[Argument, ...]

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        for argument in self.arguments:
            value = argument.given(args, kwargs)
            # A batch of images may have the same name.
            is_of_nodes = isinstance(value, Tensor) and value.dtype in INTEGERS and value.dim() == 1
            if is_of_nodes or isinstance(value, list):
                raise ValueError(
                    f"{argument.name}: got {REASONS[argument.name]}, expected None, or {LEGAL}"
                )
