"""The experts of a ViT, from a loop with nonzero to one batched product. Shapes: B images, T tokens, D width."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.benchmark.measure import Benchmark, Steps, check_equal
from experiments.benchmark.peers import NonzeroLoop
from gmoe.dispatch import Backend
from gmoe.models.vit import ViTMoE, ViTSize

SIZE = ViTSize(image_size=32, patch_size=4, num_layers=6, num_heads=4, hidden_dim=128, mlp_dim=256)
BACKENDS: tuple[Backend, ...] = ("loop", "padded", "grouped")


@dataclass(frozen=True, kw_only=True)
class VitBenchmark(Benchmark):
    """A ViT with 8 experts in every second block, K = 1, on random images. Ratios are to the dense ViT."""

    router: str = "expert_choice"
    """The router."""
    batch: int = 128
    """Images, B."""
    size: ViTSize = SIZE
    """By default that of the `cifar10` preset."""
    bf16: bool = False
    """Under bfloat16 autocast, not in float32."""

    SMALL: ClassVar = {"repeats": 3, "batch": 16}

    def steps(self) -> Steps:
        images = torch.randn(self.batch, 3, self.size.image_size, self.size.image_size)
        labels = torch.randint(10, (self.batch,))

        def step(model: nn.Module) -> None:
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            model.zero_grad()

        models = dict(self._models())
        expected = encode(models["loop"], images)
        for name in ("loop with nonzero", "padded", "grouped"):
            check_equal(name, encode(models[name], images), expected)
        return {name: partial(step, model) for name, model in models.items()}

    def reference(self, variant: str) -> str:
        return "dense"

    def _models(self) -> Iterator[tuple[str, nn.Module]]:
        def build(backend: Backend) -> ViTMoE:
            torch.manual_seed(self.seed)  # all ways to run the experts get the same ones
            balance = {"balance": None} if self.router == "token_choice" else None  # noise would differ from run to run
            return ViTMoE(self.size, router=self.router, backend=backend, shared_expert=False, router_kwargs=balance)

        yield "dense", ViTMoE(self.size, router=None)
        nonzero = build("loop")
        for block in list(nonzero.encoder.layers)[1::2]:
            block.mlp = NonzeroLoop(block.mlp)
        yield "loop with nonzero", nonzero
        yield from ((backend, build(backend)) for backend in BACKENDS)
        # as ViTMoE is by default: it starts as the dense model, so that it is not compared with the others
        yield "with a shared expert", ViTMoE(self.size, router=self.router)


@torch.no_grad()
def encode(model: Any, images: Tensor) -> Tensor:
    """(B, T, D) the tokens that leave the last block: the head, which starts at zero, would hide them."""
    x_BTD = model._process_input(images)
    token = model.class_token.expand(x_BTD.size(0), -1, -1)
    tokens: Tensor = model.encoder(torch.cat([token, x_BTD], dim=1))
    return tokens
