"""Models of timm from files of weights, and what is added to ViTs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm.models import load_state_dict
from torch import nn

import gmoe
from vision.models import TimmModel, add_drop_path, layer_factors, vit_size

NAME = "vit_tiny_patch16_224"
SMALL = ("patch_size=4", "embed_dim=8", "depth=2", "num_heads=2")
SIZE = {
    "image_size": 8,
    "patch_size": 4,
    "num_layers": 4,
    "num_heads": 2,
    "hidden_dim": 8,
    "mlp_dim": 16,
}


def made(
    image_size: int = 8, num_classes: int = 5, path: Path | None = None, **options: Any
) -> Any:
    model = TimmModel(name=NAME, arguments=options.pop("arguments", SMALL), checkpoint=path)
    return model.made(image_size, 3, num_classes, drop_path=options.pop("drop_path", 0.0))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", "averaged.pth"])
def test_a_file_of_weights_is_what_it_was(suffix: str, tmp_path: Path) -> None:
    """Also a checkpoint of timm's ``train.py``, whose averaged weights are taken."""
    torch.manual_seed(0)
    dense = made()
    path = tmp_path / f"dense{suffix}"
    if suffix == ".safetensors":
        save_file(dense.state_dict(), path)
    elif suffix == ".pth":
        torch.save(dense.state_dict(), path)
    else:
        torch.save({"state_dict": made().state_dict(), "state_dict_ema": dense.state_dict()}, path)
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(made(path=path).eval()(images), dense.eval()(images))
    assert not torch.equal(made().eval()(images), dense(images))


def test_another_number_of_classes_has_a_new_head(tmp_path: Path, capsys: Any) -> None:
    torch.manual_seed(0)
    dense = made().eval()
    torch.save(dense.state_dict(), tmp_path / "dense.pth")
    fine = made(num_classes=3, path=tmp_path / "dense.pth").eval()
    assert "dense.pth: 5 classes, the head head is drawn anew" in capsys.readouterr().out
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(fine.forward_features(images), dense.forward_features(images))
    assert fine(images).shape == (2, 3)


