"""Models saved to a folder, loaded again, and pushed."""

from __future__ import annotations

import copy
import json
import pickle
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import Tensor, nn
from torch_geometric.nn import GCNConv, SAGEConv

import gmoe
from gmoe.hub import card, recorded
from gmoe.routers import TokenChoice

X, EDGES = torch.randn(40, 16, dtype=torch.float64), torch.randint(40, (2, 160))
IMAGES = torch.randn(4, 1, 8, 8, dtype=torch.float64)


class MyRouter(TokenChoice):
    """Somebody's own."""


class Narrow(gmoe.GNNMoE):
    """A subclass that records its own arguments."""

    def __init__(self, in_channels: int, conv: Any = "gcn") -> None:
        config = recorded(locals())
        super().__init__(in_channels, 8, 3, conv=conv)
        self.config = config


class Forgetful(gmoe.GNNMoE):
    """One that does not."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 8, 3)


def lazy_sage(in_channels: int, out_channels: int) -> SAGEConv:
    """A conv whose widths the first call fills in."""
    return SAGEConv(-1, out_channels)


GNNS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "kinds": {"conv": ["gcn", SAGEConv, "mlp", partial(gmoe.FilterConv, filter="high_pass")], "k": 2},
    "router class": {"router": gmoe.ExpertChoice, "router_kwargs": {"inference": "threshold", "normalize": "tokens"}},
    "shared router": {"shared_router": True, "router_input": ("node", "neighbors", "degree"), "num_layers": 3},
    "centroids": {"router": "multi_centroid", "router_kwargs": {"num_centroids": 2}, "shared_expert": False},
    "votes": {"router": "attention_vote", "router_kwargs": {"scope": "neighbors"}},
    "conv options": {"conv": "gat", "heads": 2, "negative_slope": 0.3, "norm": "batch_norm", "jk": "cat", "act": None},
    "shared conv": {"conv": "gcn", "shared_expert": SAGEConv, "in_proj": True, "act": nn.functional.leaky_relu},
    "dense": {"router": None, "residual": "linear"},
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


@pytest.mark.parametrize("options", GNNS.values(), ids=GNNS)
def test_a_gnn_comes_back(options: dict[str, Any], tmp_path: Path) -> None:
    model = moved(gmoe.GNNMoE(16, 8, 3, **options).double(), X, EDGES)
    assert model.save_pretrained(tmp_path / "model") == tmp_path / "model"
    check_same(model, gmoe.GNNMoE.from_pretrained(tmp_path / "model"), X, EDGES)


@pytest.mark.parametrize(
    "options",
    [
        {"size": 8},
        {"size": gmoe.ViTSize(image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24)},
        {"size": 8, "router": "token_choice", "k": 2, "blocks": (0, -1), "router_kwargs": {"balance": "switch"}},
        {"size": 8, "router": None, "dropout": 0.1},
    ],
)
def test_a_vit_comes_back(options: dict[str, Any], tmp_path: Path) -> None:
    model = moved(gmoe.ViTMoE(**options).double(), IMAGES)
    model.save_pretrained(tmp_path)
    check_same(model, gmoe.ViTMoE.from_pretrained(str(tmp_path)), IMAGES)


def test_counters_come_back_too(tmp_path: Path) -> None:
    """The balance of token choice and the thresholds of expert choice have moved, and training goes on from there."""
    for router, kwargs, buffer in (
        ("token_choice", {}, "bias"),
        ("expert_choice", {"inference": "threshold"}, "thresh"),
    ):
        model = moved(gmoe.GNNMoE(16, 8, 3, router=router, router_kwargs=kwargs).double(), X, EDGES)
        model.save_pretrained(tmp_path)
        assert any(value.abs().sum() > 0 for name, value in model.named_buffers() if buffer in name)
        loaded = gmoe.GNNMoE.from_pretrained(tmp_path)
        goes_on: list[Tensor] = []
        for each in (model, loaded):
            torch.manual_seed(1)
            goes_on.append(moved(each.train(), X, EDGES)(X, EDGES))
        assert torch.equal(*goes_on)


def test_half_precision_keeps_float_counters(tmp_path: Path) -> None:
    model = gmoe.GNNMoE(16, 8, 3).bfloat16().eval()
    assert len({value.dtype for value in model.state_dict().values() if value.is_floating_point()}) == 2
    model.save_pretrained(tmp_path)
    check_same(model, gmoe.GNNMoE.from_pretrained(tmp_path), X.bfloat16(), EDGES)


def test_lazy_widths_come_back_once_they_are_filled_in(tmp_path: Path) -> None:
    model = gmoe.GNNMoE(16, 8, 3, conv=lazy_sage, num_experts=2)
    with pytest.raises(ValueError, match=r"model: got convs.*without values"):
        model.save_pretrained(tmp_path)
    model(X.float(), EDGES)
    moved(model, X.float(), EDGES).save_pretrained(tmp_path)
    check_same(model, gmoe.GNNMoE.from_pretrained(tmp_path, conv=lazy_sage), X.float(), EDGES)


# What has no name


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("router", {"router": lambda *args, **kwargs: TokenChoice(*args, **kwargs)}),
        ("conv", {"conv": ["gcn", lambda a, b: GCNConv(a, b)]}),
        ("router", {"router": TokenChoice(16, 8)}),
        ("act", {"act": nn.ReLU()}),
        ("shared_expert", {"shared_expert": partial(lambda a, b: GCNConv(a, b))}),
        ("negative_slope", {"conv": "gat", "negative_slope": float("inf")}),
    ],
)
def test_an_argument_without_a_name_is_refused(argument: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = gmoe.GNNMoE(16, 8, 3, **options)
    with pytest.raises(ValueError, match=f"^{argument}: got "):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_class_of_a_script_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(MyRouter, "__module__", "__main__")
    with pytest.raises(ValueError, match="no other program can import"):
        gmoe.GNNMoE(16, 8, 3, router=MyRouter).save_pretrained(tmp_path)


def test_a_converted_gnn_is_refused(tmp_path: Path) -> None:
    from torch_geometric.nn import GCN

    model: Any = gmoe.moefy(GCN(16, 8, 2, 3))
    with pytest.raises(ValueError, match=r"^conv: got an instance of DenseLayers"):
        model.save_pretrained(tmp_path)


def test_recording_keeps_a_model_picklable() -> None:
    model = gmoe.ViTMoE(8, router=lambda *args, **kwargs: TokenChoice(*args, **kwargs))
    assert pickle.loads(pickle.dumps(model)).config == copy.deepcopy(model).config == model.config


# One's own


def test_own_classes_come_from_the_caller_alone(tmp_path: Path) -> None:
    model = gmoe.GNNMoE(16, 8, 3, router=MyRouter).double().eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^router: got .*:MyRouter, expected router= in the call"):
        gmoe.GNNMoE.from_pretrained(tmp_path)
    check_same(model, gmoe.GNNMoE.from_pretrained(tmp_path, router=MyRouter), X, EDGES)


@pytest.mark.parametrize(
    "value",
    [
        {"$import": "os:system"},
        {"$import": "torch.nn.modules.module:functools.partial"},
        {"$import": "torch.nn.parallel.distributed:os"},
        {"$import": "gmoe.hub:recorded"},
        {"$import": "gmoex:Router"},
        {"$partial": [{"$import": "subprocess:run"}, ["true"], {}]},
        {"$dataclass": "os:system", "fields": {"command": "true"}},
    ],
)
def test_a_configuration_imports_layers_alone(value: Any, tmp_path: Path) -> None:
    """It may come from the network."""
    gmoe.GNNMoE(16, 8, 3).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["arguments"]["conv"] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"^conv: got"):
        gmoe.GNNMoE.from_pretrained(tmp_path)


def test_a_subclass_records_its_own_arguments(tmp_path: Path) -> None:
    model = Narrow(16, conv="sage").double().eval()
    model.save_pretrained(tmp_path)
    check_same(model, Narrow.from_pretrained(tmp_path), X, EDGES)
    with pytest.raises(ValueError, match="folder: got a Narrow, expected a GNNMoE"):
        gmoe.GNNMoE.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model: got Forgetful"):
        Forgetful(16).save_pretrained(tmp_path)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    gmoe.GNNMoE(16, 8, 3).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        gmoe.GNNMoE.from_pretrained(tmp_path, hidden_channels=12)


# The Hub, which no test reaches


def test_push_uploads_what_save_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None) -> None:
            seen["token"] = token

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            seen["create"] = options
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, *, folder_path: str, **options: Any) -> Any:
            seen["files"] = {path.name for path in Path(folder_path).iterdir()}
            seen["upload"] = options
            return SimpleNamespace(commit_url="the commit")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert gmoe.ViTMoE(8).push_to_hub("digits", private=True, token="secret") == "the commit"
    assert seen["files"] == {"config.json", "model.safetensors", "README.md"}
    assert seen["create"] == {"private": True, "exist_ok": True}
    assert seen["upload"] == {"repo_id": "me/digits", "commit_message": "Push model", "revision": None}
    assert seen["token"] == "secret"


def test_a_repository_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gmoe.ViTMoE(8).save_pretrained(tmp_path)

    def download(name: str, revision: str | None, allow_patterns: list[str], **_: Any) -> str:
        assert (name, revision, allow_patterns) == ("me/digits", "v1", ["config.json", "model.safetensors"])
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert isinstance(gmoe.ViTMoE.from_pretrained("me/digits", revision="v1"), gmoe.ViTMoE)


# The card


def figures(mean: float, std: float | None = 0.01, n: int = 3) -> dict[str, Any]:
    return {"mean": mean, "std": std, "n": n, "values": [mean] * n}


def summary_of(router: str, test: float, **changes: Any) -> dict[str, Any]:
    config = {"dataset": "cifar10", "router": router, "experts": 8, "k": 1, "seeds": [0, 1, 2], "epochs": 5}
    config |= {"val_share": 0.1, "split_seed": 7}
    found = {"metric": "accuracy", "val": figures(0.5), "test": figures(test), "flops": 123_456}
    found |= {"parameters": 2000, "active_parameters": 1000, "config": config}
    return found | {"environment": {"commit": "abc", "versions": {"torch": "2"}, "gpu": None, "cpu": "CPU"}} | changes


def test_the_card_tells_what_the_run_came_to(tmp_path: Path) -> None:
    summary, dense = summary_of("token_choice", 0.8125), summary_of("dense", 0.75)
    dense["test"] = figures(0.75, None, 1)
    gmoe.ViTMoE(8).save_pretrained(tmp_path, summary=summary, dense=dense)
    text = (tmp_path / "README.md").read_text()
    metadata: Any = huggingface_hub.ModelCard(text).data
    assert metadata.library_name == "gmoe"
    for expected in (
        'gmoe.ViTMoE.from_pretrained("',
        "| | this model | dense baseline |",
        "| test accuracy (%) | 81.25 ± 1.00 (n = 3) | 75.00 (n = 1) |",
        "| active FLOPs of a forward | 123,456 | 123,456 |",
        "cifar10; split: 10% of the training images validate (seed 7)",
        "Seeds: 0, 1, 2; epochs: 5.",
    ):
        assert expected in text


@pytest.mark.parametrize("study", ["cifar10", "digits-graph"])
def test_the_card_reads_what_runs_write(study: str) -> None:
    results = json.loads((Path(__file__).parents[2] / "results" / f"{study}.json").read_text())
    summary, dense = results["variants"][-1], results["variants"][0]
    assert f"Data: {study}; split" in card(gmoe.ViTMoE(8), summary, dense)


def test_the_card_refuses_another_kind_of_baseline() -> None:
    model, summary = gmoe.ViTMoE(8), summary_of("token_choice", 0.8)
    with pytest.raises(ValueError, match=r"^dense: got a run of metric roc_auc"):
        card(model, summary, summary_of("dense", 0.7, metric="roc_auc"))
    with pytest.raises(ValueError, match=r"^summary: got None"):
        card(model, dense=summary)
