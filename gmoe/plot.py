"""Figures of what routers do: experts on images and over training. Needs matplotlib.

The functions return a matplotlib ``Figure`` without a window: save it with
``figure.savefig("x.png")``, end a notebook cell with it, or pass it to TensorBoard's
``add_figure``.

Shapes: B images, C channels, H x W pixels, h x w patches, T tokens, E experts, S steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmoe._calls import evaluating
from gmoe._checks import check, check_counts, check_module, described, naming_extras, shown
from gmoe.moe import MoELayer
from gmoe.recording import record_routing
from gmoe.routing import Routing

with naming_extras():
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

__all__ = ["expert_load", "expert_maps", "palette", "patch_weights"]

STRENGTH = 0.6
"""Share of an expert's color in a tinted patch."""

MOST_PREFIX_TOKENS = 16
"""Most class and register tokens before an image's patches; more suggest another patch size."""

TABLEAU = {"tab10": (7,), "tab20": (14, 15)}
"""Tableau's palettes, and which of their colors are gray."""


def palette(*, num_experts: int) -> list[tuple[float, float, float]]:
    """Give each expert an RGB color: from Tableau's 10 or 20, or hues at equal distances.

    None is gray, which stands for what has no expert.

    Example:
        >>> red, green, blue = palette(num_experts=8)[3]
    """
    check_counts(num_experts=num_experts)
    for name, grays in TABLEAU.items():
        indices = [index for index in range(colormaps[name].N) if index not in grays]
        if num_experts <= len(indices):
            colors = colormaps[name](indices[:num_experts])
            break
    else:
        colors = colormaps["hsv"]([expert / num_experts for expert in range(num_experts)])
    return [(red, green, blue) for red, green, blue, _ in colors.tolist()]


# Images -------------------------------------------------------------------------------------------


