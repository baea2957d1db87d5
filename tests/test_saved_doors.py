"""Every model of every kind, whatever was done to it, through every door to a folder and back.

A model has the same outputs again, or is refused by a message that names the way out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch_geometric.nn.models import GCN
from torchvision.models import VisionTransformer

import gmoe
from gmoe.layer_groups import groups_of
from gmoe.moe import MoELayer
from gmoe.stack import become, fold, tensors_of
from tests.helpers.command import full_disk
from tests.helpers.shrunk import moved

EXPERTS, WIDTH = 4, 6
VIT = {
    "image_size": 8,
    "patch_size": 4,
    "num_layers": 4,
    "num_heads": 2,
    "hidden_dim": 8,
    "mlp_dim": 12,
}
NODES = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(0))
EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 2], [1, 2, 3, 4, 5, 6, 0, 3, 5]])
IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))

OPTIONS: dict[str, Any] = {"num_experts": EXPERTS, "start": "copies", "k": 2}


OWN: dict[str, Callable[[], nn.Module]] = {
    "GNNMoE": lambda: gmoe.GNNMoE(WIDTH, 8, 3, 3, conv="sage", **OPTIONS),
    "GNNMoE, a router a layer": lambda: gmoe.GNNMoE(
        WIDTH, 8, 3, 3, conv="gat", shared_router=False, **OPTIONS
    ),
    "ViTMoE": lambda: gmoe.ViTMoE(VIT, 3, "token_choice", **OPTIONS),
}
"""Models that know how they are built."""

DENSE: dict[str, Callable[[], nn.Module]] = {
    "PyG GCN": lambda: GCN(WIDTH, 8, 3, 3),
    "torchvision ViT": lambda: VisionTransformer(**VIT, num_classes=3),
}
"""What becomes a model with experts, and is its base."""

BASES = {**OWN, **DENSE}
"""What ``gmoe.load`` takes as the base of each model."""


def folded(model: nn.Module) -> nn.Module:
    return fold(model)


def pruned(model: nn.Module) -> nn.Module:
    for group in groups_of(model):
        group.keep((0, 1, 3))
        group.keep((0, 2))
    return model


def densified(model: nn.Module) -> nn.Module:
    """Of the layers of the first router, whose experts are made equal."""
    for layer in groups_of(model)[0].layers.values():
        become(layer.experts, tensors_of(layer.experts, 0))
    before = sum(isinstance(part, MoELayer) for part in model.modules())
    again: nn.Module = gmoe.densify(model).model
    assert sum(isinstance(part, MoELayer) for part in again.modules()) < before
    return again


STATES: dict[str, Callable[[Any], Any]] = {
    "as built": lambda model: model,
    "folded": folded,
    "pruned": pruned,
    "folded, then pruned": lambda model: pruned(folded(model)),
    "pruned, then folded": lambda model: folded(pruned(model)),
    "densified": densified,
    "in bfloat16": lambda model: model.bfloat16(),
    "pruned, in bfloat16": lambda model: pruned(model).bfloat16(),
}

SAVE: dict[str, Callable[[Any, Path], Path]] = {
    "gmoe.save": gmoe.save,
    "save_pretrained": lambda model, folder: model.save_pretrained(folder),
}
LOAD: dict[str, Callable[[Any, Path, Any], Any]] = {
    "gmoe.load": lambda _model, folder, _base: gmoe.load(folder),
    "gmoe.load, with a base": lambda _model, folder, base: gmoe.load(folder, base),
    "from_pretrained": lambda model, folder, _base: type(model).from_pretrained(folder),
}


def built(name: str) -> nn.Module:
    """With experts that differ."""
    torch.manual_seed(0)
    model = BASES[name]()
    if name in DENSE:
        model = gmoe.moefy(model, **OPTIONS)
    result: nn.Module = moved(model)
    return result


def logits(name: str, model: Any) -> Tensor:
    dtype = next(model.parameters()).dtype
    x = (IMAGES if "ViT" in name else NODES).to(dtype)
    with torch.no_grad():
        found: Tensor = model(x) if "ViT" in name else model(x, EDGES)
    return found


def check_same(name: str, model: nn.Module, again: nn.Module) -> None:
    assert type(again) is type(model)
    assert torch.equal(logits(name, again), logits(name, model))
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype, key
        assert torch.equal(value, after[key]), key


MOST_CHANGED = "pruned, then folded"
"""The state of the models that are saved by each door."""

ROUTES_IN_LAYERS = "GNNMoE, a router a layer"
"""Differs from the other GNN in what pruning and densifying meet."""

SAVED = [
    *((name, state, "gmoe.save") for name in ("GNNMoE", "ViTMoE") for state in STATES),
    *((ROUTES_IN_LAYERS, state, "gmoe.save") for state in ("pruned", "densified")),
    *((name, MOST_CHANGED, "save_pretrained") for name in OWN),
]


@pytest.mark.parametrize(("name", "state", "save"), SAVED)
def test_a_model_of_gmoe_comes_back_through_every_door(
    name: str, state: str, save: str, tmp_path: Path
) -> None:
    model = STATES[state](built(name))
    folder = SAVE[save](model, tmp_path)
    for load in LOAD.values():
        again = load(model, folder, OWN[name]())
        check_same(name, model, again)
        assert again.config == model.config


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", DENSE)
def test_a_moefied_model_comes_back_on_its_base(name: str, state: str, tmp_path: Path) -> None:
    model = STATES[state](built(name))
    gmoe.save(model, tmp_path)
    check_same(name, model, gmoe.load(tmp_path, DENSE[name]()))
    with pytest.raises(ValueError, match=rf"^base: got None, .*a {type(model).__name__}"):
        gmoe.load(tmp_path)


def test_a_model_that_a_file_cannot_describe_comes_back_on_its_base(tmp_path: Path) -> None:
    """It has no other door."""
    build = partial(gmoe.GNNMoE, WIDTH, 8, 3, 3, act=nn.Tanh(), **OPTIONS)
    model = pruned(moved(build()))
    with pytest.raises(ValueError, match=r"^act: got an instance of Tanh"):
        model.save_pretrained(tmp_path / "hub")  # type: ignore[operator]
    assert not (tmp_path / "hub").exists()
    gmoe.save(model, tmp_path)
    check_same("GNNMoE", model, gmoe.load(tmp_path, build()))
    with pytest.raises(ValueError, match=r"^base: got None, .*a GNNMoE"):
        gmoe.load(tmp_path)


def test_a_model_of_gmoe_that_was_moefied_comes_back(tmp_path: Path) -> None:
    """Its constructor builds the dense model, the edits the experts."""
    torch.manual_seed(0)
    model: Any = moved(gmoe.moefy(gmoe.ViTMoE(VIT, 3, None), **OPTIONS))
    model.save_pretrained(tmp_path)
    check_same("ViTMoE", model, gmoe.load(tmp_path))
    check_same("ViTMoE", model, gmoe.ViTMoE.from_pretrained(tmp_path))


def save_by_gmoe(model: Any, folder: Path) -> None:
    gmoe.save(model, folder)


def save_by_itself(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)


@pytest.mark.parametrize("save", [save_by_gmoe, save_by_itself])
def test_a_model_whose_saving_is_cut_off_is_no_mixture(
    save: Callable[[Any, Path], None], tmp_path: Path
) -> None:
    """Else an earlier one's weights would meet this one's configuration."""
    first, second = (gmoe.GNNMoE(8, 16, 4, k=k, start="plain") for k in (1, 2))
    save(first, tmp_path)
    assert isinstance(gmoe.load(tmp_path), gmoe.GNNMoE)
    with full_disk(), pytest.raises((OSError, SafetensorError)):
        save(second, tmp_path)
    for load in (gmoe.load, gmoe.GNNMoE.from_pretrained):
        with pytest.raises((ValueError, OSError)):
            load(tmp_path)
