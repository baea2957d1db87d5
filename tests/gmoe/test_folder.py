"""Folders of models: what is in them, and what happens to those that are damaged."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import huggingface_hub
import pytest
import torch
from safetensors.torch import load, save
from torch_geometric.nn import SAGEConv

import gmoe

X, EDGES = torch.randn(40, 16, dtype=torch.float64), torch.randint(40, (2, 160))
IMAGES = torch.randn(4, 1, 8, 8, dtype=torch.float64)


GNN = partial(gmoe.GNNMoE, 16, 8, 3)
SIZE = gmoe.ViTSize(
    image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24
)
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "kinds": (GNN, {"conv": ("gcn", SAGEConv, gmoe.MLPConv, "high_pass"), "k": 2}),
    "router class": (
        GNN,
        {"router": gmoe.ExpertChoice, "router_kwargs": {"inference": "threshold"}},
    ),
    "conv options": (
        GNN,
        {"conv": "gat", "heads": 2, "negative_slope": 0.3, "norm": "batch_norm", "act": None},
    ),
    "shared router": (GNN, {"start": "plain", "shared_router": True, "router_input": ("degree",)}),
    "copies": (GNN, {"conv": "sage", "start": "copies", "k": 2, "shared_router": False}),
    "defaults": (GNN, {}),
    "shared expert": (GNN, {"start": "shared"}),
    "size": (
        gmoe.ViTMoE,
        {"size": SIZE, "router": "token_choice", "k": 2, "router_kwargs": {"z_coef": 0.1}},
    ),
    "dense ViT": (partial(gmoe.ViTMoE, 8), {"router": None, "dropout": 0.1}),
}


def moved(model: Any, *inputs: Any) -> Any:
    """The model after a few steps in which all parameters, counters and running means move."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        out, routings = model(*inputs, return_routing=True)
        (out.square().mean() + gmoe.aux_loss(routings)).backward()
        optimizer.step()
    return model.eval()


def check_same(model: Any, loaded: Any, *inputs: Any) -> None:
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype, name
        assert torch.equal(value, after[name]), name
    assert torch.equal(model(*inputs), loaded(*inputs))
    assert loaded.config == model.config
    assert not loaded.training


@pytest.mark.parametrize(("build", "options"), MODELS.values(), ids=MODELS)
def test_a_model_comes_back(build: Any, options: dict[str, Any], tmp_path: Path) -> None:
    model = build(**options).double()
    inputs = (X, EDGES) if isinstance(model, gmoe.GNNMoE) else (IMAGES,)
    moved(model, *inputs)
    assert model.save_pretrained(tmp_path / "model") == tmp_path / "model"
    check_same(model, type(model).from_pretrained(tmp_path / "model"), *inputs)


def test_arguments_may_take_the_place_of_saved_ones(tmp_path: Path) -> None:
    gmoe.GNNMoE(16, 8, 3).save_pretrained(tmp_path)
    assert gmoe.GNNMoE.from_pretrained(tmp_path, dropout=0.5).dropout.p == 0.5
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        gmoe.GNNMoE.from_pretrained(tmp_path, hidden_channels=12)


@pytest.mark.parametrize(
    "make", [partial(GNN, shared_router=True), partial(GNN, num_layers=3), partial(gmoe.ViTMoE, 8)]
)
def test_an_option_of_a_router_that_was_changed_is_refused(make: Any, tmp_path: Path) -> None:
    """The configuration would not hold it."""
    model = make(router="expert_choice", start="shared")
    model.save_pretrained(tmp_path)
    router: Any = next(part for part in model.modules() if isinstance(part, gmoe.Router))
    router.selection.capacity_factor = 2.0
    with pytest.raises(ValueError, match=r"^selection\.capacity_factor: got 2\.0 of "):
        model.save_pretrained(tmp_path)


def check_refused(folder: Path, model: Any, name: str) -> None:
    """One of two types of error, and the file in its message, which is one line."""
    where = re.escape(str(folder / name))
    with pytest.raises((ValueError, FileNotFoundError), match=rf"^[^\n]*{where}[^\n]*$") as caught:
        model.from_pretrained(folder)
    assert len(str(caught.value)) < 1_500


