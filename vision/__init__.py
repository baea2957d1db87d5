"""Images: ViT with Mixture-of-Experts. Imports the gmoe core and torchvision."""

from vision.vit_moe import SIZES, ViTMoE, ViTSize

__all__ = ["SIZES", "ViTMoE", "ViTSize"]
