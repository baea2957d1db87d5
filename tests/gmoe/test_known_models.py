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
    "deit_tiny_distilled_patch16_224": {"depth": 2},
    "vit_small_patch14_dinov2": {"depth": 2, "img_size": 56},
    "vit_giant_patch14_dinov2": {"depth": 2, "img_size": 56, "embed_dim": 192, "num_heads": 4},
    "vit_small_patch16_dinov3": {"depth": 2},
    "vit_base_patch16_siglip_224": {"depth": 2},
    "vit_base_patch16_clip_224": {"depth": 2},
    "vit_relpos_small_patch16_224": {"depth": 2},
    "vit_medium_patch16_rope_reg1_gap_256": {"depth": 2},
    "vit_pe_core_tiny_patch16_384": {"depth": 2},
    "flexivit_small": {"depth": 2},
    "naflexvit_base_patch16_gap": {"depth": 2},
    "eva02_tiny_patch14_224": {"depth": 2},
    "eva_giant_patch14_224": {"depth": 2, "embed_dim": 176},
    "beit_base_patch16_224": {"depth": 2},
    "beitv2_base_patch16_224": {"depth": 2},
    "aimv2_large_patch14_224": {"depth": 2},
    "cait_xxs24_224": {"depth": 2},
    "xcit_nano_12_p16_224": {"depth": 2},
    "convit_tiny": {"depth": 2},
    "tnt_s_patch16_224": {"depth": 2},
    "swin_tiny_patch4_window7_224": {},
    "swin_s3_tiny_224": {},
    "swinv2_tiny_window8_256": {},
    "convnext_atto_ols": {"conv_mlp": False},
    "vitamin_small_224": {},
    "hiera_tiny_224": {},
    "davit_tiny": {},
    "pit_ti_224": {},
    "volo_d1_224": {},
    "coat_tiny": {},
    "crossvit_tiny_240": {},
    "twins_svt_small": {},
    "mvitv2_tiny": {},
    "nest_tiny": {},
    "tiny_vit_5m_224": {},
    "edgenext_xx_small": {},
    "mobilevit_xxs": {},
}
LANGUAGE: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
SPECIAL: dict[str, Any] = {
    f"{word}_token_id": 1 for word in ("pad", "bos", "eos", "cls", "sep", "mask")
}
GPT: dict[str, Any] = {"vocab_size": 30, "n_embd": 16, "n_layer": 2, "n_head": 2}
T5: dict[str, Any] = {
    "vocab_size": 30,
    "d_model": 16,
    "d_ff": 24,
    "d_kv": 8,
    "num_layers": 2,
    "num_heads": 2,
}
WITH_RATIO: dict[str, Any] = {
    "hidden_size": 16,
    "mlp_ratio": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
VISION: dict[str, Any] = {
    **{option: value for option, value in WITH_RATIO.items() if option != "mlp_ratio"},
    "intermediate_size": 24,
}


def sam() -> nn.Module:
    sizes: dict[str, Any] = VISION | {"mlp_dim": 24, "output_channels": 8, "window_size": 2}
    return hf.SamVisionModel(hf.SamVisionConfig(**sizes, global_attn_indexes=[1]))


def conditional_detr() -> nn.Module:
    resnet: Any = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "out_features": ["stage4"]}
    backbone = hf.ResNetConfig(embedding_size=8, **resnet)
    sizes: Any = {
        f"{side}_{size}": value
        for side in ("encoder", "decoder")
        for size, value in {"layers": 2, "attention_heads": 2, "ffn_dim": 24}.items()
    }
    config = hf.ConditionalDetrConfig(backbone_config=backbone, d_model=16, **sizes)
    return hf.ConditionalDetrModel(config)


