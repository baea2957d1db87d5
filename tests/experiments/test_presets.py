"""Presets leave to the library what it has a default for; variants of studies say all that they rely on."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch_geometric.data import HeteroData
from torchmetrics.classification import MulticlassAccuracy

import gmoe
from experiments import build
from experiments.config import HeteroConfig, ImageConfig, ImageSetConfig, RunConfig
from experiments.data.task import Task
from experiments.presets import PRESETS
from experiments.studies import STUDIES
from gmoe import Router

STUDIED: dict[str, RunConfig] = {
    f"{name}/{variant.name}": variant.config for name, study in STUDIES.items() for variant in study.variants
}
LEFT_TO_THE_LAYER = {"router_input", "shared_expert", "dense_start", "weight", "balance"}
EXPECTED = json.loads((Path(__file__).parent / "resolved.json").read_text())
"""Arguments of the models and their routers: ``common`` by class and by router, and what a run has in its place."""


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


def calls(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> dict[str, inspect.BoundArguments]:
    """The arguments with which the model of a run, and a router of it, are built, by class."""
    if isinstance(config, ImageConfig):
        config = replace(config, mlp_scale=1.0)
    if config.equal is not None:  # of a dense model that is matched, those of the MoE that it is matched to
        config = replace(config, router=config.equal_to, equal=None)
    found: dict[str, inspect.BoundArguments] = {}

    def record(cls: type) -> Any:
        def called(*args: Any, **kwargs: Any) -> torch.nn.Module:
            found[cls.__name__] = inspect.signature(cls).bind(*args, **kwargs)
            return torch.nn.Module()

        return called

    with monkeypatch.context() as patch:
        for name in ("GNNMoE", "HeteroGNNMoE", "ViTMoE"):
            patch.setattr(gmoe, name, record(getattr(gmoe, name)))
        build.build_model(config, task_of(config))
    ((_, call),) = found.items()
    router, kwargs = call.arguments.pop("router"), call.arguments.pop("router_kwargs") or {}
    if router is not None:
        make = gmoe.ROUTERS[router] if isinstance(router, str) else router
        signature = inspect.signature(make)
        own_k = {"k": config.k} if "k" in signature.parameters else {}
        name = make.__name__ if isinstance(make, type) else "OracleRouter"
        found[name] = signature.bind(4, config.experts, **own_k, **kwargs)
    return found


def resolve(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """The arguments of :func:`calls` with the defaults of the library filled in."""
    found: dict[str, dict[str, Any]] = {}
    for name, call in calls(config, monkeypatch).items():
        call.apply_defaults()
        found[name] = call.arguments
        if issubclass(cls := getattr(gmoe, name, torch.nn.Module), Router):
            router = cls(*call.args, **call.kwargs)
            found[name] |= {
                chosen: getattr(router, chosen) for chosen in ("weight", "noise") if hasattr(router, chosen)
            }
    plain: dict[str, dict[str, Any]] = json.loads(json.dumps(found, default=str))
    return plain


@pytest.mark.parametrize("name", STUDIED)
def test_studies_are_built_as_they_were(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = resolve(STUDIED[name], monkeypatch)
    expected = EXPECTED["runs"][name]
    assert set(found) == set(expected)
    for part, arguments in expected.items():
        before = EXPECTED["common"][part] | arguments
        assert {argument: found[part].get(argument, "not there") for argument in before} == before


@pytest.mark.parametrize("name", STUDIED)
def test_studies_leave_nothing_to_the_library(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for call in calls(STUDIED[name], monkeypatch).values():
        assert LEFT_TO_THE_LAYER & set(call.signature.parameters) <= set(call.arguments)


def test_all_studies_are_compared() -> None:
    assert set(EXPECTED["runs"]) == set(STUDIED)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_leave_routing_to_the_library(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PRESETS[name][1]
    for call in calls(config, monkeypatch).values():
        assert not LEFT_TO_THE_LAYER & set(call.arguments)
    model = {ImageConfig: gmoe.ViTMoE, ImageSetConfig: gmoe.ViTMoE, HeteroConfig: gmoe.HeteroGNNMoE}
    default = inspect.signature(model.get(type(config), gmoe.GNNMoE)).parameters["router"].default
    assert (config.router, config.equal_to) == (default, default)
