"""What a finished run says about its routing. Shapes: T tokens, E experts, P pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torchmetrics.functional.clustering import normalized_mutual_info_score

from experiments.structure import alignment
from gmoe import Routing


def primary_expert(routing: Routing) -> Tensor:
    """(T,) the expert with the largest weight of each token; E, one more than there are, for tokens without any."""
    dense_TE = routing.to_dense()
    return torch.where(dense_TE.sum(dim=1) > 0, dense_TE.argmax(dim=1), routing.num_experts)


def routing_summary(
    routings: list[list[Routing]], planted: Tensor | None, properties: dict[str, Tensor] | None = None
) -> list[dict[str, Any]]:
    """For each MoE layer, over all batches: share of the load an expert, coverage, entropy, and what it follows.

    Args:
        routings: a list a batch, in it one a layer.
        planted: (T,) the expert that each token should go to, for a single batch of all tokens: ``"nmi"`` with it.
        properties: (T,) integers each, for a single batch of all tokens: ``"ami_NAME"`` with each, and with them
            shuffled; see :func:`~experiments.structure.alignment`.
    """
    layers = []
    for parts in zip(*routings, strict=True):
        load = torch.stack([part.load for part in parts]).sum(dim=0).double()
        tokens = torch.tensor([float(part.num_tokens) for part in parts])
        share = tokens / tokens.sum()
        layer: dict[str, Any] = {
            "load": [round(value, 4) for value in (load / load.sum()).tolist()],
            "coverage": round(float((torch.stack([part.coverage for part in parts]).cpu() * share).sum()), 4),
            "entropy": round(float((torch.stack([part.entropy for part in parts]).cpu() * share).sum()), 4),
        }
        if planted is not None:
            (whole,) = parts
            layer["nmi"] = float(normalized_mutual_info_score(primary_expert(whole).cpu(), planted))
        if properties:
            (whole,) = parts
            found = alignment(primary_expert(whole).cpu(), properties)
            layer |= {f"ami_{name}": round(value, 4) for name, value in found.items()}
        layers.append(layer)
    return layers


def save_routings(routings: list[list[Routing]], path: Path) -> None:
    """Write the pairs of every layer, the tokens numbered through all batches; nothing where there are none."""
    tensors: dict[str, Tensor] = {}
    for layer, parts in enumerate(zip(*routings, strict=True)):
        first = 0
        tokens, experts, weights = [], [], []
        for part in parts:
            tokens.append(part.token + first)
            experts.append(part.expert)
            weights.append(part.weight.float())
            first += part.num_tokens
        tensors |= {
            f"layer{layer}.token": torch.cat(tokens).cpu(),
            f"layer{layer}.expert": torch.cat(experts).cpu(),
            f"layer{layer}.weight": torch.cat(weights).cpu(),
        }
    if tensors:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
