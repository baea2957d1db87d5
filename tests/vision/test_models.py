"""Models of timm from files of weights, and the sizes of ViTs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm.models import load_state_dict

import gmoe
from tests.helpers.evil import Evil
from vision.models import TimmModel, layer_factors, vit_size

NAME = "vit_tiny_patch16_224"
SMALL = ("patch_size=4", "embed_dim=8", "depth=2", "num_heads=2")


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


def test_a_checkpoint_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With timm 1.0.15, too, which unpickles anything where it is not told otherwise."""

    def as_of_1_0_15(path: str, use_ema: bool = True, weights_only: bool = False) -> Any:
        return load_state_dict(path, use_ema, weights_only=weights_only)

    monkeypatch.setattr("vision.models.load_state_dict", as_of_1_0_15)
    torch.save({"weight": Evil(tmp_path / "ran")}, tmp_path / "evil.pth")
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


def test_timms_models_drop_by_their_own_option() -> None:
    model = made(drop_path=0.3)
    assert [block.drop_path1.drop_prob for block in model.blocks[1:]] == pytest.approx([0.3])


def test_sizes_without_a_preset_are_given_whole() -> None:
    given = {"patch_size": 4, "hidden_dim": 8, "num_heads": 2, "mlp_dim": 16, "num_layers": 4}
    assert vit_size(24, **given)["image_size"] == 24
    with pytest.raises(ValueError, match="image_size: got 24, expected patch, dim and vit_heads"):
        vit_size(24, **(given | {"patch_size": None}))
    assert vit_size(32, **dict.fromkeys(given))["patch_size"] == 4


@pytest.mark.parametrize("experts", [False, True])
def test_the_learning_rate_decays_by_timms_layers(experts: bool) -> None:
    """Experts belong to their block."""
    model = made(arguments=(*SMALL[:-2], "depth=4", "num_heads=2"))
    if experts:
        model = gmoe.moefy(model, num_experts=4)
    factors = layer_factors(model, 0.5)
    assert set(factors) == {name for name, _ in model.named_parameters()}
    below = {
        "cls_token": 5,
        "patch_embed.proj.weight": 5,
        "pos_embed": 5,
        "blocks.0.norm1.weight": 4,
        "blocks.3.norm2.bias": 1,
        "norm.weight": 1,
        "head.weight": 0,
    }
    assert {name: factors[name] for name in below} == {n: 0.5**k for n, k in below.items()}
    of_mlp = {factor for name, factor in factors.items() if "blocks.1.mlp." in name}
    assert of_mlp == {0.5**3}