HUGGING_FACE: dict[str, Callable[[], Any]] = {
    "ViT": lambda: hf.ViTModel(hf.ViTConfig(**VISION)),
    "ViT with dropout": lambda: hf.ViTModel(hf.ViTConfig(**VISION, hidden_dropout_prob=0.1)),
    "DeiT": lambda: hf.DeiTModel(hf.DeiTConfig(**VISION)),
    "ViTMAE": lambda: hf.ViTMAEModel(hf.ViTMAEConfig(**VISION)),
    "ViTMSN": lambda: hf.ViTMSNModel(hf.ViTMSNConfig(**VISION)),
    "I-JEPA": lambda: hf.IJepaModel(hf.IJepaConfig(**VISION)),
    "BEiT": lambda: hf.BeitModel(hf.BeitConfig(**VISION)),
    "CLIP": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**VISION)),
    "SigLIP": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**VISION)),
    "BLIP": lambda: hf.BlipVisionModel(hf.BlipVisionConfig(**VISION)),
    "Pixtral": lambda: hf.PixtralVisionModel(hf.PixtralVisionConfig(**VISION)),
    "AIMv2": lambda: hf.Aimv2VisionModel(hf.Aimv2VisionConfig(**VISION)),
    "DINOv2": lambda: hf.Dinov2Model(hf.Dinov2Config(**WITH_RATIO)),
    "DINOv2, gated": lambda: hf.Dinov2Model(hf.Dinov2Config(**WITH_RATIO, use_swiglu_ffn=True)),
    "DINOv2 with registers": lambda: hf.Dinov2WithRegistersModel(
        hf.Dinov2WithRegistersConfig(**WITH_RATIO)
    ),
    "DINOv3": lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**VISION)),
    "DINOv3, gated": lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**VISION, use_gated_mlp=True)),
    "PVT": lambda: hf.PvtModel(
        hf.PvtConfig(image_size=64, hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2])
    ),
    "Hiera": lambda: hf.HieraModel(hf.HieraConfig(embed_dim=8, depths=[1, 1, 1, 1])),
    "Swin": lambda: hf.SwinModel(hf.SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 2])),
    "ViTPose": lambda: hf.VitPoseBackbone(
        hf.VitPoseBackboneConfig(**WITH_RATIO | {"image_size": [16, 16], "patch_size": [8, 8]})
    ),
    "SAM": sam,
    "Conditional DETR": conditional_detr,
    "timm's models": lambda: hf.TimmWrapperModel(
        hf.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args={"depth": 2})
    ),
    "PatchTST": lambda: hf.PatchTSTModel(
        hf.PatchTSTConfig(d_model=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2)
    ),
    "Wav2Vec2": lambda: hf.Wav2Vec2Model(
        hf.Wav2Vec2Config(**LANGUAGE | {"num_conv_pos_embeddings": 4})
    ),
    "Llama": lambda: hf.LlamaModel(hf.LlamaConfig(**LANGUAGE)),
    "Gemma": lambda: hf.GemmaModel(hf.GemmaConfig(**LANGUAGE)),
    "Qwen2": lambda: hf.Qwen2Model(hf.Qwen2Config(**LANGUAGE, num_key_value_heads=2)),
    "LFM2": lambda: hf.Lfm2Model(hf.Lfm2Config(**LANGUAGE, num_key_value_heads=2)),
    "Phi": lambda: hf.PhiModel(hf.PhiConfig(**LANGUAGE)),
    "Phi-3": lambda: hf.Phi3Model(hf.Phi3Config(**LANGUAGE, pad_token_id=0)),
    "Nemotron": lambda: hf.NemotronModel(hf.NemotronConfig(**LANGUAGE, num_key_value_heads=2)),
    "StarCoder 2": lambda: hf.Starcoder2Model(hf.Starcoder2Config(**LANGUAGE)),
    "GPT-NeoX": lambda: hf.GPTNeoXModel(hf.GPTNeoXConfig(**LANGUAGE)),
    "GPT-J": lambda: hf.GPTJModel(hf.GPTJConfig(**GPT, rotary_dim=4)),
    "GPT-Neo": lambda: hf.GPTNeoModel(
        hf.GPTNeoConfig(
            vocab_size=30,
            hidden_size=16,
            num_layers=2,
            num_heads=2,
            attention_types=[[["global", "local"], 1]],
        )
    ),
    "Falcon": lambda: hf.FalconModel(
        hf.FalconConfig(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    ),
    "DistilBERT": lambda: hf.DistilBertModel(
        hf.DistilBertConfig(vocab_size=30, dim=16, hidden_dim=24, n_layers=2, n_heads=2)
    ),
    "ModernBERT": lambda: hf.ModernBertModel(hf.ModernBertConfig(**LANGUAGE | SPECIAL)),
    "T5": lambda: hf.T5EncoderModel(hf.T5Config(**T5)),
    "T5, gated": lambda: hf.T5EncoderModel(hf.T5Config(**T5, feed_forward_proj="gated-gelu")),
}


