"""An MLP layer: one dense FFN, ours, and others' layers, forward and backward.

Shapes: T tokens, D width, H hidden, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

import gmoe
from experiments.benchmark import peers
from experiments.benchmark.options import Benchmark, layer_step, measure
from gmoe.dispatch import Backend

Precision = Literal["fp32", "bf16"]
OWN_ROUTING = ("st-moe-pytorch", "Tutel")
"""Layers whose routing cannot be made ours, so that outputs are not compared."""


@dataclass(frozen=True, kw_only=True)
class FFNBenchmark(Benchmark):
    """One MoE layer in place of a transformer's FFN; token choice, dropless."""

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
    precisions: tuple[Precision, ...] = ("fp32",)
    """float32, or bfloat16 by autocast; all ratios are to the dense FFN in float32."""
    backends: tuple[Backend, ...] = ("auto",)
    """How our experts run."""
    peers: bool = True
    """Time others' layers too, where they are installed."""

    def run(self) -> dict[str, Any]:
        """Measure.

        Returns:
            By variant, the figures of :func:`measure`; the reference is the dense FFN with hidden width K·H in float32.

        Raises:
            RuntimeError: layers that compute the same thing differ.
        """
        device, variants = self.torch_device(), {}
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.tokens, self.width, generator=generator).to(device).requires_grad_()
        grad = torch.randn(self.tokens, self.width, generator=generator).to(device)
        for k in self.ks:
            torch.manual_seed(self.seed)
            dense = nn.Sequential(
                nn.Linear(self.width, k * self.hidden), nn.GELU(), nn.Linear(k * self.hidden, self.width)
            )
            layers: dict[str, nn.Module] = {f"dense K={k}": dense}
            for e in self.experts:
                if k <= e:
                    layers |= {f"{name} E={e} K={k}": layer for name, layer in self._layers(e, k, x)}
            for name, layer in layers.items():
                for precision in self.precisions:
                    variants[f"{name}, {precision}"] = layer_step(layer.to(device), (x,), grad, precision == "bf16")
            variants.setdefault(f"dense K={k}, fp32", layer_step(dense, (x,), grad))
        return measure(
            variants, self.repeats, device, lambda variant: f"dense K={variant.split(',')[0].rsplit('K=', 1)[1]}, fp32"
        )

    def _layers(self, e: int, k: int, x: Tensor) -> Iterator[tuple[str, nn.Module]]:
        """Ours and the others', each group with one set of weights, checked equal."""
        plain = gmoe.MoE(
            gmoe.TokenChoice(self.width, e, k, balance=None),
            gmoe.MLPExperts(self.width, self.hidden, self.width, num_experts=e),
        )
        third = 2 * self.hidden // 3
        gated_experts = gmoe.MLPExperts(
            self.width, third, self.width, num_experts=e, activation="silu", glu=True, bias=False
        )
        gated = gmoe.MoE(gmoe.TokenChoice(self.width, e, k, balance=None), gated_experts)
        found: dict[str, nn.Module | None] = {
            f"gmoe {backend}": _with_backend(plain, backend, self.width, self.hidden) for backend in self.backends
        }
        if self.peers:
            found |= {
                "loop with nonzero": peers.NonzeroLoop(plain),
                "pytorch-mixtures": peers.pytorch_mixtures(plain),
                "st-moe-pytorch": peers.st_moe(plain),
                "Tutel": peers.tutel(plain),
            }
        _check_equal(plain, found, x)
        yield from ((name, layer) for name, layer in found.items() if layer is not None)
        if self.peers:
            others = {f"Mixtral {way}": peers.mixtral(gated, way) for way in ("eager", "grouped_mm")}
            _check_equal(gated, others, x)
            yield "gmoe gated", gated
            yield from ((name, layer) for name, layer in others.items() if layer is not None)


def _with_backend(layer: gmoe.MoE, backend: Backend, width: int, hidden: int) -> nn.Module:
    e, k = layer.experts.num_experts, layer.router.k
    made = gmoe.MoE(
        gmoe.TokenChoice(width, e, k, balance=None),
        gmoe.MLPExperts(width, hidden, width, num_experts=e, backend=backend),
    )
    made.load_state_dict(layer.state_dict())
    return made


@torch.no_grad()
def _check_equal(ours: nn.Module, others: dict[str, nn.Module | None], x: Tensor) -> None:
    """On the CPU, before anything moves."""
    x = x.detach().cpu()
    expected = ours(x)
    for name, layer in others.items():
        if layer is not None and name not in OWN_ROUTING and not torch.allclose(layer(x), expected, 1e-3, 1e-4):
            far = float((layer(x) - expected).abs().max())
            raise RuntimeError(f"{name} and gmoe differ by {far}, expected rounding only")
