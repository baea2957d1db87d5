"""The routers' share of a layer: scoring and selection alone, and the whole layer, forward and backward.

Shapes: T tokens or nodes, D width, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

import gmoe
from experiments.benchmark.conv import random_graph
from experiments.benchmark.options import Benchmark, layer_step, measure
from experiments.benchmark.vote import route

ROUTERS = ("token_choice", "expert_choice", "multi_centroid", "random")


@dataclass(frozen=True, kw_only=True)
class RouterBenchmark(Benchmark):
    """Routers in an MLP layer, or in one of GCN experts on CSR."""

    layer: Literal["ffn", "conv"] = "ffn"
    """The layer: of MLPs, or of GCN experts on a random graph."""
    routers: tuple[str, ...] = ROUTERS
    """Names of routers."""
    tokens: int | None = None
    """T; by default 8,192, or of convs ogbn-arxiv's 169,343."""
    edges: int = 1_166_243
    """Of convs: edges, before the reverse of each is added."""
    width: int | None = None
    """D; by default 192, or of convs 128."""
    hidden: int = 768
    """MLP layer: hidden width."""
    experts: int = 8
    """E."""
    ks: tuple[int, ...] = (1,)
    """Experts per token, K."""

    def run(self) -> dict[str, Any]:
        """Measure.

        Returns:
            By variant, the figures of :func:`measure`; the reference of a router is the layer that has it, of which it
            is a share.

        Raises:
            ValueError: an unknown router.
        """
        device, convs = self.torch_device(), self.layer == "conv"
        tokens = self.tokens if self.tokens is not None else 169_343 if convs else 8192
        width = self.width if self.width is not None else 128 if convs else 192
        generator = torch.Generator().manual_seed(self.seed)
        graph = (random_graph(tokens, self.edges, generator)["csr"].to(device),) if convs else ()
        x = torch.randn(tokens, width, generator=generator).to(device).requires_grad_()
        grad = torch.randn(tokens, width, generator=generator).to(device)
        variants: dict[str, Callable[[], object]] = {}
        for k in self.ks:
            for name in self.routers:
                torch.manual_seed(self.seed)
                layer: torch.nn.Module
                if convs:
                    layer = gmoe.MoEConv(
                        "gcn", width, width, num_experts=self.experts, router=name, k=k, shared_expert=False
                    )
                else:
                    router = gmoe.build_router(name, width, self.experts, k)
                    layer = gmoe.MoE(router, gmoe.MLPExperts(width, self.hidden, width, num_experts=self.experts))
                variants[f"layer, {name} K={k}"] = layer_step(layer.to(device), (x, *graph), grad)
                assert isinstance(layer.router, torch.nn.Module)
                variants[f"router, {name} K={k}"] = route(layer.router, x)
        return measure(variants, self.repeats, device, lambda variant: variant.replace("router, ", "layer, "))