@pytest.mark.parametrize(
    "argument", ["conv", "router", "start", "act", "norm", "jk", "router_kwargs", "more"]
)
def test_no_code_of_a_file_runs(argument: str, tmp_path: Path) -> None:
    GNN().save_pretrained(tmp_path)
    config, code = (
        json.loads((tmp_path / "config.json").read_text()),
        f"open({str(tmp_path / 'ran')!r}, 'w')",
    )
    for value in (
        code,
        [code, f"x: {code}"],
        {"p": code},
        {"$partial": [{"$import": "builtins:open"}, ["ran", "w"]]},
    ):
        config["arguments"][argument] = value
        (tmp_path / "config.json").write_text(json.dumps(config))
        check_refused(tmp_path, gmoe.GNNMoE, "config.json")
        assert not (tmp_path / "ran").exists()


DAMAGE: list[tuple[str, Callable[[bytes], bytes]]] = [
    *(("config.json", lambda _, text=text: text) for text in (b"", b"\xff", b"[" * 100_000, b"[]")),
    *(("config.json", lambda raw, end=end: raw[:end]) for end in (-3, -2)),
    ("config.json", lambda raw: raw.replace(b"GNNMoE", b"ViTMoE")),
    ("config.json", lambda raw: raw.replace(b'"num_experts": 2', b'"num_experts": "2"')),
    ("config.json", lambda raw: raw.replace(b'"num_experts"', b'"experts"')),
    ("config.json", lambda raw: raw.replace(b'"GNNMoE"', b'"%b"' % (b"x" * 2**20))),
    *(  # as many experts, layers and so on are never allocated, nor made one by one
        ("config.json", lambda raw, size=size: re.sub(size + rb"\d+", b"%b%d" % (size, 2**40), raw))
        for size in (b'"num_experts": ', b'"num_layers": ', b'"hidden_channels": ')
    ),
    ("model.safetensors", lambda raw: bytes(len(raw))),
    ("model.safetensors", lambda raw: raw[: len(raw) // 2]),
    ("model.safetensors", pickle.dumps),
    ("model.safetensors", lambda raw: save(load(raw) | {"x": torch.zeros(1)})),
    (
        "model.safetensors",
        lambda raw: save({name: value[None].clone() for name, value in load(raw).items()}),
    ),
    (
        "model.safetensors",
        lambda raw: save({name: value.long() for name, value in load(raw).items()}),
    ),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_file_is_named(
    name: str, damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = gmoe.GNNMoE(4, 4, 2, num_experts=2).save_pretrained(tmp_path) / name
    path.write_bytes(damage(path.read_bytes()))
    check_refused(tmp_path, gmoe.GNNMoE, name)
    path.unlink()
    check_refused(tmp_path, gmoe.GNNMoE, name)
    path.mkdir()
    with pytest.raises((ValueError, IsADirectoryError), match=re.escape(str(path))):
        gmoe.GNNMoE.from_pretrained(tmp_path)


def test_push_uploads_what_save_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    api, files = MagicMock(), set[str]()
    api.return_value.create_repo.return_value.repo_id = "me/digits"

    def upload(folder_path: str, **sent: Any) -> Any:
        files.update(path.name for path in Path(folder_path).iterdir())
        assert sent == {"repo_id": "me/digits"}
        return SimpleNamespace(commit_url="the commit")

    api.return_value.upload_folder.side_effect = upload
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    assert gmoe.ViTMoE(8).push_to_hub("digits", private=True) == "the commit"
    assert files == {"config.json", "model.safetensors", "README.md"}
    api.return_value.create_repo.assert_called_once_with("digits", private=True, exist_ok=True)


def test_a_repository_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gmoe.ViTMoE(8).save_pretrained(tmp_path)

    def download(name: str, revision: str | None, allow_patterns: list[str], **_: Any) -> str:
        assert (name, revision, allow_patterns) == (
            "me/digits",
            "v1",
            ["config.json", "model*.safetensors*"],
        )
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert isinstance(gmoe.ViTMoE.from_pretrained("me/digits", revision="v1"), gmoe.ViTMoE)
