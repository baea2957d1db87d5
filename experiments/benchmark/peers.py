"""What others do with the same router and the same weights as our layers.

Shapes: N nodes, T tokens, D width, E experts. Packages that are not installed give ``None``.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import HeteroLinear

from gmoe import MoE, MoEConv
from gmoe.routers.attention_vote import group_votes


class Masked(nn.Module):
    """What public GNN-MoEs do: every expert of ``layer`` on the whole graph, and the routing as a mask."""

    def __init__(self, layer: MoEConv) -> None:
        super().__init__()
        self.router: Any = layer.router
        self.convs = nn.ModuleList(layer.experts.expert(index) for index in range(layer.num_experts))

    def forward(self, x: Tensor, adj: Any) -> Tensor:
        """(N, D) the sum of all experts' outputs, most of them times zero."""
        weights = self.router(x).to_dense().T
        return torch.stack([w_N[:, None] * conv(x, adj) for w_N, conv in zip(weights, self.convs, strict=True)]).sum(0)


class Grouped(nn.Module):
    """What PyG offers: GCN's aggregate once, and its HeteroLinear with the expert as the type of a row."""

    def __init__(self, layer: MoEConv) -> None:
        super().__init__()
        self.router: Any = layer.router
        experts: list[Any] = [layer.experts.expert(index) for index in range(layer.num_experts)]
        self.linear = HeteroLinear(layer.in_channels, layer.out_channels, layer.num_experts, is_sorted=True)
        self.linear.weight = nn.Parameter(torch.stack([expert.lin.weight.T for expert in experts]))
        self.linear.bias = nn.Parameter(torch.stack([expert.bias for expert in experts]))
        self.conv = experts[0]
        self.conv.lin, self.conv.bias = nn.Identity(), None

    def forward(self, x: Tensor, adj: Any) -> Tensor:
        """(N, D) the weighted sum of each node's experts."""
        routing = self.router(x)
        y = self.linear(self.conv(x, adj)[routing.token], routing.expert) * routing.weight[:, None]
        return y.new_zeros(x.size(0), y.size(1)).index_add(0, routing.token, y)


class NonzeroLoop(nn.Module):
    """A loop over the experts of ``layer`` that finds the tokens of each by nonzero, as in most published code."""

    def __init__(self, layer: MoE) -> None:
        super().__init__()
        self.router = layer.router
        self.experts: Any = layer.experts

    def forward(self, x: Tensor) -> Tensor:
        """As :class:`gmoe.MoE`."""
        weight_TE, (up, down) = self.router(x).to_dense(), (self.experts.up, self.experts.down)
        x_TD = x.reshape(-1, x.size(-1))
        y_TD = torch.zeros_like(x_TD)
        for e in range(self.experts.num_experts):
            token = weight_TE[:, e].nonzero().squeeze(1)
            h = self.experts.activation(F.linear(x_TD[token], up.weight[e].T, up.bias[e]))
            h = F.linear(h, down.weight[e].T, down.bias[e])
            y_TD = y_TD.to(h.dtype).index_add(0, token, h * weight_TE[token, e].to(h.dtype)[:, None])
        return y_TD.view(*x.shape[:-1], -1)


def _flat(layer: nn.Module) -> nn.Module:
    """Let a layer that wants (B, T, D), and may return losses as well, take and give (T, D)."""
    layer.register_forward_pre_hook(lambda _, args: (args[0][None],))
    layer.register_forward_hook(lambda _, __, y: (y if isinstance(y, Tensor) else y[0])[0])
    return layer


def _optional(name: str) -> Any | None:
    """The module, or ``None`` where its package is not installed; one that is but cannot be imported is an error."""
    return importlib.import_module(name) if importlib.util.find_spec(name.split(".")[0]) else None


@torch.no_grad()
def mixtral(layer: MoE, implementation: str) -> nn.Module | None:
    """transformers' ``MixtralSparseMoeBlock``, ``"eager"`` (a loop) or ``"grouped_mm"``; for gated SiLU experts."""
    module = _optional("transformers.models.mixtral.modeling_mixtral")
    if module is None:
        return None
    experts, router = cast(Any, layer.experts), layer.router
    sizes = {"hidden_size": experts.in_features, "intermediate_size": experts.hidden_features}
    sizes |= {"num_local_experts": experts.num_experts, "num_experts_per_tok": router.k}
    config = module.MixtralConfig(**sizes, hidden_act="silu")
    config._experts_implementation = implementation
    block = module.MixtralSparseMoeBlock(config)
    block.gate.weight.copy_(router.get_parameter("gate.weight"))
    block.experts.gate_up_proj.copy_(experts.up.weight.transpose(1, 2))
    block.experts.down_proj.copy_(experts.down.weight.transpose(1, 2))
    return _flat(block)


@torch.no_grad()
def pytorch_mixtures(layer: MoE) -> nn.Module | None:
    """``pytorch_mixtures.TopkMoE``; for GELU experts."""
    module = _optional("pytorch_mixtures")
    if module is None:
        return None
    experts, router = cast(Any, layer.experts), layer.router
    kinds = {"expert_fn": "ff", "expert_act": "gelu", "router_fn": "topk", "capacity_factor": None}
    sizes = {"hidden_dim": experts.in_features, "intermediate_dim": experts.hidden_features, "topk": router.k}
    config = module.MoEConfig(**kinds, **sizes, num_experts=experts.num_experts, dtype=torch.float32)
    other = module.TopkMoE(config)
    other.weight.copy_(router.get_parameter("gate.weight").T)
    for index, expert in enumerate(other.experts):
        for theirs, ours in ((expert.up, experts.up), (expert.down, experts.down)):
            theirs.weight.copy_(ours.weight[index].T)
            theirs.bias.copy_(ours.bias[index])
    return _flat(other)


def st_moe(layer: MoE) -> nn.Module | None:
    """``st_moe_pytorch.MoE`` of the same sizes: capacity and random second choice are its own, and it has no K = 1."""
    module, experts, k = _optional("st_moe_pytorch"), cast(Any, layer.experts), layer.router.k
    if module is None or k < 2:
        return None
    width, hidden, e = experts.in_features, experts.hidden_features, experts.num_experts
    mlps = nn.ModuleList(nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)) for _ in range(e))
    return _flat(module.MoE(width, num_experts=e, gating_top_n=k, experts=mlps))


def naive_votes(q_TEd: Tensor, k_TEd: Tensor) -> Tensor:
    """(T, E) the votes of attention as they are written down: a (T, T) matrix an expert."""
    scores_ETT = q_TEd.transpose(0, 1) @ k_TEd.permute(1, 2, 0) / math.sqrt(q_TEd.size(-1))
    return scores_ETT.softmax(dim=-1).sum(dim=1).T


def block_votes(q_TEd: Tensor, k_TEd: Tensor) -> Tensor:
    """(T, E) the same, in blocks, as gmoe does."""
    q_BEd, k_BEd = (value.transpose(0, 1)[None] for value in (q_TEd / math.sqrt(q_TEd.size(-1)), k_TEd))
    return group_votes(q_BEd, k_BEd)[0].T