def patch_weights(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Run a vision transformer on images and return the weight of every expert on every patch.

    The model is torchvision's, timm's or any other whose tokens are the patches row by row, with at
    most 16 class and register tokens before them, or the grids of a Swin, which halve from stage to
    stage. Tokens behind the patches are taken for patches. The patch size is the kernel of the
    first convolution whose kernel is its stride. The model runs in evaluation mode without
    gradients.

    Args:
        model: a model that holds MoE layers.
        images: (B, C, H, W), or one image (C, H, W), as the model takes them; moved to its device
            and dtype.

    Returns:
        A tensor (B, h, w, E) on the CPU for each MoE layer, or a single one where one router
        decides for all; 0 where an expert does not take the patch.

    Raises:
        ValueError: images of another shape, a model without a patch embedding, or tokens that are
            not the patches.
        RuntimeError: the model ran no router.

    Example:
        >>> model = gmoe.ViTMoE(32, num_experts=8)
        >>> [weight.shape for weight in patch_weights(model, torch.rand(2, 3, 32, 32))]
        [torch.Size([2, 8, 8, 8]), torch.Size([2, 8, 8, 8]), torch.Size([2, 8, 8, 8])]
    """
    check_module("model", model)
    images = _batch_of(images)
    patch_height, patch_width = _patch_size(model)
    h, w = images.size(2) // patch_height, images.size(3) // patch_width
    parameter = next(model.parameters(), images)
    with evaluating(model), record_routing(model) as routings:
        model(images.to(parameter.device, parameter.dtype))
    weights = []
    for layer, routing in enumerate(routings, start=1):
        grid = _grid(routing.num_tokens / len(images), h, w)
        if grid is None:
            raise ValueError(
                f"images: got {routing.num_tokens} tokens of {len(images)} images in MoE layer "
                f"{layer}, expected for each {h} x {w} patches and up to {MOST_PREFIX_TOKENS} "
                "class and register tokens before them, or the halved grids of a Swin"
            )
        weight_TE = routing.to_dense().detach().float().cpu()
        weight_BTE = weight_TE.unflatten(0, (len(images), -1))
        num_patches = grid[0] * grid[1]  # the last tokens of an image
        weights.append(weight_BTE[:, -num_patches:].unflatten(1, grid))
    return weights


def expert_maps(
    model: nn.Module,
    images: Tensor,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    titles: Sequence[str] | None = None,
) -> Figure:
    """Tint each patch of images by its expert: one row per image, one column per MoE layer.

    The colors of several experts are mixed by weight; a patch without an expert is dark. Experts of
    different layers are unrelated, even if their colors are the same.

    Args:
        model, images: see :func:`patch_weights`.
        mean, std: of each channel, with which the images were normalized; by default each image is
            stretched to 0..1.
        titles: a text for each image; long lines are shortened in the middle.

    Raises:
        ValueError: see :func:`patch_weights`; one of ``mean`` and ``std`` alone, titles of another
            number.

    Example:
        >>> vit = gmoe.moefy(timm.create_model("vit_tiny_patch16_224"), num_experts=8)
        >>> expert_maps(vit, torch.rand(2, 3, 224, 224), titles=["one", "two"]).savefig("maps.png")
    """
    check((mean is None) == (std is None), "mean, std", f"{mean}, {std}", "both or none")
    images = _batch_of(images)
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and [*torch.as_tensor(values).shape] not in ([1], [images.size(1)]):
            raise ValueError(f"{name}: got {values}, expected a number for each channel")
    is_each = titles is None or len(titles) == len(images)
    check(is_each, "titles", titles, f"{len(images)} of them")
    weights = patch_weights(model, images)
    patch = _patch_size(model)
    height = images.size(2) // patch[0] * patch[0]
    width = images.size(3) // patch[1] * patch[1]
    pictures = _to_rgb(images.detach().float().cpu(), mean, std)
    pictures = pictures[..., :height, :width]  # what patches cover

    cell = 1.7 * max(width / height, 0.4)
    size = (cell * (len(weights) + 1) + 0.3, 1.75 * len(images) + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(images), len(weights) + 1, squeeze=False)
    for number, picture in enumerate(pictures):
        tinted = [_tint(picture, weight[number], patch) for weight in weights]
        for axis, image in zip(axes[number], [picture, *tinted], strict=True):
            axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        lines = titles[number].splitlines() if titles else []
        axes[number, 0].set_ylabel("\n".join(map(_shortened, lines)))
    num_layers = sum(isinstance(module, MoELayer) for module in model.modules())
    for layer, axis in enumerate(axes[0, 1:], start=1):
        is_one_for_all = len(weights) == 1 < num_layers
        name = "all MoE layers" if is_one_for_all else f"MoE layer {layer}"
        axis.set_title(name, fontsize="medium")
    _legend(figure, max(weight.size(-1) for weight in weights))
    return figure


def _shortened(text: str, most: int = 20) -> str:
    """A text that fits beside an image, without its middle if it is longer."""
    if len(text) <= most:
        return text
    kept = most - 1
    return f"{text[: kept // 2]}…{text[-(kept - kept // 2) :]}"


def _batch_of(images: Tensor) -> Tensor:
    """(B, C, H, W) the images, one image as a batch of one."""
    check(isinstance(images, Tensor), "images", shown(images), "a tensor")
    batch = images[None] if images.dim() == 3 else images
    is_batch = batch.dim() == 4 and batch.size(1) in (1, 3) and len(batch)
    legal = "(B, 3 or 1, H, W), or one image (3 or 1, H, W)"
    check(is_batch, "images", f"shape {tuple(images.shape)}", legal)
    return batch


def _patch_size(model: nn.Module) -> tuple[int, int]:
    """Height and width of a patch in pixels."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == module.stride != (1, 1):
            height, width = module.stride
            return height, width
    raise ValueError(
        f"model: got {type(model).__name__} without a patch embedding, expected a Conv2d whose "
        "kernel is its stride"
    )


def _grid(tokens: float, h: int, w: int) -> tuple[int, int] | None:
    """Height and width of the grid that an image's tokens end with; ``None`` if there is none.

    It holds all patches, or patches that were merged 2 x 2, once or more.

    Args:
        tokens: per image.
        h, w: patches of an image.
    """
    if h * w <= tokens <= h * w + MOST_PREFIX_TOKENS and tokens == int(tokens):
        return h, w
    while h * w > max(tokens, 1):
        h, w = (h + 1) // 2, (w + 1) // 2
    # A single token beside several patches is a class token's, as in the last layers of CaiT.
    return (h, w) if h * w == tokens > 1 else None


def _to_rgb(images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """(B, 3, H, W) in 0..1."""
    if mean is None or std is None:
        low = images.amin((1, 2, 3), keepdim=True)
        high = images.amax((1, 2, 3), keepdim=True)
        images = (images - low) / (high - low).clamp(min=1e-12)
    else:
        std_C11 = torch.as_tensor(std, dtype=torch.float32)[:, None, None]
        mean_C11 = torch.as_tensor(mean, dtype=torch.float32)[:, None, None]
        images = images * std_C11 + mean_C11
    return images.clamp(0, 1).expand(-1, 3, -1, -1)


def _tint(picture: Tensor, weight_hwE: Tensor, patch: tuple[int, int]) -> Tensor:
    """(3, H, W) the picture, each patch mixed with the colors of its experts."""
    colors_E3 = torch.tensor(palette(num_experts=weight_hwE.size(-1)))
    share_hwE = F.normalize(weight_hwE, p=1, dim=-1)
    color_3hw = (share_hwE @ colors_E3).permute(2, 0, 1).contiguous()
    _, height, width = picture.shape
    patch_height, patch_width = patch
    # Double the patch until the grid covers the picture: a Swin merges patches 2 x 2.
    while patch_height * color_3hw.size(1) < height or patch_width * color_3hw.size(2) < width:
        patch_height, patch_width = 2 * patch_height, 2 * patch_width
    color = torch.kron(color_3hw, torch.ones(1, patch_height, patch_width))[:, :height, :width]
    return torch.lerp(picture, color, STRENGTH)


# Load ---------------------------------------------------------------------------------------------

LayerLoad: TypeAlias = Routing | Mapping[str, Tensor]


def expert_load(
    history: Sequence[Routing | Sequence[LayerLoad]], *, xlabel: str = "step"
) -> Figure:
    """Draw the load of every expert over time, one panel per MoE layer; a single step as bars.

    The load is the share of an expert among all (token, expert) pairs: 1/E each if balanced.

    Args:
        history: an entry for each step: what :func:`gmoe.record_routing` records, or what
            :meth:`gmoe.RoutingStats.compute` returns.
        xlabel: what an entry is (default ``"step"``).

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
    steps = []
    is_list = isinstance(history, Sequence) and not isinstance(history, str)
    check(is_list, "history", described(history), "a list, an entry a step")
    for entry in history:
        layers = [entry] if isinstance(entry, Routing) else entry
        is_mapping = isinstance(layers, Mapping)
        check(not is_mapping, "history", "an entry that is a dictionary", "its values()")
        steps.append([_load(layer) for layer in layers])
    sizes = {tuple(map(len, step)) for step in steps}
    is_same = len(sizes) == 1 and sizes != {()}
    check(is_same, "history", f"layers of {sorted(sizes)} experts", "the same in all steps")
    loads = [torch.stack(layer) for layer in zip(*steps, strict=True)]  # (S, E) of each layer
    columns = min(len(loads), 2)
    rows = math.ceil(len(loads) / 2)
    figure = Figure(figsize=(3.7 * columns, 2.8 * rows), layout="constrained")
    for number, load_SE in enumerate(loads, start=1):
        axis = figure.add_subplot(rows, columns, number)
        num_experts = load_SE.size(1)
        if len(steps) == 1:
            axis.bar(range(num_experts), load_SE[0].numpy(), color=palette(num_experts=num_experts))
            axis.axhline(1 / num_experts, color="0.3", linewidth=0.8, linestyle="--")
            axis.set(xlabel="expert")
        else:
            axis.stackplot(
                range(1, len(steps) + 1), load_SE.T.numpy(), colors=palette(num_experts=num_experts)
            )
            axis.set(xlabel=xlabel, xlim=(1, len(steps)), ylim=(0, 1))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_title(f"MoE layer {number}", fontsize="medium")
        axis.set_ylabel("load (share of pairs)")
    if len(steps) > 1:
        _legend(figure, max(load_SE.size(1) for load_SE in loads))
    return figure


def _load(layer: LayerLoad) -> Tensor:
    """(E,) the experts' shares of the pairs."""
    load_E = layer.load if isinstance(layer, Routing) else layer["load"].reshape(-1)
    return F.normalize(load_E.float().cpu(), p=1, dim=0)


def _legend(figure: Figure, num_experts: int) -> None:
    """Draw the color and number of every expert below a figure."""
    handles = [
        Patch(color=color, label=number)
        for number, color in enumerate(palette(num_experts=num_experts))
    ]
    columns = min(num_experts, 4)  # as many as fit below a single panel
    figure.legend(
        handles=handles, title="expert", ncols=columns, loc="outside lower center", fontsize="small"
    )
