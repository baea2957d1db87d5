"""An MLP layer: one dense FFN, ours, and others' layers, forward and backward.

Shapes: T tokens, D width, H hidden, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from experiments.benchmark import peers
from experiments.benchmark.measure import Benchmark, Step, Steps, check_equal, layer_step
from gmoe import MLPExperts, MoE, TokenChoice
from gmoe.dispatch import Backend


@dataclass(frozen=True, kw_only=True)
class FFNBenchmark(Benchmark):
    """One MoE layer in place of a transformer's FFN; token choice, dropless. Ratios are to the dense FFN with hidden
    width K·H in float32."""

    tokens: int = 8192
    """T."""
    width: int = 192
    """D."""
    hidden: int = 768
    """H, of an expert; gated experts have two thirds of it, and so the same FLOPs."""
    experts: tuple[int, ...] = (8,)
    """Numbers of experts, E."""
    ks: tuple[int, ...] = (1, 2)
    """Experts per token, K."""
    precisions: tuple[Literal["fp32", "bf16"], ...] = ("fp32",)
    """float32, or bfloat16 by autocast."""
    backends: tuple[Backend, ...] = ("auto",)
    """How our experts run."""
    peers: bool = True
    """Time others' layers too, where they are installed."""

    SMALL: ClassVar = {"repeats": 3, "tokens": 1024}

    def steps(self) -> Steps:
        x, grad = torch.randn(self.tokens, self.width, requires_grad=True), torch.randn(self.tokens, self.width)
        steps: dict[str, Step] = {}
        for k in self.ks:
            up, down = nn.Linear(self.width, k * self.hidden), nn.Linear(k * self.hidden, self.width)
            layers: dict[str, nn.Module] = {f"dense K={k}": nn.Sequential(up, nn.GELU(), down)}
            for e in self.experts:
                if k <= e:
                    layers |= {f"{name} E={e} K={k}": layer for name, layer in self._layers(e, k, x)}
            for name, layer in layers.items():
                for precision in self.precisions:
                    steps[f"{name}, {precision}"] = layer_step(layer, (x,), grad, precision == "bf16")
            steps.setdefault(f"dense K={k}, fp32", layer_step(layers[f"dense K={k}"], (x,), grad))
        return steps

    def reference(self, variant: str) -> str:
        return f"dense K={variant.split(',')[0].rsplit('K=', 1)[1]}, fp32"

    def _layers(self, e: int, k: int, x: Tensor) -> Iterator[tuple[str, nn.Module]]:
        """Ours and the others', each group with one set of weights, checked equal."""

        def layer(hidden: int, backend: Backend = "auto", **options: object) -> MoE:
            experts = MLPExperts(self.width, hidden, self.width, num_experts=e, backend=backend, **options)  # type: ignore[arg-type]
            return MoE(TokenChoice(self.width, e, k, balance=None), experts)

        plain = layer(self.hidden)
        gated = layer(2 * self.hidden // 3, activation="silu", glu=True, bias=False)
        found: dict[str, nn.Module | None] = {}
        for backend in self.backends:
            found[f"gmoe {backend}"] = ours = layer(self.hidden, backend)
            ours.load_state_dict(plain.state_dict())
        if self.peers:
            found |= {
                "loop with nonzero": peers.NonzeroLoop(plain),
                "pytorch-mixtures": peers.pytorch_mixtures(plain),
                "st-moe-pytorch": peers.st_moe(plain),
                "gmoe gated": gated,
                **{f"Mixtral {way}": peers.mixtral(gated, way) for way in ("eager", "grouped_mm")},
            }
        for name, other in found.items():
            if other is not None:
                if name != "st-moe-pytorch":  # whose capacity and second choice are its own
                    check_equal(name, other(x), (gated if name.startswith(("gmoe gated", "Mixtral")) else plain)(x))
                yield name, other
