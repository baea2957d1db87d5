"""Image data: files, splits, augmentation, batches. Imports the gmoe core and torchvision."""

from vision.augment import make_augment, make_mix, normalize
from vision.images import ImageData, image_files, load_images, split_train_val
from vision.sources import FileImages, ImageSource, MemoryImages

__all__ = [
    "FileImages",
    "ImageData",
    "ImageSource",
    "MemoryImages",
    "image_files",
    "load_images",
    "make_augment",
    "make_mix",
    "normalize",
    "split_train_val",
]
