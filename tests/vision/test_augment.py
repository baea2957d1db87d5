"""What is done to training images, beside timm's own functions on the same random numbers."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from tests.helpers.made_images import write_photo
from vision.augment import make_augment, make_mix, posterize
from vision.batches import batches
from vision.recipe import Recipe
from vision.sources import FileImages, View

MEAN = (0.4, 0.5, 0.6)
CLASSES = 4


class OfTorch:
    """Python's ``random``, by torch's generator: so that timm draws what torchvision draws."""

    def random(self) -> float:
        return float(torch.rand(1))

    def uniform(self, low: float, high: float) -> float:
        return float(torch.empty(1).uniform_(low, high))

    def randint(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,)))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    return write_photo(tmp_path / "photo.png", (90, 60))


def test_erasing_is_timms(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rectangles; torchvision's holds zeros here, which draw nothing, as timm's do."""
    erasing = pytest.importorskip("timm.data.random_erasing")
    monkeypatch.setattr(erasing, "random", OfTorch())
    augment = make_augment("none", 32, Recipe(reprob=0.7), MEAN)
    assert augment is not None
    ours: Any = augment.erase
    ours.value = [0.0]
    theirs = erasing.RandomErasing(0.7, mode="const", device="cpu")
    erased = 0
    for seed in range(50):
        torch.manual_seed(seed)
        one = ours(torch.ones(3, 32, 32))
        torch.manual_seed(seed)
        other = theirs(torch.ones(3, 32, 32))
        assert torch.equal(one, other)
        erased += int((one == 0).any())
    assert 25 < erased < 45


def test_what_is_erased_becomes_noise_of_each_pixel() -> None:
    augment = make_augment("none", 32, Recipe(reprob=1.0), MEAN)
    assert augment is not None
    assert augment.erase is not None
    torch.manual_seed(0)
    noise = torch.cat([augment.erase(torch.full((3, 32, 32), 9.0)) for _ in range(50)])
    noise = noise[noise != 9]
    assert noise.mean().abs() < 0.05
    assert 0.95 < noise.std() < 1.05


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "augmix-m5", "original"])
def test_policies_are_timms(policy: str, photo: Path) -> None:
    timm = pytest.importorskip("timm.data.transforms_factory")
    crops, colors, _ = timm.transforms_imagenet_train(
        32, auto_augment=policy, interpolation="bicubic", mean=MEAN, separate=True
    )
    recipe = Recipe(aa=policy, interpolation="bicubic", scale=(0.08, 1.0))
    augment = make_augment("none", 32, recipe, MEAN)
    assert augment is not None
    (*_, ours) = augment.change.steps  # type: ignore[attr-defined]
    assert augment.draws_outside_torch
    assert len(crops.transforms) == 2  # crop and flip, as ours
    image = Image.open(photo)
    changed = refused = 0
    for seed in range(60):
        seed_all(seed)
        one = np.asarray(ours(image))
        seed_all(seed)
        try:
            other = np.asarray(colors(image))
        except ValueError:  # newer Pillows refuse to posterize to no bits, as timm asks of them
            refused += 1
            continue
        assert np.array_equal(one, other)
        changed += not np.array_equal(one, np.asarray(image))
    assert changed > 30
    assert refused < 20


