"""What timm's transforms do here that they do not do by themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vision.recipe import Recipe
from vision.transforms import eval_transform, make_mixup, posterize, train_transform

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


def photo(size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": (0.3, 1.0)},
        {"scale": (0.3, 1.0), "aa": "rand-m9-mstd0.5-inc1", "reprob": 1.0},
        {"aa": "augmix-m5", "interpolation": "bicubic"},
        {"aa": "original"},
        {"aa": "rand-p1-m10-n9"},
    ],
)
def test_images_of_any_shape_become_squares(options: dict[str, Any]) -> None:
    change = train_transform("none", 16, Recipe(**options), MEAN, STD)
    for _ in range(30):
        assert change(photo()).shape == (3, 16, 16)


def test_policies_posterize_to_no_bits() -> None:
    """Which timm's own function asks of Pillow, and newer ones refuse."""
    image = photo()
    assert not np.asarray(posterize(image, 0)).any()
    assert np.array_equal(np.asarray(posterize(image, 8)), np.asarray(image))
    assert (np.asarray(posterize(image, 1)) == np.asarray(image) // 128 * 128).all()
    change: Any = train_transform("none", 16, Recipe(aa="rand-m0"), MEAN, STD)
    (policy,) = change.transforms[1].transforms
    mended = [one for one in policy.ops if one.aug_fn is posterize]
    assert mended
    for operation in mended:
        operation.prob = 1.0
        operation(image)


def test_a_policy_that_timm_does_not_read_is_named() -> None:
    with pytest.raises(ValueError, match=r"aa: got 'rand-q9' .*, expected a policy of timm"):
        train_transform("none", 16, Recipe(aa="rand-q9"), MEAN, STD)


def test_standard_crops_after_padding_and_flips_floats_too() -> None:
    change = train_transform("standard", 32, Recipe(), (0.0,), (1.0,))
    torch.manual_seed(0)
    ramp = torch.arange(1.0, 33).expand(1, 32, 32)  # of columns
    rows = torch.stack([change(ramp)[0, 16] for _ in range(300)])
    is_flipped = rows[:, 20] < rows[:, 10]
    shifts = torch.where(is_flipped[:, None], rows.flip(1), rows)[:, 16] - 17
    assert shifts.unique().tolist() == list(range(-4, 5))  # padding 32 // 8
    assert 110 < int(is_flipped.sum()) < 190


def test_floats_are_only_normalized_at_test_time() -> None:
    image = torch.randn(1, 8, 8)
    seen = eval_transform(8, Recipe(), (0.5,), (2.0,))(image)
    torch.testing.assert_close(seen, (image - 0.5) / 2)


def test_mixed_labels_say_what_a_batch_shows() -> None:
    """Images of the color of their class: its share is that of the label."""
    for recipe in (Recipe(mixup=1.0), Recipe(cutmix=1.0)):
        mixup = make_mixup(recipe, 4)
        assert mixup is not None
        images = torch.eye(4)[:, :, None, None].repeat(1, 1, 16, 16)
        mixed, shares = mixup(images, torch.arange(4))
        torch.testing.assert_close(mixed.mean(dim=(2, 3)), shares)
    assert make_mixup(Recipe(), 4) is None