MODELS: dict[str, Callable[[], Any]] = {
    **{name: partial(timm.create_model, name, **options) for name, options in TIMM.items()},
    "torchvision's ViT": lambda: torchvision.models.VisionTransformer(32, 16, 2, 2, 16, 24, 0.1),
    "torchvision's Swin": torchvision.models.swin_t,
    "torchvision's Swin V2": torchvision.models.swin_v2_t,
    **HUGGING_FACE,
}
TARGETS = {
    "PatchTST": "*.ff",
    "Wav2Vec2": "*.feed_forward",
    "LFM2": "*.feed_forward",
    "Pixtral": "*.feed_forward",
    "AIMv2": "*.ffn",
    "DistilBERT": "*.ffn",
    "T5": "*.DenseReluDense",
    "T5, gated": "*.DenseReluDense",
}
"""Where a model's MLPs are, if not in the ``mlp`` of blocks."""

DROPOUTS = {
    "torchvision's ViT": (0.1, 0.1),
    "ViT with dropout": (0.0, 0.0),  # behind the MLP, in the block
    "Wav2Vec2": (0.1, 0.1),
    "DistilBERT": (0.0, 0.1),
    "T5": (0.1, 0.0),
    "T5, gated": (0.1, 0.0),
}
"""Probabilities of a model's dropouts, where they are not zero: hidden units, outputs."""

NOT_AS_COPIES = {
    "Conditional DETR": "draws random numbers in training",
    "Falcon": "a linear layer of its own class",
}
"""Models whose MLPs stay as shared experts, and why no experts replace them."""

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "pvt_v2_b0": (partial(timm.create_model, "pvt_v2_b0"), "a MlpWithDepthwiseConv of"),
    "levit_128s": (partial(timm.create_model, "levit_128s"), "a LevitMlp of .*BatchNorm1d"),
    **{
        name: (partial(timm.create_model, name), rf"a {mlp} of \(Conv2d")
        for name, mlp in {
            "focalnet_tiny_srf": "Mlp",
            "caformer_s18": "Mlp",
            "poolformer_s12": "Mlp",
            "fastvit_t8": "ConvMlp",
            "visformer_tiny": "SpatialMlp",
            "convnextv2_atto": "GlobalResponseNormMlp",
        }.items()
    },
    "GPT-2": (lambda: hf.GPT2Model(hf.GPT2Config(**GPT)), "a GPT2MLP"),
    "BLOOM": (
        lambda: hf.BloomModel(hf.BloomConfig(vocab_size=30, hidden_size=16, n_layer=2, n_head=2)),
        "a BloomMLP of",
    ),
}
"""Models whose MLPs have no form that experts could have, and how an error names the first."""

STRAIGHT = {"weight": "straight_through", "balance": None}


@pytest.mark.parametrize("start", ["shared", "copies"])
@pytest.mark.parametrize("name", MODELS)
def test_experts_are_copies_of_the_mlps_of_a_model(name: str, start: Any) -> None:
    torch.manual_seed(0)
    dense = MODELS[name]().eval()
    targets = TARGETS.get(name)
    options: dict[str, Any] = {"num_experts": 2, "start": start, "targets": targets}
    if start == "copies":
        options["router_kwargs"] = STRAIGHT
    if start == "copies" and name in NOT_AS_COPIES:
        with pytest.raises(ValueError, match=f"^model: got .*{NOT_AS_COPIES[name]}"):
            gmoe.moefy(dense, **options)
        return
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


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_with_other_mlps_is_refused_by_their_class(name: str) -> None:
    build, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"^model: got .*mlp, {message}"):
        gmoe.moefy(build(), num_experts=2)


def test_all_of_a_model_starts_as_it_was() -> None:
    dense: nn.Module = MODELS["swinv2_tiny_window8_256"]().eval()
    images = torch.randn(1, 3, 256, 256)
    expected = dense(images)
    torch.testing.assert_close(gmoe.moefy(dense, every=1, num_experts=2)(images), expected)
