"""Routers alone, forward and backward: their share of a layer, and attention votes in several ways.

Shapes: T tokens or nodes, D width, E experts, K experts a token, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch_geometric.nn import GATConv
from torch_geometric.utils import to_torch_csr_tensor

from experiments.benchmark.measure import Benchmark, Step, Steps, check_equal, layer_step, power_law_edges
from gmoe import AttentionVote, MLPExperts, MoE, MoEConv, build_router
from gmoe.routers.attention_vote import group_votes, neighbor_votes

WIDTH, EXPERTS, HEAD_DIM = 128, 8, 32
"""D, E and d of the votes."""


@dataclass(frozen=True, kw_only=True)
class RouterBenchmark(Benchmark):
    """Routers in an MLP layer, or in one of GCN experts on CSR. Ratios of a router are to the layer that has it."""

    layer: Literal["ffn", "conv"] = "ffn"
    """The layer: of MLPs four times as wide inside, or of GCN experts on a random graph."""
    routers: tuple[str, ...] = ("token_choice", "expert_choice", "multi_centroid", "random")
    """Names of routers."""
    tokens: int | None = None
    """T; by default 8,192, or of convs ogbn-arxiv's 169,343."""
    edges: int = 1_166_243
    """Of convs: edges, before the reverse of each is added."""
    width: int | None = None
    """D; by default 192, or of convs 128."""
    experts: int = 8
    """E."""
    ks: tuple[int, ...] = (1,)
    """Experts per token, K."""

    SMALL: ClassVar = {"repeats": 3, "tokens": 2048, "edges": 14_000}

    def steps(self) -> Steps:
        convs = self.layer == "conv"
        tokens = self.tokens or (169_343 if convs else 8192)
        width = self.width or (128 if convs else 192)
        inputs: tuple[Any, ...] = (torch.randn(tokens, width, requires_grad=True),)
        if convs:
            inputs += (to_torch_csr_tensor(power_law_edges(tokens, self.edges), size=(tokens, tokens)),)
        grad = torch.randn(tokens, width)
        steps: dict[str, Step] = {}
        for k in self.ks:
            for name in self.routers:
                layer: MoE | MoEConv
                if convs:
                    plain: Any = {"router": name, "shared_expert": False}
                    layer = MoEConv("gcn", width, width, num_experts=self.experts, k=k, **plain)
                else:
                    experts = MLPExperts(width, 4 * width, width, num_experts=self.experts)
                    layer = MoE(build_router(name, width, self.experts, k), experts)
                steps[f"layer, {name} K={k}"] = layer_step(layer, inputs, grad)
                assert layer.router is not None
                steps[f"router, {name} K={k}"] = _route(layer.router, inputs[0])
        return steps

    def reference(self, variant: str) -> str:
        return variant.replace("router, ", "layer, ")


@dataclass(frozen=True, kw_only=True)
class VoteBenchmark(Benchmark):
    """One group of tokens, which are also the nodes of a random graph. Ratios are to a dense GATConv of one head."""

    tokens: int = 4096
    """T; ogbn-arxiv has 169,343."""
    edges: int = 28_210
    """Edges, before the reverse of each is added; the default has ogbn-arxiv's mean degree, whose own are 1,166,243."""
    naive: bool = True
    """Time the (T, T) matrix too, whose memory is E T^2, and check that the others equal it."""
    group: bool = True
    """Time the votes over the group, whose time goes by T^2."""

    SMALL: ClassVar = {"repeats": 3, "tokens": 1024, "edges": 7000}

    def steps(self) -> Steps:
        edge_index = power_law_edges(self.tokens, self.edges)
        x, back = torch.randn(self.tokens, WIDTH, requires_grad=True), torch.randn(self.tokens, WIDTH)
        q, k = (torch.randn(self.tokens, EXPERTS, HEAD_DIM, requires_grad=True) for _ in range(2))
        grad = torch.randn(self.tokens, EXPERTS)
        steps: dict[str, Step] = {"GATConv": layer_step(GATConv(WIDTH, WIDTH), (x, edge_index), back)}

        def votes(call: Callable[[Tensor, Tensor], Tensor]) -> None:
            call(q, k).backward(grad)
            q.grad = k.grad = None

        if self.naive:
            check_equal("votes in blocks", in_blocks(q, k), naive(q, k))
            steps["naive votes"] = partial(votes, naive)
        if self.group:
            steps["votes in blocks"] = partial(votes, in_blocks)
        steps["votes of neighbors"] = partial(votes, lambda q, k: neighbor_votes(_scaled(q), k, edge_index))
        scopes: tuple[Literal["group", "neighbors"], ...] = ("group", "neighbors")
        for scope in scopes[not self.group :]:
            router = AttentionVote(WIDTH, EXPERTS, scope=scope, head_dim=HEAD_DIM)
            steps[f"AttentionVote, {scope}"] = _route(router, x, edge_index)
        return steps

    def reference(self, variant: str) -> str:
        return "GATConv"


def _scaled(q_TEd: Tensor) -> Tensor:
    return q_TEd / math.sqrt(q_TEd.size(-1))


def naive(q_TEd: Tensor, k_TEd: Tensor) -> Tensor:
    """(T, E) the votes as they are written down: a (T, T) matrix an expert."""
    scores_ETT = _scaled(q_TEd).transpose(0, 1) @ k_TEd.permute(1, 2, 0)
    return scores_ETT.softmax(dim=-1).sum(dim=1).T


def in_blocks(q_TEd: Tensor, k_TEd: Tensor) -> Tensor:
    """(T, E) the same, in blocks."""
    q_BEd, k_BEd = (value.transpose(0, 1)[None] for value in (_scaled(q_TEd), k_TEd))
    return group_votes(q_BEd, k_BEd)[0].T


def _route(router: nn.Module, x: Tensor, edge_index: Tensor | None = None) -> Step:
    """Scoring and selection, and the way back from the weights of the pairs, where there is one."""

    def step() -> None:
        weight = router(x, edge_index=edge_index).weight
        if weight.requires_grad:
            weight.sum().backward()
        router.zero_grad()
        x.grad = None

    return step
