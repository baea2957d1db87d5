"""Image data: files, splits, augmentation, batches."""

from vision.batches import AugmentKind, batches, make_augment
from vision.images import ImageData, load_images, split_images
from vision.sources import FileImages, ImageSource, MemoryImages, decode

__all__ = [
    "AugmentKind",
    "FileImages",
    "ImageData",
    "ImageSource",
    "MemoryImages",
    "batches",
    "decode",
    "load_images",
    "make_augment",
    "split_images",
]
