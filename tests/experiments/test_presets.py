"""Presets leave to the library what it has a default for; variants of studies say all that they rely on."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

import gmoe
from experiments.config import GraphConfig, HeteroConfig, ImageConfig, RunConfig
from experiments.presets import PRESETS
from experiments.studies import RECORDED, recorded

STUDIED: dict[str, RunConfig] = {
    f"{name}/{variant.name}": variant.config for name in RECORDED for variant in recorded(name, Path()).variants
}


@pytest.mark.parametrize("name", STUDIED)
def test_studies_leave_nothing_to_the_library(name: str) -> None:
    config = STUDIED[name]
    router = config.router if config.equal is None else config.equal_to  # of a matched model, what it is matched to
    made = gmoe.OracleRouter if router == "oracle" else gmoe.ROUTERS.get(router)
    takes = set() if made is None else {"weight", "balance"} & inspect.signature(made).parameters.keys()
    assert takes <= config.options.given().keys()
    layers = {"shared_expert", "dense_start"} | ({"router_input"} if isinstance(config, GraphConfig) else set())
    assert config.layer_options().keys() == layers


@pytest.mark.parametrize("name", PRESETS)
def test_presets_leave_routing_to_the_library(name: str) -> None:
    config = PRESETS[name][1]
    assert config.layer_options() == config.options.given() == {}
    models = {ImageConfig: gmoe.ViTMoE, HeteroConfig: gmoe.HeteroGNNMoE, GraphConfig: gmoe.GNNMoE}
    (model,) = (model for kind, model in models.items() if isinstance(config, kind))
    default = inspect.signature(model).parameters["router"].default
    assert (config.router, config.equal_to) == (default, default)
