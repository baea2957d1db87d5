"""Learning rates by layer and part, and averages, beside timm's own functions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gmoe
from vision.recipe import Recipe
from vision.weights import WeightAverage, layers_of, lr_factors

SIZE = {
    "image_size": 8,
    "patch_size": 4,
    "num_layers": 3,
    "num_heads": 2,
    "hidden_dim": 8,
    "mlp_dim": 16,
}


def of_timm(**options: Any) -> Any:
    timm = pytest.importorskip("timm")
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=8,
        patch_size=4,
        embed_dim=8,
        depth=3,
        num_heads=2,
        num_classes=5,
        **options,
    )


@pytest.mark.parametrize("experts", [False, True])
def test_decay_by_layer_is_timms(experts: bool) -> None:
    model = of_timm()
    from timm.optim import param_groups_layer_decay

    if experts:
        model = gmoe.moefy(model, num_experts=4)
    groups = param_groups_layer_decay(model, layer_decay=0.7)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    factors = lr_factors(model, Recipe(layer_decay=0.7))
    assert factors == pytest.approx({name: scale[id(p)] for name, p in model.named_parameters()})
    assert len(set(factors.values())) == 5


def test_the_layers_of_our_vit_are_those_of_timms() -> None:
    ours = layers_of(gmoe.ViTMoE(SIZE, 5, num_experts=4, every=1))
    theirs = layers_of(of_timm())
    pairs = {
        "class_token": "cls_token",
        "conv_proj.weight": "patch_embed.proj.weight",
        "encoder.pos_embedding": "pos_embed",
        "encoder.layers.encoder_layer_0.ln_1.weight": "blocks.0.norm1.weight",
        "encoder.layers.encoder_layer_2.ln_2.bias": "blocks.2.norm2.bias",
        "encoder.ln.weight": "norm.weight",
        "heads.head.weight": "head.weight",
    }
    assert {name: ours[name] for name in pairs} == {
        name: theirs[other] for name, other in pairs.items()
    }
    experts = {number for name, number in ours.items() if "encoder_layer_1.mlp" in name}
    assert experts == {2}


def test_parts_learn_by_factors_which_multiply() -> None:
    model = gmoe.ViTMoE(SIZE, 5, num_experts=4, every=1)
    parts = ("*encoder_layer_0.*=0", "*.mlp.*=3", "heads.*=2", "heads.*.bias=2")
    factors = lr_factors(model, Recipe(lr_scale=parts))
    for name, factor in factors.items():
        expected = 0.0 if "encoder_layer_0." in name else 3.0 if ".mlp." in name else 1.0
        if name.startswith("heads."):
            expected = 4.0 if name.endswith("bias") else 2.0
        assert factor == expected, name
    assert lr_factors(model, Recipe()) == {}


def test_a_pattern_that_fits_nothing_is_named() -> None:
    model = gmoe.ViTMoE(SIZE, 5, router=None)
    recipe = Recipe(lr_scale=("*.experts.*=3",))
    with pytest.raises(ValueError, match=r"lr_scale: got '\*\.experts\.\*', expected a pattern"):
        lr_factors(model, recipe)
    assert lr_factors(model, recipe, are_all_needed=False) == {}
    with pytest.raises(ValueError, match=r"lr_scale: got \*=0, expected parameters that train"):
        lr_factors(model, Recipe(lr_scale=("*=0",)))
    for text in ("heads", "heads=x", "=2", "heads=-1", "heads=nan"):
        with pytest.raises(ValueError, match="lr_scale: got "):
            Recipe(lr_scale=(text,)).factors()


def test_a_model_without_layers_is_named() -> None:
    with pytest.raises(ValueError, match="layer_decay: got a Linear"):
        lr_factors(nn.Linear(2, 2), Recipe(layer_decay=0.5))


class Counted(nn.Module):
    """A weight, a buffer of floats, and a counter."""

    mean: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2, dtype=torch.float64))
        self.register_buffer("mean", torch.randn(4, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(0))

    def step(self) -> None:
        with torch.no_grad():
            self.weight.add_(torch.randn(3, 2))
            self.mean.mul_(0.5)
            self.count.add_(1)


def test_the_average_is_timms() -> None:
    utils = pytest.importorskip("timm.utils")
    torch.manual_seed(0)
    model = Counted()
    theirs = utils.ModelEmaV3(model, decay=0.9)
    ours = WeightAverage(model, 0.9)
    for _ in range(5):
        model.step()
        theirs.update(model)
        ours.update(model)
    for name, value in theirs.module.state_dict().items():
        torch.testing.assert_close(ours.weights[name], value, rtol=1e-12, atol=0)


def test_a_model_has_the_average_for_a_while() -> None:
    torch.manual_seed(0)
    model = Counted()
    average = WeightAverage(model, 0.5)
    begin = copy.deepcopy(model.state_dict())
    model.step()
    own = copy.deepcopy(model.state_dict())
    average.update(model)
    with average.given_to(model):
        torch.testing.assert_close(model.weight, (begin["weight"] + own["weight"]) / 2)
        assert int(model.count) == 1
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
