"""moefy reads the MLPs of the vision models, and of the language models, that people convert."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers as hf
from torch import nn

import gmoe

pytestmark = pytest.mark.slow

TIMM: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"depth": 2},
    "deit3_small_patch16_224": {"depth": 2},
    "vit_small_patch14_dinov2": {"depth": 2, "img_size": 56},
    "vit_giant_patch14_dinov2": {"depth": 2, "img_size": 56, "embed_dim": 192, "num_heads": 4},
    "vit_small_patch16_dinov3": {"depth": 2},
    "eva02_tiny_patch14_224": {"depth": 2},
    "beit_base_patch16_224": {"depth": 2},
    "swin_tiny_patch4_window7_224": {},
    "swinv2_tiny_window8_256": {},
    "cait_xxs24_224": {"depth": 2},
    "vit_base_patch16_siglip_224": {"depth": 2},
    "vit_base_patch16_clip_224": {"depth": 2},
    "naflexvit_base_patch16_gap": {"depth": 2},
    "convnext_atto_ols": {"conv_mlp": False},
    "vitamin_small_224": {},
    "hiera_tiny_224": {},
    "davit_tiny": {},
}
LANGUAGE: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
T5: dict[str, Any] = {
    "vocab_size": 30,
    "d_model": 16,
    "d_ff": 24,
    "d_kv": 8,
    "num_layers": 2,
    "num_heads": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
MODELS: dict[str, Callable[[], Any]] = {
    **{name: partial(timm.create_model, name, **options) for name, options in TIMM.items()},
    "torchvision's ViT": lambda: torchvision.models.VisionTransformer(32, 16, 2, 2, 16, 24, 0.1),
    "torchvision's Swin": torchvision.models.swin_t,
    "torchvision's Swin V2": torchvision.models.swin_v2_t,
    "ViT with dropout": lambda: hf.ViTModel(hf.ViTConfig(**VISION, hidden_dropout_prob=0.1)),
    "CLIP": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**VISION)),
    "Llama": lambda: hf.LlamaModel(hf.LlamaConfig(**LANGUAGE)),
    "Qwen2": lambda: hf.Qwen2Model(hf.Qwen2Config(**LANGUAGE, num_key_value_heads=2)),
    "Phi": lambda: hf.PhiModel(hf.PhiConfig(**LANGUAGE)),
    "Phi-3": lambda: hf.Phi3Model(hf.Phi3Config(**LANGUAGE, pad_token_id=0)),
    "GPT-NeoX": lambda: hf.GPTNeoXModel(hf.GPTNeoXConfig(**LANGUAGE)),
    "T5": lambda: hf.T5EncoderModel(hf.T5Config(**T5)),
    "T5, gated": lambda: hf.T5EncoderModel(hf.T5Config(**T5, feed_forward_proj="gated-gelu")),
}
DROPOUTS = {
    "torchvision's ViT": (0.1, 0.1),
    "ViT with dropout": (0.0, 0.0),  # behind the MLP, in the block
    "T5": (0.1, 0.0),
    "T5, gated": (0.1, 0.0),
}
"""Probabilities of a model's dropouts, where they are not zero: hidden units, outputs."""

STRAIGHT = {"weight": "straight_through", "balance": None}


@pytest.mark.parametrize("start", ["shared", "copies"])
@pytest.mark.parametrize("name", MODELS)
def test_experts_are_copies_of_the_mlps_of_a_model(name: str, start: Any) -> None:
    torch.manual_seed(0)
    dense = MODELS[name]().eval()
    options: dict[str, Any] = {"num_experts": 2, "start": start}
    if name.startswith("T5"):
        options["targets"] = "*.DenseReluDense"
    if start == "copies":
        options["router_kwargs"] = STRAIGHT
    model = gmoe.moefy(copy.deepcopy(dense), **options)
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, gmoe.MoE)}
    assert layers
    for path, layer in layers.items():
        mlp = dense.get_submodule(path)
        experts: Any = layer.experts
        dropouts = (experts.hidden_dropout.p, experts.output_dropout.p)
        assert dropouts == pytest.approx(DROPOUTS.get(name, (0.0, 0.0)))
        x = torch.randn(2, 4, 4, experts.in_features)  # a grid, as Swins have it
        torch.testing.assert_close(layer(x), mlp(x))


def test_all_of_a_model_starts_as_it_was() -> None:
    dense: nn.Module = MODELS["swinv2_tiny_window8_256"]().eval()
    images = torch.randn(1, 3, 256, 256)
    expected = dense(images)
    torch.testing.assert_close(gmoe.moefy(dense, every=1, num_experts=2)(images), expected)
