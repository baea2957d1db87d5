"""Models of Hugging Face's transformers, built from a config: no download."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}

WITH_HIDDEN: dict[str, Any] = SIZES | {"intermediate_size": 24}

MODELS: dict[str, Callable[[], Any]] = {
    "ViT": lambda: hf.ViTForImageClassification(hf.ViTConfig(**WITH_HIDDEN)),
    "DeiT": lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**WITH_HIDDEN)),
    "DINOv2": lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**SIZES, mlp_ratio=2)),
    "DINOv2, gated": lambda: hf.Dinov2Model(
        hf.Dinov2Config(**SIZES, mlp_ratio=2, use_swiglu_ffn=True)
    ),
    "CLIP": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**WITH_HIDDEN)),
    "SigLIP": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**WITH_HIDDEN)),
    "BEiT": lambda: hf.BeitForImageClassification(hf.BeitConfig(**WITH_HIDDEN)),
    "YOLOS": lambda: hf.YolosModel(
        hf.YolosConfig(**WITH_HIDDEN | {"image_size": [16, 16]}, num_detection_tokens=3)
    ),
    "Data2Vec": lambda: hf.Data2VecVisionModel(hf.Data2VecVisionConfig(**WITH_HIDDEN)),
    "DPT": lambda: hf.DPTModel(hf.DPTConfig(**WITH_HIDDEN, backbone_out_indices=[0, 1, 2, 3])),
    "ViTMAE": lambda: hf.ViTMAEModel(hf.ViTMAEConfig(**WITH_HIDDEN, mask_ratio=0.0)),
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def run(model: Any) -> Tensor:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)  # ViTMAE shuffles the patches
    out: Tensor = model(images)[0]
    return out


def labeled_images(count: int) -> list[dict[str, Any]]:
    """A data set for Trainer, of two classes."""
    drawn = torch.Generator().manual_seed(0)
    pixels = torch.randn(count, 3, 16, 16, generator=drawn)
    return [{"pixel_values": one, "labels": i % 2} for i, one in enumerate(pixels)]


def trainer_of(model: Any, folder: Path, counts: tuple[int, int], **options: Any) -> Any:
    """A silent Trainer on so many images, of which it trains and evaluates."""
    arguments = hf.TrainingArguments(
        str(folder),
        **{
            "per_device_train_batch_size": 4,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            **options,
        },
    )
    train, evaluated = map(labeled_images, counts)
    return hf.Trainer(model=model, args=arguments, train_dataset=train, eval_dataset=evaluated)
