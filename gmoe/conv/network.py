"""Networks of a conv, such as GIN's MLP, with the layers of E experts in place of one's.

Shapes: P rows sorted by expert, E experts, H features.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric import nn as pyg
from torch_geometric.nn.dense.linear import Linear

from gmoe._verify import Sieve
from gmoe.blocks import expert_of_rows
from gmoe.experts import LinearExperts
from gmoe.stack import Stack
from gmoe.sums import sum_to_receivers, to_messages

ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Hardtanh, nn.Hardswish, nn.Identity),
)
"""What acts on each number by itself, without parameters."""

OF_ONE = (*ACTIVATIONS, nn.Dropout)
"""Layers that treat the rows of all experts alike."""

CONTAINERS = (nn.Sequential, nn.ModuleList, pyg.MLP, pyg.BatchNorm)
"""What only holds layers."""


def can_be_stacked(network: nn.Module) -> bool:
    """True for a network of linear layers, batch norms, activations and dropouts in a row."""
    # Exact types: a subclass may compute something else.
    kinds = (*CONTAINERS, *OF_ONE, nn.Linear, Linear, nn.BatchNorm1d)
    norms = [part for part in network.modules() if isinstance(part, nn.BatchNorm1d)]
    return (
        all(type(part) in kinds for part in network.modules())
        and any(isinstance(part, nn.Linear | Linear) for part in network.modules())
        and all(norm.track_running_stats and norm.momentum is not None for norm in norms)
    )


def stacked(module: nn.Module, num_experts: int) -> nn.Module:
    """A layer stacked, without values; or a copy of a network with its layers stacked."""
    if isinstance(module, nn.Linear | Linear):
        with torch.device("meta"):  # nothing is drawn
            layer = LinearExperts.like(module, num_experts=num_experts)
        return layer.to_empty(device=torch.get_default_device())
    if isinstance(module, nn.BatchNorm1d):
        return BatchNormExperts(module, num_experts)
    network = copy.deepcopy(module)
    for path, part in list(module.named_modules()):
        if isinstance(part, nn.Linear | Linear | nn.BatchNorm1d):
            network.set_submodule(path, stacked(part, num_experts))
    return network


def run_network(network: nn.Module, x_PI: Tensor, offsets_E: Tensor) -> Tensor:
    """(P, O) each expert's network on its rows, given a network whose layers are stacked.

    Its layers are called, what holds them is not: hooks belong on layers.
    """
    for layer in _layers(network):
        # What somebody put in the place of a stacked layer is called as that layer is. Sieves stand
        # for dropouts in a trial.
        is_of_one = isinstance(layer, (*OF_ONE, Sieve, partial))
        x_PI = layer(x_PI) if is_of_one else layer(x_PI, offsets_E)
    return x_PI


def _layers(network: Any) -> Iterator[Any]:
    """What runs in a network, one layer after the other; its parts may be sharded or wrapped."""
    if isinstance(network, nn.Sequential):
        for layer in network:
            yield from _layers(layer)
    elif isinstance(network, pyg.MLP):
        numbered = enumerate(zip(network.lins, network.dropout, strict=True))
        for number, (linear, dropout) in numbered:
            yield linear
            if number < len(network.norms):  # a plain last layer has none
                norm = list(_layers(network.norms[number]))
                act = [nn.Identity() if network.act is None else network.act]
                yield from [*act, *norm] if network.act_first else [*norm, *act]
            if dropout:
                yield partial(F.dropout, p=dropout, training=network.training)
    elif isinstance(network, pyg.BatchNorm):
        yield network.module
    else:
        yield network


class BatchNormExperts(Stack):
    """One batch norm per expert, over the rows that the expert gets.

    In training an expert with fewer than two rows has no variance. Its row is normalized by the
    running statistics, which stay as they are, as PyG's ``BatchNorm(allow_single_element=True)``
    does it.

    Args:
        norm: the batch norm of one expert, with running statistics.
        num_experts: E.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, norm: nn.BatchNorm1d, num_experts: int) -> None:
        super().__init__()
        self._num_experts = num_experts
        self.eps = norm.eps
        assert norm.momentum is not None
        self.momentum: float = norm.momentum
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            self.add(name, getattr(norm, name), num_experts)

    def forward(self, x_PH: Tensor, offsets_E: Tensor) -> Tensor:
        """(P, H) the normalized rows."""
        if x_PH.device.type == "cpu" and not torch.compiler.is_compiling():
            return self._expert_by_expert(x_PH, offsets_E)
        return self._all_at_once(x_PH, offsets_E)

    def _expert_by_expert(self, x_PH: Tensor, offsets_E: Tensor) -> Tensor:
        """By torch's own batch norm: a step of a small GIN takes 0.65 of the time of sums."""
        sizes = offsets_E.diff(prepend=offsets_E.new_zeros(1)).tolist()  # one host sync
        nothing = [None] * self.num_experts
        by_expert = zip(
            x_PH.split(sizes),
            self.running_mean,
            self.running_var,
            nothing if self.weight is None else self.weight,
            nothing if self.bias is None else self.bias,
            strict=True,
        )
        outputs: list[Tensor] = []
        for rows, mean_H, var_H, weight_H, bias_H in by_expert:
            learns = self.training and len(rows) >= 2
            outputs.append(
                F.batch_norm(rows, mean_H, var_H, weight_H, bias_H, learns, self.momentum, self.eps)
            )
        if self.training:
            self.num_batches_tracked += offsets_E.new_tensor(sizes) >= 2
        return torch.cat(outputs)

    def _all_at_once(self, x_PH: Tensor, offsets_E: Tensor) -> Tensor:
        """By sums over the rows of all experts: the host does not wait for their numbers."""
        exact_PH = x_PH.to(torch.promote_types(x_PH.dtype, torch.float32))
        ends_E = offsets_E.long()
        ptr = F.pad(ends_E, (1, 0))
        expert_P = expert_of_rows(ends_E, x_PH.size(0))
        mean_EH = self.running_mean
        var_EH = self.running_var
        rows_E1 = ptr.diff()[:, None]
        has_rows_E1 = rows_E1 >= 2
        number_E1 = rows_E1.clamp(min=1)
        if self.training:
            own_mean_EH = sum_to_receivers(exact_PH, ptr, expert_P) / number_E1
            mean_EH = torch.where(has_rows_E1, own_mean_EH, mean_EH)
        centered_PH = exact_PH - to_messages(mean_EH, ptr, expert_P)
        if self.training:
            own_var_EH = sum_to_receivers(centered_PH.square(), ptr, expert_P) / number_E1
            var_EH = torch.where(has_rows_E1, own_var_EH, var_EH)
            unbiased_EH = var_EH * number_E1 / (number_E1 - 1).clamp(min=1)
            self._follow(mean_EH, unbiased_EH, has_rows_E1)
        scale_EH = (var_EH + self.eps).rsqrt()
        if self.weight is not None:
            scale_EH = scale_EH * self.weight
        y_PH = centered_PH * to_messages(scale_EH, ptr, expert_P)
        if self.bias is not None:
            y_PH = y_PH + to_messages(self.bias, ptr, expert_P)
        return y_PH.to(x_PH.dtype)

    @torch.no_grad()
    def _follow(self, mean_EH: Tensor, var_EH: Tensor, has_rows_E1: Tensor) -> None:
        """Move the running statistics of the experts that have rows."""
        for running_EH, now_EH in ((self.running_mean, mean_EH), (self.running_var, var_EH)):
            moved_EH = running_EH.lerp(now_EH.to(running_EH.dtype), self.momentum)
            running_EH.copy_(torch.where(has_rows_E1, moved_EH, running_EH))
        self.num_batches_tracked += has_rows_E1[:, 0]

    def extra_repr(self) -> str:
        """For ``print``."""
        width = self.running_mean.size(1)
        return f"{width}, num_experts={self.num_experts}, eps={self.eps}, momentum={self.momentum}"
