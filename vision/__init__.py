"""Images: ViT with Mixture-of-Experts, and image data. Imports the gmoe core and torchvision."""

from vision.augment import make_augment, make_mix, normalize
from vision.images import ImageData, image_files, load_images, split_train_val
from vision.sources import FileImages, ImageSource, MemoryImages
from vision.vit_moe import SIZES, ViTMoE, ViTSize

__all__ = [
    "SIZES",
    "FileImages",
    "ImageData",
    "ImageSource",
    "MemoryImages",
    "ViTMoE",
    "ViTSize",
    "image_files",
    "load_images",
    "make_augment",
    "make_mix",
    "normalize",
    "split_train_val",
]
