"""Attention votes: the naive (T, T) matrix, ours in blocks, and over neighbors; beside one dense GATConv.

Shapes: T tokens, E experts, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch_geometric.nn import GATConv

import gmoe
from experiments.benchmark.options import Benchmark, measure
from experiments.throughput import power_law_edges
from gmoe.routers.attention_vote import group_votes, neighbor_votes

REFERENCE = "GATConv"


@dataclass(frozen=True, kw_only=True)
class VoteBenchmark(Benchmark):
    """One group of tokens, which are also the nodes of a random graph; forward and backward."""

    tokens: int = 4096
    """T; ogbn-arxiv has 169,343."""
    edges: int = 28_210
    """Edges, before the reverse of each is added; the default has ogbn-arxiv's mean degree, whose own are 1,166,243."""
    width: int = 128
    """Features of a token."""
    experts: int = 8
    """E."""
    head_dim: int = 32
    """d."""
    naive: bool = True
    """Time the (T, T) matrix too, whose memory is E T^2, and check that the others equal it."""
    group: bool = True
    """Time the votes over the group, whose time goes by T^2."""

    def run(self) -> dict[str, Any]:
        """Measure.

        Returns:
            By variant, the figures of :func:`measure`; the reference is a dense GATConv of one head on the graph.

        Raises:
            RuntimeError: ours and the naive votes differ.
        """
        device = self.torch_device()
        generator = torch.Generator().manual_seed(self.seed)
        edge_index = power_law_edges(self.tokens, self.edges, generator).to(device)
        x = torch.randn(self.tokens, self.width, generator=generator).to(device).requires_grad_()
        shape = (self.tokens, self.experts, self.head_dim)
        q, k = (torch.randn(shape, generator=generator).to(device).requires_grad_() for _ in range(2))
        grad = torch.randn(self.tokens, self.experts, generator=generator).to(device)
        torch.manual_seed(self.seed)
        dense = GATConv(self.width, self.width).to(device)
        back = torch.randn(self.tokens, self.width, generator=generator).to(device)

        def conv() -> None:
            dense(x, edge_index).backward(back)
            dense.zero_grad()
            x.grad = None

        variants: dict[str, Callable[[], object]] = {REFERENCE: conv}
        if self.naive:
            torch.testing.assert_close(in_blocks(q, k), naive(q, k), rtol=1e-3, atol=1e-4)
            variants["naive votes"] = _votes(naive, q, k, grad)
        if self.group:
            variants["votes in blocks"] = _votes(in_blocks, q, k, grad)
        variants["votes of neighbors"] = _votes(
            lambda q, k: neighbor_votes(q / math.sqrt(q.size(-1)), k, edge_index), q, k, grad
        )
        scopes: tuple[Literal["group", "neighbors"], ...] = ("group", "neighbors")
        for scope in scopes:
            if scope == "neighbors" or self.group:
                router = gmoe.AttentionVote(self.width, self.experts, scope=scope, head_dim=self.head_dim).to(device)
                variants[f"AttentionVote, {scope}"] = route(router, x, edge_index)
        return measure(variants, self.repeats, device, lambda _: REFERENCE)


def naive(q_TEd: Tensor, k_TEd: Tensor) -> Tensor:
    """(T, E) the votes as they are written down: a (T, T) matrix an expert."""
    scores_ETT = q_TEd.transpose(0, 1) @ k_TEd.permute(1, 2, 0) / math.sqrt(q_TEd.size(-1))
    return scores_ETT.softmax(dim=-1).sum(dim=1).T


def in_blocks(q_TEd: Tensor, k_TEd: Tensor) -> Tensor:
    """(T, E) the same, in blocks."""
    q_BEd, k_BEd = (value.transpose(0, 1)[None] for value in (q_TEd / math.sqrt(q_TEd.size(-1)), k_TEd))
    return group_votes(q_BEd, k_BEd)[0].T


def _votes(votes: Callable[[Tensor, Tensor], Tensor], q: Tensor, k: Tensor, grad: Tensor) -> Callable[[], None]:
    def step() -> None:
        votes(q, k).backward(grad)
        q.grad = k.grad = None

    return step


def route(router: nn.Module, x: Tensor, edge_index: Tensor | None = None) -> Callable[[], None]:
    """Scoring and selection, and the way back from the weights of the pairs, where there is one."""

    def step() -> None:
        weight = router(x, edge_index=edge_index).weight
        if weight.requires_grad:
            weight.sum().backward()
        router.zero_grad()
        x.grad = None

    return step
