"""Figures of what routers do: experts on images and over training. Needs matplotlib.

The functions return a matplotlib ``Figure`` that belongs to no window: save it with
``figure.savefig("x.png")``, end a notebook cell with it, or hand it to TensorBoard's
``add_figure``.

Shapes: B images, H x W pixels, h x w patches, T tokens, E experts, S steps.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmoe._checks import check, check_counts, naming_extras
from gmoe.routing import Routing, record_routing

with naming_extras():
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

__all__ = ["expert_load", "expert_maps", "palette", "patch_weights"]

STRENGTH = 0.6
"""Share of an expert's color in a tinted patch."""

MOST_PREFIX_TOKENS = 16
"""More tokens before an image's patches are no class and register tokens, but a sign of another
patch size.
"""


def palette(num_experts: int) -> list[tuple[float, float, float]]:
    """Give each expert an RGB color: Tableau's ten, their twenty, or hues at equal distances.

    Example:
        >>> red, green, blue = palette(8)[3]
    """
    check_counts(num_experts=num_experts)
    if num_experts > 20:
        colors = colormaps["hsv"]([expert / num_experts for expert in range(num_experts)])
    else:
        colors = colormaps["tab10" if num_experts <= 10 else "tab20"](range(num_experts))
    return [(red, green, blue) for red, green, blue, _ in colors.tolist()]


# Images -------------------------------------------------------------------------------------------


