"""Models of gmoe that save themselves: what comes back, and what happens to damaged files."""

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
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn
from torch_geometric.nn import SAGEConv
from torch_geometric.nn.models import GCN

import gmoe
from tests.helpers.command import full_disk
from tests.helpers.vits import SMALL_VIT

X, EDGES = torch.randn(40, 16, dtype=torch.float64), torch.randint(40, (2, 160))
IMAGES = torch.randn(4, 1, 8, 8, dtype=torch.float64)


GNN = partial(gmoe.GNNMoE, 16, 8, 3)
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "kinds": (GNN, {"conv": ("gcn", SAGEConv, "graph"), "k": 2}),
    "a conv's class": (GNN, {"conv": SAGEConv}),
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
        {"size": SMALL_VIT, "router": "token_choice", "k": 2, "router_kwargs": {"z_coef": 0.1}},
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


def test_dtypes_come_back(tmp_path: Path) -> None:
    model = moved(gmoe.ViTMoE(8), IMAGES.float()).bfloat16()
    model.save_pretrained(tmp_path)
    check_same(model, gmoe.ViTMoE.from_pretrained(tmp_path), IMAGES.bfloat16())


def test_a_model_of_gmoe_that_was_moefied_comes_back(tmp_path: Path) -> None:
    """Its constructor builds the dense model."""
    model: Any = gmoe.moefy(gmoe.ViTMoE(8, router=None), num_experts=2, start="copies")
    model.save_pretrained(tmp_path)
    for loaded in (gmoe.load(tmp_path), gmoe.ViTMoE.from_pretrained(tmp_path)):
        check_same(model.eval(), loaded, IMAGES.float())


def test_a_model_that_a_file_cannot_describe_comes_back_on_its_base(tmp_path: Path) -> None:
    """It has no other door."""
    build = partial(GNN, act=nn.Tanh())
    model = build().double().eval()
    with pytest.raises(ValueError, match=r"^act: got an instance of Tanh"):
        model.save_pretrained(tmp_path / "hub")
    assert not (tmp_path / "hub").exists()
    gmoe.save(model, tmp_path)
    check_same(model, gmoe.load(tmp_path, build()), X, EDGES)
    with pytest.raises(ValueError, match=r"^base: got None, .*a GNNMoE"):
        gmoe.load(tmp_path)


CHANGED: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "selection.capacity_factor": (
        partial(GNN, router="expert_choice", start="shared", shared_router=True),
        lambda model: setattr(model.shared_router.selection, "capacity_factor", 2.0),
    ),
    "capacity_factor": (
        partial(gmoe.ViTMoE, 8, router="token_choice"),
        lambda model: setattr(model.encoder.layers[1].mlp.router, "capacity_factor", 2.0),
    ),
    "act": (GNN, lambda model: setattr(model, "act", nn.Tanh())),
    r"norms\.0\.eps": (
        partial(GNN, norm="layer"),
        lambda model: setattr(model.norms[0], "eps", 0.1),
    ),
    r"convs\.1\.normalize": (GNN, lambda model: setattr(model.convs[1], "normalize", False)),
    "router_input": (GNN, lambda model: setattr(model, "router_input", ("degree",))),
    r"dropout\.p": (GNN, lambda model: setattr(model.dropout, "p", 0.5)),
}


@pytest.mark.parametrize("option", CHANGED)
def test_an_option_that_was_changed_is_refused(option: str, tmp_path: Path) -> None:
    """The configuration would not hold it."""
    make, change = CHANGED[option]
    model = make()
    model.save_pretrained(tmp_path)
    change(model)
    for write in (model.save_pretrained, partial(gmoe.save, model)):
        with pytest.raises(ValueError, match=rf"(^|\.| ){option}(, |: got )\S+.* expected "):
            write(tmp_path)


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
    assert files == {"config.json", "model.safetensors"}
    api.return_value.create_repo.assert_called_once_with("digits", private=True, exist_ok=True)


