"""Presets leave to the library what it has a default for; variants of studies say all that they rely on."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch_geometric.data import HeteroData
from torchmetrics.classification import MulticlassAccuracy

import gmoe
from experiments import build
from experiments.config import HeteroConfig, ImageConfig, ImageSetConfig, RunConfig
from experiments.data import Task
from experiments.presets import PRESETS
from experiments.studies import STUDIES

STUDIED: dict[str, RunConfig] = {
    f"{name}/{variant.name}": variant.config for name, study in STUDIES.items() for variant in study.variants
}
LEFT_TO_THE_LAYER = {"router_input", "shared_expert", "dense_start", "weight", "balance"}


def task_of(config: RunConfig) -> Task:
    """Data of the right kind, of which only sizes are known."""
    images = isinstance(config, ImageConfig)
    graph = None
    if isinstance(config, HeteroConfig):
        graph = HeteroData({"paper": {"x": torch.zeros(2, 5)}})
        graph["paper", "cites", "paper"].edge_index = torch.zeros(2, 1, dtype=torch.long)
    return Task(
        name=config.dataset,
        kind="image" if images else "graph" if graph is None else "hetero",
        in_channels=32 if images else 5 if graph is None else {"paper": 5},
        num_classes=3,
        metric_name="accuracy",
        metric=lambda: MulticlassAccuracy(num_classes=3),
        loader=lambda *_: iter(()),
        graph=graph,
        target=None if graph is None else "paper",
        planted=torch.arange(config.experts),
    )


def calls(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """The arguments with which the model of a run, and a router of it, are built, by class."""
    if isinstance(config, ImageConfig):
        config = replace(config, mlp_scale=1.0)
    if config.equal is not None:  # of a dense model that is matched, those of the MoE that it is matched to
        config = replace(config, router=config.equal_to, equal=None)
    found: dict[str, dict[str, Any]] = {}

    def record(cls: type) -> Any:
        def called(*args: Any, **kwargs: Any) -> torch.nn.Module:
            call = inspect.signature(cls).bind(*args, **kwargs).arguments
            found[cls.__name__] = call | call.pop("conv_kwargs", {}) | call.pop("moe_kwargs", {})
            return torch.nn.Module()

        return called

    with monkeypatch.context() as patch:
        for name in ("GNNMoE", "HeteroGNNMoE", "ViTMoE"):
            patch.setattr(gmoe, name, record(getattr(gmoe, name)))
        build.build_model(config, task_of(config))
    ((_, call),) = found.items()
    router, kwargs = call.pop("router"), call.pop("router_kwargs", None) or {}
    if router is not None:
        make = gmoe.ROUTERS[router] if isinstance(router, str) else router
        found[make.__name__ if isinstance(make, type) else "OracleRouter"] = kwargs
    return found


@pytest.mark.parametrize("name", STUDIED)
def test_studies_leave_nothing_to_the_library(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for part, arguments in calls(STUDIED[name], monkeypatch).items():
        takes = {"shared_expert", "dense_start"} if part == "GNNMoE" else set()
        takes |= set(inspect.signature(getattr(gmoe, part)).parameters)
        assert takes & LEFT_TO_THE_LAYER <= set(arguments)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_leave_routing_to_the_library(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PRESETS[name][1]
    for call in calls(config, monkeypatch).values():
        assert not LEFT_TO_THE_LAYER & set(call)
    model = {ImageConfig: gmoe.ViTMoE, ImageSetConfig: gmoe.ViTMoE, HeteroConfig: gmoe.HeteroGNNMoE}
    default = inspect.signature(model.get(type(config), gmoe.GNNMoE)).parameters["router"].default
    assert (config.router, config.equal_to) == (default, default)