def patch_weights(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Run a vision transformer on images and return the weight of every expert on every patch.

    The model is torchvision's, timm's or any other whose tokens are the patches row by row, with at
    most 16 class and register tokens before them, or the grids of a Swin, which halve from stage to
    stage. Patches are as large as the kernel of its first convolution whose kernel is its stride.
    It runs in evaluation mode without gradients.

    Args:
        model: a model that holds MoE layers.
        images: (B, C, H, W), or one image (C, H, W), as the model takes them; moved to its device
            and dtype.

    Returns:
        A tensor a MoE layer, (B, h, w, E) on the CPU; 0 where an expert does not take the patch.

    Raises:
        ValueError: images of another shape, a model without a patch embedding, or tokens that are
            not the patches.
        RuntimeError: the model ran no router.

    Example:
        >>> model = gmoe.ViTMoE(32, num_experts=8)
        >>> [weight.shape for weight in patch_weights(model, torch.rand(2, 3, 32, 32))]
        [torch.Size([2, 8, 8, 8]), torch.Size([2, 8, 8, 8]), torch.Size([2, 8, 8, 8])]
    """
    images = _batch_of(images)
    high, wide = _patch_size(model)
    h, w = images.size(2) // high, images.size(3) // wide
    parameter = next(model.parameters(), images)
    with _evaluating(model), record_routing(model) as routings:
        model(images.to(parameter.device, parameter.dtype))
    weights = []
    for layer, routing in enumerate(routings, start=1):
        grid = _grid(routing.num_tokens / len(images), h, w)
        if grid is None:
            raise ValueError(
                f"images: got {routing.num_tokens} tokens of {len(images)} images in MoE layer {layer}, expected for "
                f"each {h} x {w} patches and up to {MOST_PREFIX_TOKENS} class and register tokens before them, or the "
                "halved grids of a Swin"
            )
        dense_BTE = routing.to_dense().detach().float().cpu().unflatten(0, (len(images), -1))
        weights.append(dense_BTE[:, -grid[0] * grid[1] :].unflatten(1, grid))
    return weights


def expert_maps(
    model: nn.Module,
    images: Tensor,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    titles: Sequence[str] | None = None,
) -> Figure:
    """Tint each patch of images by its expert: a row an image, a column a MoE layer.

    A patch of several experts has their colors mixed by weight; one that no expert took is dark.
    Experts of different layers have nothing to do with each other.

    Args:
        model, images: see :func:`patch_weights`.
        mean, std: by channel, as the images were normalized; by default each image is stretched to
            0..1.
        titles: a text an image.

    Raises:
        ValueError: see :func:`patch_weights`; one of ``mean`` and ``std`` alone, titles of another
            number.

    Example:
        >>> vit = gmoe.moefy(timm.create_model("vit_tiny_patch16_224"), num_experts=8)
        >>> expert_maps(vit, torch.rand(2, 3, 224, 224), titles=["one", "two"]).savefig("maps.png")
    """
    check((mean is None) == (std is None), "mean, std", f"{mean}, {std}", "both or none")
    images = _batch_of(images)
    check(titles is None or len(titles) == len(images), "titles", titles, f"{len(images)} of them")
    weights = patch_weights(model, images)
    high, wide = _patch_size(model)
    height, width = images.size(2) // high * high, images.size(3) // wide * wide
    pictures = _to_rgb(images.detach().float().cpu(), mean, std)[
        ..., :height, :width
    ]  # what patches cover
    cell = 1.7 * max(width / height, 0.4)
    figure = Figure(
        figsize=(cell * (len(weights) + 1) + 0.3, 1.75 * len(images) + 0.8), layout="constrained"
    )
    grid = figure.subplots(len(images), len(weights) + 1, squeeze=False)
    for number, (row, picture, title) in enumerate(
        zip(grid, pictures, titles or [""] * len(images), strict=True)
    ):
        tinted = [_tint(picture, weight[number], (high, wide)) for weight in weights]
        for axis, shown in zip(row, [picture, *tinted], strict=True):
            axis.imshow(shown.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(title)
    for layer, axis in enumerate(grid[0, 1:], start=1):
        axis.set_title(f"MoE layer {layer}", fontsize="medium")
    _legend(figure, max(weight.size(-1) for weight in weights))
    return figure


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and without compilation, which would trace the model anew;
    then as it was.
    """
    modes = {module: module.training for module in model.modules()}
    compiled = (
        "torch._dynamo" in sys.modules
    )  # which takes seconds to import; who compiled the model has done so
    with torch.no_grad(), torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def _batch_of(images: Tensor) -> Tensor:
    batch = images[None] if images.dim() == 3 else images
    legal = "(B, 3 or 1, H, W), or one image (3 or 1, H, W)"
    check(
        batch.dim() == 4 and batch.size(1) in (1, 3) and len(batch),
        "images",
        f"shape {tuple(images.shape)}",
        legal,
    )
    return batch


def _patch_size(model: nn.Module) -> tuple[int, int]:
    """Height and width of a patch in pixels."""
    convs = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    high, wide = next(
        (conv.stride for conv in convs if conv.kernel_size == conv.stride != (1, 1)), (0, 0)
    )
    check(
        high,
        "model",
        f"{type(model).__name__} without a patch embedding",
        "a Conv2d whose kernel is its stride",
    )
    return high, wide


def _grid(tokens: float, h: int, w: int) -> tuple[int, int] | None:
    """The grid that an image's tokens end with: all patches, or all of them merged 2 x 2 once or
    more.
    """
    if h * w <= tokens <= h * w + MOST_PREFIX_TOKENS and tokens == int(tokens):
        return h, w
    while h * w > max(tokens, 1):
        h, w = (h + 1) // 2, (w + 1) // 2
    return (h, w) if h * w == tokens else None


def _to_rgb(images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """(B, 3, H, W) in 0..1."""
    if mean is None or std is None:
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        images = (images - low) / (high - low).clamp(min=1e-12)
    else:
        images = images * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    return images.clamp(0, 1).expand(-1, 3, -1, -1)


def _tint(picture: Tensor, weight_hwE: Tensor, patch: tuple[int, int]) -> Tensor:
    """(3, H, W) the picture, each patch mixed with the colors of its experts."""
    colors_E3 = torch.tensor(palette(weight_hwE.size(-1)))
    color = (F.normalize(weight_hwE, p=1, dim=-1) @ colors_E3).permute(2, 0, 1).contiguous()
    (high, wide), (_, height, width) = patch, picture.shape
    while high * color.size(1) < height or wide * color.size(2) < width:  # patches merged 2 x 2
        high, wide = 2 * high, 2 * wide
    color = torch.kron(color, torch.ones(1, high, wide))[:, :height, :width]
    return torch.lerp(picture, color, STRENGTH)


# Load ---------------------------------------------------------------------------------------------

LayerLoad: TypeAlias = Routing | Mapping[str, Tensor]


def expert_load(history: Sequence[Routing | Sequence[LayerLoad]]) -> Figure:
    """Draw the load of every expert over time, a panel a MoE layer; bars where there is one step.

    The load is the share of an expert among all (token, expert) pairs: 1/E each if balanced.

    Args:
        history: a step an entry, each what :func:`gmoe.record_routing` gives or what
            :meth:`gmoe.RoutingStats.compute` returns, for all layers.

    Raises:
        ValueError: an empty history, or steps of different layers or experts.

    Example:
        >>> history = []
        >>> for _ in range(3):
        ...     with gmoe.record_routing(model) as routings:
        ...         logits = model(images)
        ...     history.append(routings)
        >>> expert_load(history).savefig("load.png")
    """
    steps = [
        [_load(layer) for layer in ([entry] if isinstance(entry, Routing) else entry)]
        for entry in history
    ]
    sizes = {tuple(map(len, step)) for step in steps}
    check(
        len(sizes) == 1 and sizes != {()},
        "history",
        f"layers of {sorted(sizes)} experts",
        "the same in all steps",
    )
    loads = [torch.stack(layer) for layer in zip(*steps, strict=True)]
    rows, columns = -(-len(loads) // 2), min(len(loads), 2)
    figure = Figure(figsize=(3.7 * columns, 2.8 * rows), layout="constrained")
    for number, load_SE in enumerate(loads, start=1):
        axis, num_experts = figure.add_subplot(rows, columns, number), load_SE.size(1)
        if len(steps) == 1:
            axis.bar(range(num_experts), load_SE[0].numpy(), color=palette(num_experts))
            axis.axhline(1 / num_experts, color="0.3", linewidth=0.8, linestyle="--")
            axis.set(xlabel="expert")
        else:
            axis.stackplot(range(1, len(steps) + 1), load_SE.T.numpy(), colors=palette(num_experts))
            axis.set(xlabel="step", xlim=(1, len(steps)), ylim=(0, 1))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_title(f"MoE layer {number}", fontsize="medium")
        axis.set_ylabel("load (share of pairs)")
    if len(steps) > 1:
        _legend(figure, max(load_SE.size(1) for load_SE in loads))
    return figure


def _load(layer: LayerLoad) -> Tensor:
    """(E,) shares of the pairs."""
    load_E = layer.load if isinstance(layer, Routing) else layer["load"].reshape(-1)
    return F.normalize(load_E.float().cpu(), p=1, dim=0)


def _legend(figure: Figure, num_experts: int) -> None:
    """Color and number of every expert below a figure."""
    handles = [
        Patch(color=color, label=number) for number, color in enumerate(palette(num_experts))
    ]
    columns = min(num_experts, 4)  # which fit below a single layer
    figure.legend(
        handles=handles, title="expert", ncols=columns, loc="outside lower center", fontsize="small"
    )
