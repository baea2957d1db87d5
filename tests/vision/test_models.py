"""Models of timm from files of weights, and what is added to ViTs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import gmoe
from vision.models import TimmModel, add_drop_path, vit_size

timm = pytest.importorskip("timm")

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
        (("embed_dim=12",), r"dense\.pth with .* of \(.*\), expected \("),
        (("depth=3",), r"dense\.pth without blocks\.2\.attn\.proj\.bias, expected the weights of"),
        (("depth=1",), r"dense\.pth with blocks\.1\.attn\.proj\.bias, expected the weights of"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_its_key(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    torch.save(made().state_dict(), tmp_path / "dense.pth")
    with pytest.raises(ValueError, match=f"checkpoint: got .*{message}"):
        made(path=tmp_path / "dense.pth", arguments=(*SMALL, *arguments))


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="checkpoint: found no file"):
        made(path=tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match=r"checkpoint: got .*text\.pth .*, expected a file of"):
        made(path=tmp_path / "text.pth")


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


def test_branches_are_dropped_as_timm_does() -> None:
    """The same draws: attention's, then the MLP's, block by block, the first one's never."""
    from timm.layers import drop_path

    torch.manual_seed(0)
    model: Any = gmoe.ViTMoE(SIZE, 5, router=None).double()
    torch.nn.init.normal_(model.heads.head.weight)
    images = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    plain = model.eval()(images)
    add_drop_path(model, 0.6)
    assert torch.equal(model(images), plain)

    torch.manual_seed(1)
    dropped = model.train()(images)
    torch.manual_seed(1)
    x = model._process_input(images)
    x = torch.cat([model.class_token.expand(6, -1, -1), x], dim=1) + model.encoder.pos_embedding
    for block, rate in zip(model.encoder.layers, (0.0, 0.2, 0.4, 0.6), strict=True):
        y = block.ln_1(x)
        y = block.self_attention(y, y, y, need_weights=False)[0]
        x = x + drop_path(y, rate, training=True)
        y = block.mlp.forward(block.ln_2(x))  # without the hook
        x = x + drop_path(y, rate, training=True)
    expected = model.heads(model.encoder.ln(x)[:, 0])
    torch.testing.assert_close(dropped, expected, rtol=1e-6, atol=1e-6)
    assert not dropped.allclose(plain)


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
