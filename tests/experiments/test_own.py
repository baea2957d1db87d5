"""Routers, models and loggers that are named on the command line."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments.config import load_object
from experiments.train import main
from tests.experiments.command import QUICK, quick, refused

SOURCE = """
import torch
from torch import nn
from torch_geometric.nn import GraphSAGE

import gmoe


class FirstBits(gmoe.Router):
    def __init__(self, dim, num_experts, k=1):
        super().__init__(dim, num_experts, k, weight="score")
        self.scale = nn.Parameter(torch.ones(()))

    def reset_parameters(self):
        nn.init.ones_(self.scale)

    def route(self, x_TD, group, edge_index):
        expert_TK = (torch.arange(len(x_TD)) % 2)[:, None]
        return gmoe.Routing.from_choices(expert_TK, self.scale.expand(len(x_TD), 1), self.num_experts)


def sage(in_channels, num_classes):
    return GraphSAGE(in_channels, 8, 2, num_classes)


def moe(in_channels, num_classes):
    return gmoe.GNNMoE(in_channels, 8, num_classes, 2, num_experts=3)


def flat(image_size, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(image_size**2, num_classes))


def nothing(*sizes):
    return 3
"""


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_own.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, "users_own", raising=False)


@pytest.mark.parametrize("preset", ["digits-graph", "digits"])
def test_a_router(preset: str, tmp_path: Path) -> None:
    args = ("--router", "users_own:FirstBits", "--experts", "4", "--layers", "2", "--hidden", "16")
    summary = quick(tmp_path / "run", *args, preset=preset)
    assert summary["config"]["router"] == "users_own:FirstBits"
    assert all(layer["dead"]["mean"] == 2 for layer in summary["routing"])
    assert all(layer["experts_per_token"]["mean"] == 1 for layer in summary["routing"])


def test_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another folder than the working directory, and with a name that a module has."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "json.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    main(["digits-graph", "--router", "elsewhere/json.py:FirstBits", *QUICK, "--seeds", "0"])
    assert (tmp_path / "runs" / "digits-graph-json.FirstBits" / "summary.json").exists()
    assert load_object("model", f"{folder}/json.py:sage") is load_object("model", "elsewhere/json.py:sage")


@pytest.mark.parametrize(
    ("preset", "name", "layers"), [("digits-graph", "sage", 0), ("digits-graph", "moe", 1), ("digits", "flat", 0)]
)
def test_a_model(preset: str, name: str, layers: int, tmp_path: Path) -> None:
    summary = quick(tmp_path / "run", "--model", f"users_own:{name}", preset=preset)
    assert len(summary["routing"]) == layers
    assert summary["test"]["mean"] > 0.05


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--router", "nobodys:Router"], "router: got 'nobodys:Router', which cannot be imported"),
        (["--router", "users_own:Nothing"], "router: got 'users_own:Nothing', which cannot be imported"),
        (["--router", "users_own:sage"], "expected a subclass of gmoe.Router"),
        (["--router", "token-choice"], "router: got 'token-choice', expected dense, token_choice"),
        (["--router", "users_own:FirstBits", "--balance", "bias"], "balance: got 'bias', but the router"),
        (["--model", "users_own:nothing"], "returns a int, expected an nn.Module"),
        (["--model", "sage"], "model: got 'sage', expected package.module:name"),
        (["--logger", "wandb"], "logger: got 'wandb', which needs its package: pip install wandb"),
    ],
)
def test_what_is_no_router_model_or_logger(
    args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.config.importlib.util.find_spec", lambda _: None)
    assert message in refused(["digits-graph", *QUICK, "--out", str(tmp_path / "run"), *args], capsys)
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_figures_and_routing(tmp_path: Path) -> None:
    quick(tmp_path / "run", "--logger", "tensorboard", "--router", "expert_choice", "--hidden", "16")
    events = EventAccumulator(str(tmp_path / "run" / "seed-0" / "tensorboard")).Reload()
    assert {"loss", "val", "lr", "layer_0/load_0", "layer_0/entropy"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("val")] == [0, 1, 2]
