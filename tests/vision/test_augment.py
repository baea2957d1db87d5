"""Augmentation of single images, mixing of batches, normalization."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor

from vision.augment import AugmentKind, make_augment, make_mix, normalize


def ramp(side: int) -> Tensor:
    """Each pixel says where it is: red its column, green its row, plus one."""
    places = torch.arange(1, side + 1, dtype=torch.uint8)
    return torch.stack([places.expand(side, side), places[:, None].expand(side, side), torch.ones(side, side).byte()])


def test_none() -> None:
    assert make_augment("none", 32) is None
    assert make_mix(0, 0, 5) is None
    with pytest.raises(ValueError, match="kind: got 'autoaugment', expected one of none, standard, randaugment"):
        make_augment("autoaugment", 32)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["standard", "randaugment"])
@pytest.mark.parametrize("side", [8, 32, 64, 160])
def test_shape_and_type_stay(kind: AugmentKind, side: int) -> None:
    augment = make_augment(kind, side)
    assert augment is not None
    torch.manual_seed(0)
    images = torch.randint(0, 256, (6, 3, side, side), dtype=torch.uint8)
    changed = torch.stack([augment(image) for image in images])
    assert changed.shape == images.shape
    assert changed.dtype == torch.uint8
    torch.manual_seed(1)
    first = augment(images[0])
    torch.manual_seed(1)
    assert pickle.loads(pickle.dumps(augment))(images[0]).equal(first)


def test_standard_crops_and_flips_small_images() -> None:
    augment = make_augment("standard", 32)
    assert augment is not None
    torch.manual_seed(0)
    shifts, flips = set(), 0
    for _ in range(300):
        image = augment(ramp(32)).int()
        columns, rows = image[0, 16], image[1, :, 16]
        flipped = bool(columns[20] < columns[10])
        flips += flipped
        column = int(columns.flip(0)[16] if flipped else columns[16]) - 17
        shifts.add((column, int(rows[16]) - 17))
    assert {column for column, _ in shifts} == {row for _, row in shifts} == set(range(-4, 5))  # padding 32 // 8
    assert 110 < flips < 190


def test_standard_resizes_crops_of_large_images() -> None:
    augment = make_augment("standard", 64)
    assert augment is not None
    torch.manual_seed(0)
    areas = []
    for _ in range(200):
        image = augment(ramp(64)).float()
        assert image[2].eq(1).all()  # no padding
        areas.append(float((image[0].max() - image[0].min() + 1) * (image[1].max() - image[1].min() + 1)) / 64**2)
    assert 0.3 < min(areas) < 0.5
    assert 0.85 < max(areas) <= 1


def test_randaugment_does_more_than_crop_and_flip() -> None:
    torch.manual_seed(0)
    gray = torch.full((3, 32, 32), 90, dtype=torch.uint8)
    standard, randaugment = make_augment("standard", 32), make_augment("randaugment", 32)
    assert standard is not None
    assert randaugment is not None
    assert torch.stack([standard(gray) for _ in range(40)]).unique().tolist() == [0, 90]  # 0 is the padding
    assert len(torch.stack([randaugment(gray) for _ in range(40)]).unique()) > 4


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.2, 0.0), (0.0, 1.0), (0.2, 1.0)])
def test_mix(mixup: float, cutmix: float) -> None:
    mix = make_mix(mixup, cutmix, 5)
    assert mix is not None
    torch.manual_seed(0)
    labels = torch.tensor([0, 1, 2, 4])
    images = labels.float().view(4, 1, 1, 1).expand(4, 3, 8, 8).contiguous()
    kinds = set()
    for _ in range(60):
        mixed, soft = mix(images, labels)
        assert mixed.shape == images.shape
        assert soft.shape == (4, 5)
        torch.testing.assert_close(soft.sum(dim=1), torch.ones(4))
        torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), soft @ torch.arange(5.0), atol=1e-4, rtol=0)
        whole = torch.isin(mixed, labels.float()).all()
        kinds.add("cutmix" if whole else "mixup")
    if mixup and cutmix:
        assert kinds == {"mixup", "cutmix"}
    elif cutmix:
        assert kinds == {"cutmix"}
    assert images.unique().equal(labels.float())  # not changed in place


@pytest.mark.parametrize(
    ("mixup", "cutmix", "name"), [(-1, 0, "mixup"), (0, -0.5, "cutmix"), (float("nan"), 0, "mixup")]
)
def test_illegal_alphas(mixup: float, cutmix: float, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: got .*, expected a number of at least 0"):
        make_mix(mixup, cutmix, 5)


def test_normalize() -> None:
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    found = normalize(images, mean, std)
    assert found.dtype == torch.float32
    expected = (images.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(found, expected.float())
