"""What a finished run says about its routing. Shapes: T tokens, E experts, P pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchmetrics.functional.clustering import normalized_mutual_info_score

from experiments.structure import alignment
from gmoe import Routing, RoutingStats
from gmoe.metrics import PER_EXPERT


def routing_summary(
    routings: list[list[Routing]], planted: Tensor | None, properties: dict[str, Tensor] | None = None
) -> list[dict[str, Any]]:
    """For each MoE layer, over all batches: what :class:`gmoe.RoutingStats` counts, and what the routing follows.

    Args:
        routings: a list a batch, in it one a layer.
        planted: (T,) the expert that each token should go to, for a single batch of all tokens: ``"nmi"`` with it.
        properties: (T,) integers each, for a single batch of all tokens: ``"ami_NAME"`` with each, and with them
            shuffled; see :func:`~experiments.structure.alignment`.
    """
    if not routings or not routings[0]:
        return []
    experts = [routing.num_experts for routing in routings[0]]
    stats = RoutingStats(experts, sync_on_compute=False).to(routings[0][0].token.device)  # one process has them all
    for batch in routings:
        stats.update(batch)
    layers = []
    for parts, layer in zip(zip(*routings, strict=True), _rounded(stats), strict=True):
        if planted is not None:
            (whole,) = parts
            layer["nmi"] = float(normalized_mutual_info_score(whole.top_expert.cpu(), planted))
        if properties:
            (whole,) = parts
            found = alignment(whole.top_expert.cpu(), properties)
            layer |= {f"ami_{name}": round(value, 4) for name, value in found.items()}
        layers.append(layer)
    return layers


def routing_rows(stats: RoutingStats | None) -> list[dict[str, Any]]:
    """A row a layer for routing.csv: ``load_0``, ... and ``weight_0``, ... of its experts, and the other figures.

    Of layers with fewer experts than another the last are empty.
    """
    if stats is None:
        return []
    rows = []
    for number, layer in enumerate(_rounded(stats)):
        row: dict[str, Any] = {"layer": number}
        for name, value in layer.items():
            if isinstance(value, list):
                places = value + [None] * (max(stats.num_experts) - len(value))
                row |= {f"{name}_{expert}": figure for expert, figure in enumerate(places)}
            else:
                row[name] = value
        rows.append(row)
    return rows


def load_routings(path: Path) -> list[Routing]:
    """What :func:`save_routings` wrote, one routing a layer; without scores, which are not kept.

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    try:
        tensors = load_file(path)
        layers = []
        for layer in range(sum(name.endswith(".size") for name in tensors)):
            token, expert, weight, size = (
                tensors[f"layer{layer}.{name}"] for name in ("token", "expert", "weight", "size")
            )
            num_tokens, num_experts = size.tolist()
            order = (expert * max(num_tokens, 1) + token).argsort()
            offsets = expert.bincount(minlength=num_experts).cumsum(0).to(torch.int32)
            scores = weight.new_zeros(num_tokens, num_experts)
            layers.append(Routing(token[order], offsets, weight[order], scores, num_tokens))
    except (SafetensorError, KeyError, ValueError, RuntimeError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as routings ({error})") from error
    if not layers:
        raise ValueError(f"{path}: holds no routings, expected layer0.size, layer0.token, ...")
    return layers


def _rounded(stats: RoutingStats) -> list[dict[str, Any]]:
    def plain(value: Tensor) -> Any:
        found = value.tolist()
        return [round(one, 4) for one in found] if isinstance(found, list) else round(found, 4)

    return [
        # torchmetrics makes scalars of one expert's figures
        {name: plain(value.view(-1) if name in PER_EXPERT else value) for name, value in layer.items()}
        for layer in stats.compute()
    ]


def save_routings(routings: list[list[Routing]], path: Path) -> None:
    """Write the pairs of every layer, the tokens numbered through all batches; nothing where there are none.

    ``layerN.token``, ``.expert`` and ``.weight`` are (P,); ``layerN.size`` is (T, E).
    """
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
            f"layer{layer}.size": torch.tensor([first, parts[0].num_experts]),
            f"layer{layer}.token": torch.cat(tokens).cpu(),
            f"layer{layer}.expert": torch.cat(experts).cpu(),
            f"layer{layer}.weight": torch.cat(weights).cpu(),
        }
    if tensors:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