def test_another_image_size_has_resampled_positions(tmp_path: Path) -> None:
    torch.save(made().state_dict(), tmp_path / "dense.pth")
    assert made(image_size=16, path=tmp_path / "dense.pth")(torch.randn(1, 3, 16, 16)).shape == (
        1,
        5,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("embed_dim=12",), r"size mismatch for .*cls_token"),
        (("depth=3",), r"Missing key.* \"blocks\.2\.norm1"),
        (("depth=1",), r"Unexpected key.* \"blocks\.1\.norm1"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_its_key(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    torch.save(made().state_dict(), tmp_path / "dense.pth")
    with pytest.raises(ValueError, match=f"checkpoint: got .*dense.pth .*{message}"):
        made(path=tmp_path / "dense.pth", arguments=(*SMALL, *arguments))


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="checkpoint: found no file"):
        made(path=tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match=r"checkpoint: got .*text\.pth .*, expected a file of"):
        made(path=tmp_path / "text.pth")


class Attack:
    """What runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_a_checkpoint_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With timm 1.0.15, too, which unpickles anything where it is not told otherwise."""

    def as_of_1_0_15(path: str, use_ema: bool = True, weights_only: bool = False) -> Any:
        return load_state_dict(path, use_ema, weights_only=weights_only)

    monkeypatch.setattr("vision.models.load_state_dict", as_of_1_0_15)
    torch.save({"weight": Attack(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"checkpoint: got .*evil\.pth .*[Ww]eights.only"):
        made(path=tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()
    as_of_1_0_15(str(tmp_path / "evil.pth"))
    assert (tmp_path / "ran").exists()  # the attack is one


def test_names_and_arguments_that_timm_does_not_know_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"model: got timm/vit_tinny_patch16_224, .*such as vit_tiny_patch16_224"
    ):
        TimmModel(name="vit_tinny_patch16_224")
    with pytest.raises(ValueError, match="model: got timm/hf_hub"):
        TimmModel(name="hf_hub:timm/vit_tiny")
    with pytest.raises(ValueError, match=r"model_kwargs: got .*embed=8, expected arguments of"):
        made(arguments=(*SMALL, "embed=8"))


def test_what_timm_says_of_a_model() -> None:
    assert TimmModel(name=NAME).image_size == 224
    assert TimmModel(name=NAME, arguments=("img_size=64", "act_layer=relu")).image_size == 64
    assert TimmModel(name=NAME, arguments=("img_size=(64, 64)",)).image_size == 64
    for given in ("img_size=(64, 32)", "img_size=large"):
        with pytest.raises(ValueError, match=r"model_kwargs: got img_size=.*, expected a number"):
            _ = TimmModel(name=NAME, arguments=(given,)).image_size
    assert TimmModel(name=NAME).pretrained.mean == (0.5, 0.5, 0.5)


def test_branches_are_dropped_image_by_image_more_often_above() -> None:
    torch.manual_seed(0)
    model: Any = gmoe.ViTMoE(SIZE, 5, router=None)
    images = torch.randn(400, 3, 8, 8)
    plain = model.eval()(images)
    add_drop_path(model, 0.6)
    assert torch.equal(model(images), plain)
    shares = list[float]()

    def count(mlp: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        shares.append(float((output == 0).flatten(1).all(dim=1).float().mean()))

    for block in model.encoder.layers:
        block.mlp.register_forward_hook(count)
    model.train()(images)
    assert shares == pytest.approx([0.0, 0.2, 0.4, 0.6], abs=0.1)


def test_timms_models_drop_by_their_own_option() -> None:
    model = made(drop_path=0.3)
    assert [block.drop_path1.drop_prob for block in model.blocks[1:]] == pytest.approx([0.3])


def test_experts_of_a_dropped_branch_learn_nothing_of_that_image() -> None:
    torch.manual_seed(0)
    model: Any = gmoe.ViTMoE(SIZE, 5, num_experts=2, every=1, start="plain")
    torch.nn.init.normal_(model.heads.head.weight)
    add_drop_path(model, 0.999999)
    model.train()(torch.randn(1, 3, 8, 8)).sum().backward()
    experts = model.encoder.layers[3].mlp.experts
    assert not any(bool(p.grad.any()) for p in experts.parameters())


def test_sizes_without_a_preset_are_given_whole() -> None:
    given = {"patch_size": 4, "hidden_dim": 8, "num_heads": 2, "mlp_dim": 16, "num_layers": 4}
    assert vit_size(24, **given)["image_size"] == 24
    with pytest.raises(ValueError, match="image_size: got 24, expected patch, dim and vit_heads"):
        vit_size(24, **(given | {"patch_size": None}))
    assert vit_size(32, **dict.fromkeys(given))["patch_size"] == 4


@pytest.mark.parametrize("experts", [False, True])
def test_the_learning_rate_decays_by_timms_layers(experts: bool) -> None:
    """Of timm's ViT and of ours; experts belong to their block."""
    theirs = made(arguments=(*SMALL[:-2], "depth=4", "num_heads=2"))
    if experts:
        theirs = gmoe.moefy(theirs, num_experts=4)
    factors = layer_factors(theirs, 0.5)
    ours = layer_factors(gmoe.ViTMoE(SIZE, 5, num_experts=4, every=1), 0.5)
    assert set(factors) == {name for name, _ in theirs.named_parameters()}
    pairs = {
        "class_token": ("cls_token", 5),
        "conv_proj.weight": ("patch_embed.proj.weight", 5),
        "encoder.pos_embedding": ("pos_embed", 5),
        "encoder.layers.encoder_layer_0.ln_1.weight": ("blocks.0.norm1.weight", 4),
        "encoder.layers.encoder_layer_3.ln_2.bias": ("blocks.3.norm2.bias", 1),
        "encoder.ln.weight": ("norm.weight", 1),
        "heads.head.weight": ("head.weight", 0),
    }
    for name, (other, below) in pairs.items():
        assert ours[name] == factors[other] == 0.5**below, name
    for layers, part in ((ours, "encoder_layer_1.mlp."), (factors, "blocks.1.mlp.")):
        assert {factor for name, factor in layers.items() if part in name} == {0.5**3}


def test_a_model_without_layers_is_named() -> None:
    with pytest.raises(ValueError, match="layer_decay: got a Linear"):
        layer_factors(nn.Linear(2, 2), 0.5)
