"""Images that a user's function makes. Shapes: N images, C channels, S height and width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import to_image, to_pil_image

from gmoe._checks import check
from vision.data import ImageData, Images


def own_images(made: Any, preset: str, name: str, image_size: int | None) -> ImageData:
    """Images that a user's function made for a preset; ``name`` is the function's.

    It gives ``(train, test)`` or ``(train, val, test)``, each a torch ``Dataset`` of (image,
    class), or a pair of images (N, C, S, S), C = 1 or 3, and classes (N,). Images are uint8 or
    PIL's, which are standardized over the training images, or floats, which the model sees as
    they are. All are kept in memory.
    """
    legal = (
        "(train, test) or (train, val, test), each a Dataset of (image, class), or (images, labels)"
    )
    is_parts = isinstance(made, tuple | list) and len(made) in (2, 3)
    check(is_parts, "data", f"a {type(made).__name__} for {preset}", legal)
    names = ("train", "test") if len(made) == 2 else ("train", "val", "test")
    parts = {
        part: _tensors(f"data: {part}", value) for part, value in zip(names, made, strict=True)
    }
    images, labels = parts["train"]
    channels, size = images.shape[1:3]
    classes = int(labels.max()) + 1
    for part, (others, numbers) in parts.items():
        is_alike = others.shape[1:] == images.shape[1:] and others.dtype == images.dtype
        check(is_alike, f"data: {part}", "images of another size or type than train", "one")
        is_known = 0 <= int(numbers.min()) <= int(numbers.max()) < classes
        check(is_known, f"data: {part}", "labels that train has not", f"0 to {classes - 1}")
    mean, std = [0.0] * channels, [1.0] * channels
    if images.dtype == torch.uint8:
        flat = images.transpose(0, 1).reshape(channels, -1).double() / 255
        mean, std = flat.mean(dim=1).tolist(), flat.std(dim=1).clamp(min=1e-6).tolist()
    kept: dict[str, Any] = {
        part: Images([_kept(image) for image in images], labels, size)
        for part, (images, labels) in parts.items()
    }
    return ImageData(
        name=name,
        image_size=image_size or size,
        classes=tuple(map(str, getattr(made[0], "classes", range(classes))))[:classes],
        mean=tuple(mean),
        std=tuple(std),
        note="by your function",
        **kept,
    )


def _kept(image: Tensor) -> Any:
    """What transforms take: PIL's image, or floats."""
    return to_pil_image(image) if image.dtype == torch.uint8 else image


def _tensors(where: str, part: Any) -> tuple[Tensor, Tensor]:
    """(N, C, S, S) images, uint8 or float32, and (N,) classes."""
    try:
        if isinstance(part, Dataset):
            data: Any = part
            rows = [data[row] for row in range(len(data))]
            images = torch.stack([to_image(image) for image, _ in rows])
            labels = torch.tensor([int(label) for _, label in rows])
        else:
            images, labels = map(torch.as_tensor, part)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{where} is a {type(part).__name__} that cannot be taken as images of one size and "
            f"classes ({error}), expected a Dataset of (image, class) or (images, labels)"
        ) from error
    images = images.float() if images.is_floating_point() else images
    is_square = images.dim() == 4 and images.size(1) in (1, 3) and images.size(2) == images.size(3)
    are_numbers = images.dtype in (torch.uint8, torch.float32) and bool(images.isfinite().all())
    got = f"images {images.dtype} {tuple(images.shape)}"
    legal = "uint8 or finite float (N, 1 or 3, S, S)"
    check(len(images) and is_square and are_numbers, where, got, legal)
    are_integers = not labels.is_floating_point() and labels.dtype != torch.bool
    got = f"labels {labels.dtype} {tuple(labels.shape)}"
    check(are_integers and labels.shape == (len(images),), where, got, "an integer an image")
    return images, labels.long()
