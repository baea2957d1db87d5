"""Maps of patches by expert: photos of any size, models of any library, the report of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch

from experiments.show.patches import main as patches
from experiments.show.report import main as report
from tests.helpers.command import quick
from tests.helpers.made_images import write_images, write_photo
from tests.helpers.pages import words_of
from vision.data import read
from vision.maps import expert_patches, photos
from vision.recipe import Recipe
from vision.transforms import eval_transform

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
OF_HUGGING_FACE = """
import gmoe
import transformers as hf


def make(image_size, num_classes):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24, "patch_size": 4}
    config = hf.ViTConfig(**sizes, image_size=image_size, num_labels=num_classes)
    model = gmoe.moefy(hf.ViTForImageClassification(config), num_experts=4)
    model.register_forward_hook(lambda module, inputs, output: output.logits)
    return model
"""


def test_photos_are_seen_as_the_model_sees_them(tmp_path: Path) -> None:
    paths = [write_photo(tmp_path / f"{size}.png", size) for size in ((30, 20), (9, 40), (8, 8))]
    recipe = Recipe(crop_pct=0.8)
    seen = photos(paths, 8, recipe, MEAN, STD)
    transform = eval_transform(8, recipe, MEAN, STD)
    assert seen.equal(torch.stack([transform(read(str(path), 8)) for path in paths]))
    assert photos(paths, 8, recipe, (0.4,), (0.2,)).shape == (3, 1, 8, 8)


def test_strips_show_the_patches_of_each_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patches of gray levels: each strip holds those of its expert, spread over all of them."""
    levels = torch.rand(5, 2, 2)
    expert = torch.randint(2, (5, 2, 2), generator=torch.Generator().manual_seed(0))
    images = torch.kron(levels[:, None], torch.ones(1, 1, 3, 3)).expand(-1, 3, -1, -1)
    weight = torch.nn.functional.one_hot(expert, 3).float()  # the third has none
    strips = []
    drawn = "vision.maps._strips"
    monkeypatch.setattr(drawn, lambda strip, layer: strips.append((strip, layer)))
    expert_patches(images, [weight, 0 * weight], (0.0,) * 3, (1.0,) * 3, most=6)
    (first, number), (none, _) = strips
    assert number == 1
    assert first.shape == (3, 6, 3, 3, 3)
    for own in range(2):
        of_expert = levels[expert == own]
        chosen = torch.linspace(0, len(of_expert) - 1, min(6, len(of_expert))).round().long()
        shown = first[own, : len(chosen)]
        torch.testing.assert_close(shown.mean(dim=(1, 2, 3)), of_expert[chosen])
        assert shown.std(dim=(1, 2, 3)).max() < 1e-6
    assert (first[2] == 1).all()  # white
    assert (none == 1).all()  # no patch has an expert


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_the_report_and_the_maps_of_somebody_elses_model(
    library: str, tmp_path: Path, capsys: Any
) -> None:
    pytest.importorskip("transformers")
    root = write_images(tmp_path / "data")
    words = ["--image-size", "8", "--data-root", str(root)]
    trust = []
    if library == "timm":
        sizes = ["patch_size=4", "embed_dim=8", "depth=2", "num_heads=2"]
        words += ["--model", "timm/vit_tiny_patch16_224", "--model-kwargs", *sizes]
        words += ["--router", "token_choice", "--experts", "4", "--every", "1", "--crop-pct", "0.8"]
    else:
        (tmp_path / "own.py").write_text(OF_HUGGING_FACE)
        words += ["--model", f"{tmp_path / 'own.py'}:make"]
        trust = ["--trust"]
    summary = quick(tmp_path / "run", *words, preset="images")
    assert len(summary["routing"]) == (2 if library == "timm" else 1)
    photo = write_photo(tmp_path / "photo.jpg", (50, 31))
    out = ["--out", str(tmp_path / "out")]
    patches([str(tmp_path / "run"), "--images", str(photo), *out, *trust])
    assert matplotlib.image.imread(tmp_path / "out" / "maps.png").std() > 0.05
    report([str(tmp_path / "run"), *out, *trust])
    page = words_of(tmp_path / "out" / "index.html")
    assert "Which patches go to which expert?" in page
    assert "Not drawn" not in page
