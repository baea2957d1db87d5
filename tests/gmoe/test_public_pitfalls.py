"""What public MoE layers get wrong, through our public classes; see ``contract.py`` and ``test_support.py`` too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gmoe import GNNMoE, MLPExperts, MoE, MoEConv, build_router
from tests.gmoe.conv.masked import features, random_graph

T, D, E = 12, 8, 4
EDGES = random_graph(T, T, 40)


def layers(router: str = "token_choice", **kwargs: Any) -> dict[str, tuple[nn.Module, Callable[..., Any]]]:
    """A layer of each kind with that router, and how to call it on (T, D) tokens."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"num_experts": E, "router": router, "router_kwargs": kwargs, "shared_expert": False}
    made: dict[str, nn.Module] = {
        "MoE": MoE(build_router(router, D, E, 1, kwargs), MLPExperts(D, 16, D, E)),
        "MoEConv": MoEConv("gcn", D, D, **options),
        "GNNMoE": GNNMoE(D, D, 3, 3, **options),
        "GNNMoE shared router": GNNMoE(D, D, 3, 3, shared_router=True, **options),
    }
    return {name: (layer, layer if name == "MoE" else partial(layer, edge_index=EDGES)) for name, layer in made.items()}


@pytest.mark.parametrize(
    ("router", "kwargs", "counter"),
    [("token_choice", {"noise": False}, "bias_E"), ("expert_choice", {"inference": "threshold"}, "threshold_E")],
)
def test_counters_advance_once_under_reentrant_checkpointing(router: str, kwargs: dict[str, Any], counter: str) -> None:
    """Of the other checkpointing see ``is_checkpointed`` in ``tests/contract.py``."""
    for name, (layer, call) in layers(router, **kwargs).items():
        twin = copy.deepcopy(layer)
        for step in range(2):
            x = features(T, D, seed=step).float().requires_grad_()
            call(x).sum().backward()
            args = (x,) if name == "MoE" else (x, EDGES)
            checkpoint(twin, *args, use_reentrant=True).sum().backward()
        buffers = dict(twin.named_buffers())
        assert any(counter in key and bool(value.any()) for key, value in buffers.items()), name
        assert all(torch.equal(value, buffers[key]) for key, value in layer.named_buffers()), name
