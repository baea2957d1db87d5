"""Small vision transformers in float64, and images for them."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

SMALL_VIT: dict[str, int] = {
    "image_size": 8,
    "patch_size": 4,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 16,
    "mlp_dim": 24,
}
"""The sizes of a ``ViTMoE``, one of whose blocks has experts."""


def torchvision_vit(layers: int = 3) -> VisionTransformer:
    torch.manual_seed(0)
    vit = VisionTransformer(8, 4, layers, 2, 16, 24, num_classes=5)
    # Torchvision's starts at zero, under which all models are equal
    nn.init.normal_(vit.heads.head.weight)
    return vit.double().eval()


def timm_vit(layers: int = 3, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    sizes: Any = {
        "img_size": 8,
        "patch_size": 4,
        "embed_dim": 16,
        "depth": layers,
        "num_heads": 2,
        "num_classes": 5,
    }
    vit: Any = timm.models.VisionTransformer(**sizes, **kwargs)
    nn.init.normal_(vit.head.weight)
    return vit.double().eval()


def images(count: int = 3) -> Tensor:
    return torch.randn(
        count, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
