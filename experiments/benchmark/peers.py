"""What others do with the same router and the same weights. Shapes: T tokens, D width, H hidden, E experts, K a token.

Other people's layers are ``None`` where they are not installed; each gets the weights of ours, so that outputs agree.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmoe import MoE


class NonzeroLoop(nn.Module):
    """A loop over experts that looks for the tokens of each with nonzero, as in most published code.

    Args:
        layer: whose router and experts it runs.
    """

    def __init__(self, layer: MoE) -> None:
        super().__init__()
        self.router = layer.router
        self.experts: Any = layer.experts

    def forward(self, x: Tensor) -> Tensor:
        """As :class:`gmoe.MoE`."""
        weight_TE = self.router(x).to_dense()
        x_TD = x.reshape(-1, x.size(-1))
        y_TD = torch.zeros_like(x_TD)
        for expert in range(self.experts.num_experts):
            token = weight_TE[:, expert].nonzero().squeeze(1)
            h = self.experts.activation(self._linear(self.experts.up, expert, x_TD[token]))
            h = self._linear(self.experts.down, expert, h)
            y_TD = y_TD.to(h.dtype).index_add(0, token, h * weight_TE[token, expert].to(h.dtype)[:, None])
        return y_TD.view(*x.shape[:-1], -1)

    @staticmethod
    def _linear(stacked: Any, expert: int, x: Tensor) -> Tensor:
        return F.linear(x, stacked.weight[expert].T, None if stacked.bias is None else stacked.bias[expert])


class Batched(nn.Module):
    """Takes (T, D), for layers that want (B, T, D).

    Args:
        layer: the layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) the layer's output for one sequence; that alone where it returns losses as well."""
        y = self.layer(x_TD[None])
        return (y if isinstance(y, Tensor) else y[0])[0]


def _optional(name: str) -> Any | None:
    """The module, or ``None`` where its package is not installed; one that is but cannot be imported is an error."""
    return importlib.import_module(name) if importlib.util.find_spec(name.split(".")[0]) else None


@torch.no_grad()
def mixtral(layer: MoE, implementation: str) -> nn.Module | None:
    """transformers' ``MixtralSparseMoeBlock`` with the weights of ``layer``, of gated SiLU experts without biases.

    Args:
        layer: token choice.
        implementation: ``"eager"``, a loop, or ``"grouped_mm"``.
    """
    module = _optional("transformers.models.mixtral.modeling_mixtral")
    if module is None:
        return None
    experts: Any = layer.experts
    config = module.MixtralConfig(
        hidden_size=experts.in_features,
        intermediate_size=experts.hidden_features,
        num_local_experts=experts.num_experts,
        num_experts_per_tok=layer.router.k,
        hidden_act="silu",
    )
    config._experts_implementation = implementation
    block = module.MixtralSparseMoeBlock(config)
    block.gate.weight.copy_(layer.router.get_parameter("gate.weight"))
    block.experts.gate_up_proj.copy_(experts.up.weight.transpose(1, 2))
    block.experts.down_proj.copy_(experts.down.weight.transpose(1, 2))
    return Batched(block)


@torch.no_grad()
def pytorch_mixtures(layer: MoE) -> nn.Module | None:
    """``pytorch_mixtures.TopkMoE`` with the weights of ``layer``, token choice with GELU experts."""
    module = _optional("pytorch_mixtures")
    if module is None:
        return None
    experts: Any = layer.experts
    config = module.MoEConfig(
        hidden_dim=experts.in_features,
        intermediate_dim=experts.hidden_features,
        num_experts=experts.num_experts,
        expert_fn="ff",
        expert_act="gelu",
        router_fn="topk",
        capacity_factor=None,
        topk=layer.router.k,
        dtype=torch.float32,
    )
    other = module.TopkMoE(config)
    other.weight.copy_(layer.router.get_parameter("gate.weight").T)
    for index, expert in enumerate(other.experts):
        for theirs, ours in ((expert.up, experts.up), (expert.down, experts.down)):
            theirs.weight.copy_(ours.weight[index].T)
            theirs.bias.copy_(ours.bias[index])
    return Batched(other)


def st_moe(layer: MoE) -> nn.Module | None:
    """``st_moe_pytorch.MoE`` of the same sizes: capacity and random second choice are its own, and it has no K = 1."""
    module = _optional("st_moe_pytorch")
    if module is None or layer.router.k < 2:
        return None
    experts: Any = layer.experts
    width, hidden = experts.in_features, experts.hidden_features
    mlps = [
        nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)) for _ in range(experts.num_experts)
    ]
    return Batched(module.MoE(width, num_experts=len(mlps), gating_top_n=layer.router.k, experts=nn.ModuleList(mlps)))