def test_a_repository_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gmoe.ViTMoE(8).save_pretrained(tmp_path)

    def download(name: str, revision: str | None, allow_patterns: list[str], **_: Any) -> str:
        assert (name, revision, allow_patterns) == (
            "me/digits",
            "v1",
            ["config.json", "gmoe.json", "model.safetensors"],
        )
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert isinstance(gmoe.ViTMoE.from_pretrained("me/digits", revision="v1"), gmoe.ViTMoE)


@pytest.mark.parametrize("name", ["system", "plot", "save", "GNNMoE.__init__", "Router", "GCN"])
def test_a_class_that_gmoe_does_not_build_is_never_looked_up(name: str, tmp_path: Path) -> None:
    path = gmoe.GNNMoE(4, 4, 2, num_experts=2).save_pretrained(tmp_path) / "config.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | {"model": name}))
    said = rf"^base: got None, expected a {re.escape(name)} as it was"
    with pytest.raises(ValueError, match=said):
        gmoe.load(tmp_path)
    with pytest.raises(ValueError, match=rf"config\.json: got .*model: got {re.escape(name)}"):
        gmoe.GNNMoE.from_pretrained(tmp_path)


TAMPERED: dict[str, Callable[[Any], Any]] = {
    "no class": lambda found: found["arguments"],
    "arguments of a list": lambda found: found | {"arguments": [1]},
    "an unknown argument": lambda found: found | {"arguments": found["arguments"] | {"more": 1}},
    "experts without end": lambda found: (
        found | {"arguments": found["arguments"] | {"router_kwargs": {"num_experts": 2**40}}}
    ),
    "calls of a number": lambda found: found | {"moefy": 1},
    "experts that are not there": lambda found: found | {"kept": {"convs.0": [0, 9]}},
    "no experts": lambda found: found | {"kept": {"convs.0": []}},
    "another key": lambda found: found | {"code": "print()"},
    "more made of it": lambda found: found | {"moefy": [{"targets": ["lin"], "router": "os.x"}]},
}


@pytest.mark.parametrize("tamper", TAMPERED.values(), ids=TAMPERED)
def test_a_tampered_configuration_is_named_by_both_doors(
    tamper: Callable[[Any], Any], tmp_path: Path
) -> None:
    model = gmoe.GNNMoE(4, 4, 2, 3, num_experts=2)
    path = model.save_pretrained(tmp_path) / "config.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps(tamper(found)))
    check_refused(tmp_path, gmoe.GNNMoE, "config.json")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: got "):
        gmoe.load(tmp_path)


def test_files_of_others_stay(tmp_path: Path) -> None:
    """Only those that it writes are taken away."""
    for name in ("config.json", "README.md", "model.bin"):
        (tmp_path / name).write_text("mine")
    gmoe.save(gmoe.moefy(GCN(16, 8, 2, 3), num_experts=2), tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.read_bytes() == b"mine"} == {
        "config.json",
        "README.md",
        "model.bin",
    }
    assert gmoe.load(tmp_path, GCN(16, 8, 2, 3))


def test_a_folder_holds_the_model_that_was_saved_last(tmp_path: Path) -> None:
    """Whichever kinds of models were saved to it before."""
    base = GCN(16, 8, 2, 3)
    moefied = gmoe.moefy(GCN(16, 8, 2, 3), num_experts=2)
    own = gmoe.GNNMoE(16, 8, 3, num_experts=2)
    for model, args in ((own, ()), (moefied, (base,)), (own, ())):
        gmoe.save(model, tmp_path)
        assert type(gmoe.load(tmp_path, *args)) is type(model)


def test_a_model_whose_saving_is_cut_off_is_no_mixture(tmp_path: Path) -> None:
    """Else an earlier one's weights would meet this one's configuration."""
    first, second = (gmoe.GNNMoE(8, 16, 4, k=k, start="plain") for k in (1, 2))
    gmoe.save(first, tmp_path)
    assert isinstance(gmoe.load(tmp_path), gmoe.GNNMoE)
    with full_disk(), pytest.raises((OSError, SafetensorError)):
        gmoe.save(second, tmp_path)
    for read in (gmoe.load, gmoe.GNNMoE.from_pretrained):
        with pytest.raises((ValueError, OSError)):
            read(tmp_path)
