"""The experts of a ViT, from a loop with nonzero to one batched product. Shapes: B images, T tokens, D width."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.vision_transformer import MLPBlock

from experiments.benchmark.options import Benchmark, measure
from experiments.benchmark.peers import NonzeroLoop
from gmoe.dispatch import Backend
from gmoe.models.vit import ViTMoE, ViTSize

REFERENCE = "dense"
DEFAULT = "with a shared expert"
"""As ViTMoE is by default: it starts as the dense model, so that it is not compared with the others."""

BACKENDS: tuple[Backend, ...] = ("loop", "padded", "grouped")


@dataclass(frozen=True, kw_only=True)
class VitBenchmark(Benchmark):
    """A ViT on random images; the default size is that of the `cifar10` preset."""

    router: str = "expert_choice"
    """The router."""
    experts: int = 8
    """E."""
    k: int = 1
    """Experts per token, K."""
    batch: int = 128
    """Images, B."""
    image: int = 32
    """Height and width of an image."""
    patch: int = 4
    """Height and width of a patch."""
    layers: int = 6
    """Blocks; every second has experts."""
    heads: int = 4
    """Attention heads."""
    dim: int = 128
    """Width of a token, D."""
    hidden: int = 256
    """Hidden width of an expert."""
    bf16: bool = False
    """Under bfloat16 autocast, not in float32."""

    def run(self) -> dict[str, Any]:
        """Measure a forward and a backward pass of the whole model.

        Returns:
            By variant, the figures of :func:`measure`; the reference is the dense ViT of the same active hidden width,
            K times that of an expert in every second block.

        Raises:
            ValueError: sizes that do not divide, or an unknown router.
            RuntimeError: two ways to run the experts differ.
        """
        device = self.torch_device()
        generator = torch.Generator().manual_seed(self.seed)
        images = torch.randn(self.batch, 3, self.image, self.image, generator=generator).to(device)
        labels = torch.randint(10, (self.batch,), generator=generator).to(device)
        models = {name: model.to(device) for name, model in self._models().items()}
        _check_equal({name: model for name, model in models.items() if name not in (REFERENCE, DEFAULT)}, images)
        variants = {name: self._step(model, images, labels) for name, model in models.items()}
        return measure(variants, self.repeats, device, lambda _: REFERENCE)

    def _models(self) -> dict[str, nn.Module]:
        size = ViTSize(
            image_size=self.image,
            patch_size=self.patch,
            num_layers=self.layers,
            num_heads=self.heads,
            hidden_dim=self.dim,
            mlp_dim=self.hidden,
        )

        def build(backend: Backend) -> ViTMoE:
            torch.manual_seed(self.seed)
            kwargs = {"balance": None} if self.router == "token_choice" else None  # noise would differ from run to run
            options: Any = {"num_experts": self.experts, "k": self.k, "shared_expert": False, "router_kwargs": kwargs}
            return ViTMoE(size, router=self.router, backend=backend, **options)

        dense = ViTMoE(size, router=None)
        for block in list(dense.encoder.layers)[1::2]:
            block.mlp = MLPBlock(self.dim, self.k * self.hidden, dropout=0.0)
        nonzero = build("loop")
        for block in list(nonzero.encoder.layers)[1::2]:
            block.mlp = NonzeroLoop(block.mlp)
        models: dict[str, nn.Module] = {
            REFERENCE: dense,
            "loop with nonzero": nonzero,
            **{name: build(name) for name in BACKENDS},
        }
        models[DEFAULT] = ViTMoE(size, router=self.router, num_experts=self.experts, k=self.k)
        return models

    def _step(self, model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
        def step() -> None:
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            model.zero_grad()

        return step


@torch.no_grad()
def _check_equal(models: dict[str, nn.Module], images: Tensor) -> None:
    """Weights that are drawn are the same in all of them; the head, which starts at zero, is left out."""
    found = {name: encode(model, images) for name, model in models.items()}
    expected = found.pop("loop")
    for name, tokens in found.items():
        if not torch.allclose(tokens, expected, rtol=1e-3, atol=1e-4):
            far = float((tokens - expected).abs().max())
            raise RuntimeError(f"{name} and loop differ by {far}, expected rounding only")


def encode(model: Any, images: Tensor) -> Tensor:
    """(B, T, D) the tokens that leave the last block."""
    x_BTD = model._process_input(images)
    token = model.class_token.expand(x_BTD.size(0), -1, -1)
    tokens: Tensor = model.encoder(torch.cat([token, x_BTD], dim=1))
    return tokens
