"""Which patches each expert handles. Shapes: B images, G patches a side, E experts, L MoE layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor, nn

from experiments.data import Task
from gmoe import Routing
from vision.patch_maps import crop_patches, palette, patch_weights, tint

MOST_IMAGES = 1024
"""Validation images that galleries and heat maps are made of."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Images and what was done with their patches.

    Args:
        images: (B, C, H, W) in 0..1.
        labels: (B,), or ``None`` where they are not known.
        weights: a layer (B, G, G, E).
    """

    images: Tensor
    labels: Tensor | None
    weights: list[Tensor]


def look(model: nn.Module, task: Task, most: int = MOST_IMAGES, seed: int = 0) -> Seen:
    """Run the model on validation images, shuffled by ``seed`` since they may lie class by class."""
    images, labels = [], []
    weights: list[list[Tensor]] = []
    for batch in task.loader("val", 128, seed):
        (pictures,) = batch.inputs
        _, routings = route(model, pictures)
        weights.append([patch_weights(routing, len(pictures)) for routing in routings])
        images.append(shown(pictures, task.mean, task.std))
        labels.append(batch.target)
        if sum(map(len, images)) >= most:
            break
    layers = [torch.cat(parts)[:most] for parts in zip(*weights, strict=True)]
    return Seen(images=torch.cat(images)[:most], labels=torch.cat(labels)[:most], weights=layers)


@torch.no_grad()
def route(model: nn.Module, pictures: Tensor) -> tuple[Tensor, list[Routing]]:
    """Logits, and what every MoE layer does with the patches."""
    found: tuple[Tensor, list[Routing]] = model(pictures, return_routing=True)
    return found


def shown(pictures: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """From what the model sees to (B, C, H, W) in 0..1."""
    center, scale = (torch.tensor(value)[:, None, None] for value in (mean, std))
    return (pictures * scale + center).clamp(0, 1)


def of_each_class(labels: Tensor, count: int) -> list[int]:
    """Indices of the first image of each class, then of the second, and so on, ``count`` in all."""
    order = []
    rank: dict[int, int] = {}
    for index, label in enumerate(labels.tolist()):
        rank[label] = rank.get(label, 0) + 1
        order.append((rank[label], label, index))
    return [index for _, _, index in sorted(order)[:count]]


def maps(seen: Seen, chosen: Sequence[int], titles: Sequence[str]) -> Figure:
    """Each image, and beside it every layer's experts as tints of its patches."""
    layers = len(seen.weights)
    experts = max(weight.size(-1) for weight in seen.weights)
    figure = Figure(figsize=(1.7 * (layers + 1) + 1.0, 1.75 * len(chosen) + 0.3), layout="constrained")
    grid = figure.subplots(len(chosen), layers + 1, squeeze=False)
    for row, index, title in zip(grid, chosen, titles, strict=True):
        picture = seen.images[index : index + 1]
        pictures = [picture.expand(-1, 3, -1, -1)]
        pictures += [tint(picture, weight[index : index + 1], palette(weight.size(-1))) for weight in seen.weights]
        for axis, one in zip(row, pictures, strict=True):
            axis.imshow(one[0].permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(title, fontsize="small")
    for number, axis in enumerate(grid[0, 1:], start=1):
        axis.set_title(f"MoE layer {number}", fontsize="small")
    handles = [Patch(color=tuple(color), label=str(e)) for e, color in enumerate(palette(experts).tolist())]
    if experts <= 20:
        figure.legend(handles=handles, title="expert", loc="outside right upper", fontsize="small")
    return figure


def gallery(seen: Seen, layer: int, classes: Sequence[str], per_expert: int = 14) -> Figure:
    """A row an expert: the patches on which its weight is largest, at most one of an image."""
    weight_BPE = seen.weights[layer].flatten(1, 2)
    grid = seen.weights[layer].size(1)
    experts = weight_BPE.size(-1)
    figure = Figure(figsize=(0.72 * per_expert + 0.8, 0.92 * experts + 0.3), layout="constrained")
    axes = figure.subplots(experts, per_expert, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for expert in range(experts):
        best_B, patch_B = weight_BPE[..., expert].max(dim=1)
        image = best_B.argsort(descending=True, stable=True)[:per_expert]
        image = image[best_B[image] > 0]
        crops = crop_patches(seen.images, image, patch_B[image], grid)
        for axis, crop, index in zip(axes[expert], crops, image.tolist(), strict=False):
            axis.imshow(crop.expand(3, -1, -1).permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            if seen.labels is not None:
                axis.set_title(classes[int(seen.labels[index])][:10], fontsize=6, pad=1)
        axes[expert, 0].text(-0.15, 0.5, str(expert), transform=axes[expert, 0].transAxes, ha="right", va="center")
    return figure


def by_class(seen: Seen, classes: Sequence[str]) -> Figure:
    """A panel a layer: of the weights on each class's patches, every expert's share.

    Of weights, since where experts choose each takes as many patches of every image.
    """
    assert seen.labels is not None
    layers = len(seen.weights)
    figure = Figure(figsize=(3.6 * layers + 0.8, 1.2 + 0.3 * len(classes)), layout="constrained")
    for number, (axis, weight) in enumerate(
        zip(figure.subplots(1, layers, squeeze=False)[0], seen.weights, strict=True)
    ):
        share = class_shares(weight, seen.labels, len(classes))
        image = axis.imshow(share, aspect="auto", cmap="Blues", vmin=0)
        axis.set_yticks(range(len(classes)), classes if number == 0 else [""] * len(classes), fontsize="x-small")
        axis.set(xlabel="expert", title=f"MoE layer {number + 1}")
        figure.colorbar(image, ax=axis, shrink=0.8)
    return figure


def class_shares(weight_BGGE: Tensor, labels: Tensor, num_classes: int) -> np.ndarray:
    """(classes, E) of the weights on each class's patches, every expert's share; 0 of a class without."""
    given_BE = weight_BGGE.double().flatten(1, 2).sum(dim=1)
    total = torch.zeros(num_classes, given_BE.size(1), dtype=torch.double).index_add(0, labels, given_BE)
    share: np.ndarray = (total / total.sum(dim=1, keepdim=True).clamp(min=1e-12)).numpy()
    return share


def by_place(seen: Seen) -> Figure:
    """A row a layer: how often each expert takes the patch at each place of the image."""
    experts = max(weight.size(-1) for weight in seen.weights)
    figure = Figure(figsize=(1.25 * experts + 1.2, 1.4 * len(seen.weights) + 0.3), layout="constrained")
    grid = figure.subplots(len(seen.weights), experts, squeeze=False)
    for axis in grid.flat:
        axis.set_axis_off()
    for number, weight in enumerate(seen.weights):
        often = (weight > 0).double().mean(dim=0)
        for expert in range(weight.size(-1)):
            axis = grid[number, expert]
            axis.set_axis_on()
            axis.imshow(often[..., expert].numpy(), vmin=0, vmax=1, cmap="magma")
            axis.set_xticks([])
            axis.set_yticks([])
            if number == 0:
                axis.set_title(str(expert), fontsize="small")
        grid[number, 0].set_ylabel(f"layer {number + 1}", fontsize="small")
    return figure