def test_an_image_of_no_bits_is_black(photo: Path) -> None:
    """As Pillow made it, before it refused."""
    with Image.open(photo) as image:
        black, one, all_bits = (np.asarray(posterize(image, bits)) for bits in (0, 1, 8))
        assert not black.any()
        assert set(np.unique(one).tolist()) == {0, 128}
        assert np.array_equal(all_bits, np.asarray(image))


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (40, 40), (33, 400)])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
def test_the_view_at_test_time_is_timms(
    size: tuple[int, int], crop_pct: float, tmp_path: Path
) -> None:
    timm = pytest.importorskip("timm.data.transforms_factory")
    path = write_photo(tmp_path / "photo.png", size)
    view = View(32, crop_pct=crop_pct, interpolation="bicubic")
    theirs = timm.transforms_imagenet_eval(
        32, crop_pct=crop_pct, interpolation="bicubic", use_prefetcher=True
    )
    assert np.array_equal(view.of_file(str(path)).numpy(), theirs(Image.open(path)))


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.5, 0.6)])
def test_crops_have_the_distribution_of_timms(
    scale: tuple[float, float], photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same crops on the same numbers, but that the aspect is drawn between logarithms there."""
    crops = pytest.importorskip("timm.data.transforms")
    monkeypatch.setattr(crops, "random", OfTorch())
    augment = make_augment("none", 32, Recipe(scale=scale), MEAN)
    assert augment is not None
    crop = augment.change.steps[0]  # type: ignore[attr-defined]
    theirs = crops.RandomResizedCropAndInterpolation(32, scale=scale, interpolation="bilinear")
    image = Image.open(photo)
    for seed in range(30):
        torch.manual_seed(seed)
        one = np.asarray(crop(image))
        torch.manual_seed(seed)
        assert np.array_equal(one, np.asarray(theirs(image)))


def mixed(recipe: Recipe, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two images and their classes, and what the recipe makes of them."""
    mix = make_mix(recipe, CLASSES)
    assert mix is not None
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    labels = torch.tensor([1, 3])
    torch.manual_seed(seed)
    return images, labels, *mix(images.clone(), labels)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixing_is_timms(kind: str, smoothing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images, so that the neighbor there is the last image here, too; the same weights.

    timm smooths the labels, here the loss does it.
    """
    mixup = pytest.importorskip("timm.data.mixup")
    options: dict[str, Any] = {kind: 0.8}
    drawn = mixup.Mixup(
        mixup_alpha=0.8 if kind == "mixup" else 0.0,
        cutmix_alpha=0.8 if kind == "cutmix" else 0.0,
        label_smoothing=smoothing,
        num_classes=CLASSES,
    )
    logits = torch.randn(2, CLASSES, generator=torch.Generator().manual_seed(0))
    for seed in range(20):
        images, labels, ours, target = mixed(replace(Recipe(), **options), seed)
        weight = float(target[0, labels[0]])
        monkeypatch.setattr(np.random, "beta", lambda *_, weight=weight: weight)
        if kind == "cutmix":
            box = ours.ne(images).any(dim=1).any(dim=0).nonzero()
            if not len(box):
                continue
            (top, left), (bottom, right) = box.amin(0).tolist(), (box.amax(0) + 1).tolist()
            area = (bottom - top) * (right - left) / 256
            found = ((top, bottom, left, right), 1 - area)
            monkeypatch.setattr(mixup, "cutmix_bbox_and_lam", lambda *_, found=found, **__: found)
        theirs, smoothed = drawn(images.clone(), labels)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(
            F.cross_entropy(logits, target, label_smoothing=smoothing),
            torch.sum(-smoothed * F.log_softmax(logits, dim=-1), dim=-1).mean(),
        )


def test_of_mixup_and_cutmix_each_batch_takes_one() -> None:
    kinds = set()
    for seed in range(20):
        images, _, ours, target = mixed(Recipe(mixup=1.0, cutmix=1.0), seed)
        assert target.sum(dim=1).allclose(torch.ones(2))
        is_of_one = (ours == images) | (ours == images.flip(0))
        kinds.add(bool(is_of_one.all()))
    assert kinds == {True, False}


def test_mixed_batches_follow_from_the_seed_alone(tmp_path: Path) -> None:
    paths = [
        str(write_photo(tmp_path / f"{number}.png", (30, 20 + number), seed=number))
        for number in range(7)
    ]
    source = FileImages(paths, torch.arange(7) % CLASSES)
    recipe = Recipe(scale=(0.3, 1.0), reprob=0.5, mixup=0.4, cutmix=0.4)
    options: dict[str, Any] = {
        "view": View(16),
        "mean": MEAN,
        "std": MEAN,
        "augment": make_augment("none", 16, recipe, MEAN),
        "mix": make_mix(recipe, CLASSES),
    }
    index = torch.arange(7)

    def epoch(seed: int | None, workers: int = 0) -> list[Tensor]:
        made = batches(source, index, 3, **options, seed=seed, workers=workers)
        return [part for batch in made for part in batch]

    first = epoch(5)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert all(map(torch.equal, first, epoch(5, workers=1)))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first[0], epoch(6)[0])
    assert first[1].shape == (3, CLASSES)
    assert epoch(None)[1].dtype == torch.int64  # at test time nothing is mixed


def test_images_of_any_size_are_cropped_as_their_files_have_them(photo: Path) -> None:
    """The pixels beside the square in the middle are seen, too."""
    pixels = np.full((20, 80, 3), 0, dtype=np.uint8)
    pixels[:, :20] = 255
    Image.fromarray(pixels).save(photo)
    source = FileImages([str(photo)], torch.tensor([0]))
    augment = make_augment("none", 16, Recipe(scale=(0.1, 0.2)), MEAN)
    assert augment is not None
    seen = augment(source, torch.zeros(60, dtype=torch.int64), torch.arange(60), Tensor.float)
    white = (seen.mean(dim=(1, 2, 3)) > 250).sum()
    assert 3 < white < 30
    square = View(16).of_file(str(photo))
    assert not square.any()


def test_a_policy_that_timm_does_not_read_is_named() -> None:
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="aa: got 'rand-q9'"):
        make_augment("none", 16, Recipe(aa="rand-q9"), MEAN)
    with pytest.raises(ValueError, match="aa: got 'randaugment'"):
        make_augment("none", 16, Recipe(aa="randaugment"), MEAN)
