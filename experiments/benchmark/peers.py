"""What others do with the same router and the same weights. Shapes: T tokens, D width, H hidden, E experts, K a token.

Other people's layers are imported where they are installed; each gets the weights of ours, so that outputs agree.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmoe import MLPExperts, MoE


class NonzeroLoop(nn.Module):
    """A loop over experts that looks for the tokens of each with nonzero, as in most published code.

    Args:
        layer: whose router and experts it runs.
    """

    def __init__(self, layer: MoE) -> None:
        super().__init__()
        self.router = layer.router
        self.experts = layer.experts

    def forward(self, x: Tensor) -> Tensor:
        """As :class:`gmoe.MoE`."""
        assert isinstance(self.experts, MLPExperts)
        up, down = self.experts.up, self.experts.down
        weight_TE = self.router(x).to_dense()
        x_TD = x.reshape(-1, x.size(-1))
        y_TD = None
        for expert in range(self.experts.num_experts):
            token = weight_TE[:, expert].nonzero().squeeze(1)
            h = F.linear(x_TD[token], up.weight[expert].T, None if up.bias is None else up.bias[expert])
            h = self.experts.activation(h)
            h = F.linear(h, down.weight[expert].T, None if down.bias is None else down.bias[expert])
            h = h * weight_TE[token, expert].to(h.dtype)[:, None]
            if y_TD is None:
                y_TD = h.new_zeros(x_TD.size(0), h.size(1))
            y_TD = y_TD.index_add(0, token, h)
        assert y_TD is not None
        return y_TD.view(*x.shape[:-1], -1)


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


def _weights(layer: MoE) -> tuple[Tensor, MLPExperts]:
    experts, scorer = layer.experts, layer.router.get_parameter("gate.weight")
    assert isinstance(experts, MLPExperts)
    return scorer, experts


@torch.no_grad()
def mixtral(layer: MoE, implementation: str) -> nn.Module | None:
    """transformers' ``MixtralSparseMoeBlock`` with the weights of ``layer``, token choice with gated SiLU experts.

    Args:
        layer: without biases.
        implementation: ``"eager"``, a loop, or ``"grouped_mm"``.

    Returns:
        The block, or ``None`` where transformers is not installed.
    """
    module = _optional("transformers.models.mixtral.modeling_mixtral")
    if module is None:
        return None
    scorer_ED, experts = _weights(layer)
    config = module.MixtralConfig(
        hidden_size=experts.in_features,
        intermediate_size=experts.hidden_features,
        num_local_experts=experts.num_experts,
        num_experts_per_tok=layer.router.k,
        hidden_act="silu",
    )
    config._experts_implementation = implementation
    block = module.MixtralSparseMoeBlock(config)
    block.gate.weight.copy_(scorer_ED)
    block.experts.gate_up_proj.copy_(experts.up.weight.transpose(1, 2))
    block.experts.down_proj.copy_(experts.down.weight.transpose(1, 2))
    return Batched(block)


@torch.no_grad()
def pytorch_mixtures(layer: MoE) -> nn.Module | None:
    """``pytorch_mixtures.TopkMoE`` with the weights of ``layer``, token choice with GELU experts.

    Returns:
        The layer, or ``None`` where pytorch-mixtures is not installed.
    """
    module = _optional("pytorch_mixtures")
    if module is None:
        return None
    scorer_ED, experts = _weights(layer)
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
    other.weight.copy_(scorer_ED.T)
    for index, expert in enumerate(other.experts):
        for theirs, ours in ((expert.up, experts.up), (expert.down, experts.down)):
            assert ours.bias is not None
            theirs.weight.copy_(ours.weight[index].T)
            theirs.bias.copy_(ours.bias[index])
    return Batched(other)


def st_moe(layer: MoE) -> nn.Module | None:
    """``st_moe_pytorch.MoE`` of the same sizes: capacity and random second choice are its own, so outputs differ.

    Returns:
        The layer, or ``None`` where st-moe-pytorch is not installed, or K = 1, which it does not know.
    """
    module = _optional("st_moe_pytorch")
    if module is None or layer.router.k < 2:
        return None
    experts = layer.experts
    assert isinstance(experts, MLPExperts)
    mlps = nn.ModuleList(
        nn.Sequential(
            nn.Linear(experts.in_features, experts.hidden_features),
            nn.GELU(),
            nn.Linear(experts.hidden_features, experts.out_features),
        )
        for _ in range(experts.num_experts)
    )
    return Batched(
        module.MoE(experts.in_features, num_experts=experts.num_experts, gating_top_n=layer.router.k, experts=mlps)
    )


def tutel(layer: MoE) -> nn.Module | None:
    """Tutel's ``moe_layer`` of the same sizes, dropless; its own weights.

    Returns:
        The layer, or ``None`` where Tutel is not installed.
    """
    module = _optional("tutel.moe")
    if module is None:
        return None
    experts = layer.experts
    assert isinstance(experts, MLPExperts)
    made: nn.Module = module.moe_layer(
        gate_type={"type": "top", "k": layer.router.k, "capacity_factor": 0},  # 0: as much as is needed
        model_dim=experts.in_features,
        experts={
            "type": "ffn",
            "num_experts_per_device": experts.num_experts,
            "hidden_size_per_expert": experts.hidden_features,
            "activation_fn": F.gelu,
        },
    )
    return made
