"""Figures of what routers do: experts on images, on graphs, and over training. Needs matplotlib and networkx.

The functions return a matplotlib ``Figure`` that belongs to no window: save it with ``figure.savefig("x.png")``, end a
notebook cell with it, or hand it to TensorBoard's ``add_figure``.

Shapes: B images, H x W pixels, h x w patches, T tokens, N nodes, M edges, E experts, S steps.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from gmoe._checks import check, check_count, check_probability
from gmoe.routing import Routing, record_routing

try:
    import networkx as nx
    from matplotlib import colormaps
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator
except ModuleNotFoundError as error:
    raise ImportError(f'gmoe.plot needs {error.name}: pip install "gmoe[plot]"') from error

__all__ = ["expert_graph", "expert_load", "expert_maps", "palette", "patch_weights"]

Color: TypeAlias = tuple[float, float, float]

NOBODY: Color = (0.85, 0.85, 0.85)
"""The color of nodes without an expert."""

MOST_PREFIX_TOKENS = 16
"""More tokens before an image's patches are no class and register tokens, but a sign of another patch size."""


def palette(num_experts: int) -> list[Color]:
    """Give each expert an RGB color: Tableau's ten, their twenty, or hues at equal distances.

    Example:
        >>> red, green, blue = palette(8)[3]
    """
    check_count("num_experts", num_experts)
    if num_experts > 20:
        colors = colormaps["hsv"]([expert / num_experts for expert in range(num_experts)])
    else:
        colors = colormaps["tab10" if num_experts <= 10 else "tab20"](range(num_experts))
    return [(red, green, blue) for red, green, blue, _ in colors.tolist()]


# Images ---------------------------------------------------------------------------------------------------------------


def patch_weights(model: nn.Module, images: Tensor, *, patch_size: int | tuple[int, int] | None = None) -> list[Tensor]:
    """Run a vision transformer on images and return the weight of every expert on every patch.

    The model is torchvision's, timm's or any other whose tokens are the patches row by row, with at most 16 class and
    register tokens before them, or the grids of a Swin, which halve from stage to stage. It runs in evaluation mode
    without gradients.

    Args:
        model: a model that holds MoE layers.
        images: (B, C, H, W), or one image (C, H, W), as the model takes them; moved to its device and dtype.
        patch_size: height and width of a patch in pixels; by default the kernel of the model's first convolution whose
            kernel is its stride.

    Returns:
        A tensor a MoE layer, (B, h, w, E) on the CPU; 0 where an expert does not take the patch.

    Raises:
        ValueError: images of another shape, a model without a patch embedding, or tokens that are not the patches.
        RuntimeError: the model ran no router.

    Example:
        >>> model = gmoe.ViTMoE(32, num_experts=8)
        >>> [weight.shape for weight in patch_weights(model, torch.rand(2, 3, 32, 32))]
        [torch.Size([2, 8, 8, 8]), torch.Size([2, 8, 8, 8]), torch.Size([2, 8, 8, 8])]
    """
    images = _batch_of(images)
    high, wide = _patch_size(model, images, patch_size)
    h, w = images.size(2) // high, images.size(3) // wide
    like = next(model.parameters(), images)
    with _evaluating(model), record_routing(model) as routings:
        model(images.to(like.device, like.dtype if like.is_floating_point() else images.dtype))
    weights = []
    for layer, routing in enumerate(routings, start=1):
        grid = _grid(routing.num_tokens / len(images), h, w)
        if grid is None:
            raise ValueError(
                f"images: got {routing.num_tokens} tokens of {len(images)} images in MoE layer {layer}, expected for "
                f"each {h} x {w} patches and up to {MOST_PREFIX_TOKENS} class and register tokens before them, or the "
                "halved grids of a Swin; give patch_size if patches are of another size"
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
    patch_size: int | tuple[int, int] | None = None,
    strength: float = 0.6,
) -> Figure:
    """Tint each patch of images by its expert: a row an image, a column a MoE layer.

    A patch of several experts has their colors mixed by weight; one that no expert took is dark. Experts of different
    layers have nothing to do with each other.

    Args:
        model, images, patch_size: see :func:`patch_weights`.
        mean, std: by channel, as the images were normalized; by default each image is stretched to 0..1.
        titles: a text an image.
        strength: share of the expert's color in [0, 1] (default 0.6).

    Raises:
        ValueError: see :func:`patch_weights`; one of ``mean`` and ``std`` alone, titles of another number, a strength
            out of range.

    Example:
        >>> vit = gmoe.moefy(timm.create_model("vit_tiny_patch16_224"), num_experts=8)
        >>> expert_maps(vit, torch.rand(2, 3, 224, 224), titles=["one", "two"]).savefig("maps.png")
    """
    check_probability("strength", strength)
    check((mean is None) == (std is None), "mean, std", f"{mean}, {std}", "both or none")
    images = _batch_of(images)
    check(titles is None or len(titles) == len(images), "titles", titles, f"{len(images)} of them")
    weights = patch_weights(model, images, patch_size=patch_size)
    high, wide = _patch_size(model, images, patch_size)
    height, width = images.size(2) // high * high, images.size(3) // wide * wide
    pictures = _to_rgb(images.detach().float().cpu(), mean, std)[..., :height, :width]  # what patches cover
    cell = 1.7 * max(width / height, 0.4)
    figure = Figure(figsize=(cell * (len(weights) + 1) + 0.3, 1.75 * len(images) + 0.8), layout="constrained")
    grid = figure.subplots(len(images), len(weights) + 1, squeeze=False)
    for number, (row, picture) in enumerate(zip(grid, pictures, strict=True)):
        row[0].imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
        for axis, weight in zip(row[1:], weights, strict=True):
            axis.imshow(
                _tint(picture, weight[number], (high, wide), strength).permute(1, 2, 0).numpy(), interpolation="nearest"
            )
        for axis in row:
            axis.set(xticks=[], yticks=[])
        if titles is not None:
            row[0].set_ylabel(titles[number])
    for layer, axis in enumerate(grid[0, 1:], start=1):
        axis.set_title(f"MoE layer {layer}", fontsize="medium")
    _legend(figure, "expert", max(weight.size(-1) for weight in weights))
    return figure


def _batch_of(images: Tensor) -> Tensor:
    batch = images[None] if images.dim() == 3 else images
    legal = "(B, 3 or 1, H, W), or one image (3 or 1, H, W)"
    check(batch.dim() == 4 and batch.size(1) in (1, 3) and len(batch), "images", f"shape {tuple(images.shape)}", legal)
    return batch


def _patch_size(model: nn.Module, images: Tensor, given: int | tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of a patch in pixels."""
    if given is None:
        convs = (module for module in model.modules() if isinstance(module, nn.Conv2d))
        found = next((conv.stride for conv in convs if conv.kernel_size == conv.stride != (1, 1)), None)
        legal = "a Conv2d whose kernel is its stride; or give patch_size"
        check(found, "model", f"{type(model).__name__} without a patch embedding", legal)
        given = found  # type: ignore[assignment]
    high, wide = (given, given) if isinstance(given, int) else given  # type: ignore[misc]
    height, width = images.shape[2:]
    check(0 < high <= height and 0 < wide <= width, "patch_size", (high, wide), f"at most the image, {height, width}")
    return high, wide


def _grid(tokens: float, h: int, w: int) -> tuple[int, int] | None:
    """The grid that an image's tokens end with: all patches, or all of them merged 2 x 2 once or more."""
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


def _tint(picture: Tensor, weight_hwE: Tensor, patch: tuple[int, int], strength: float) -> Tensor:
    """(3, H, W) the picture, each patch mixed with the colors of its experts."""
    share_hwE = weight_hwE / weight_hwE.sum(-1, keepdim=True).clamp(min=torch.finfo(weight_hwE.dtype).tiny)
    color = (share_hwE @ torch.tensor(palette(weight_hwE.size(-1)))).permute(2, 0, 1)
    (high, wide), (_, height, width) = patch, picture.shape
    while high * color.size(1) < height or wide * color.size(2) < width:  # patches merged 2 x 2
        high, wide = 2 * high, 2 * wide
    color = color.repeat_interleave(high, dim=1).repeat_interleave(wide, dim=2)[:, :height, :width]
    return (1 - strength) * picture + strength * color


# Graphs ---------------------------------------------------------------------------------------------------------------


def expert_graph(
    routing: Routing | Sequence[Routing] | nn.Module,
    edge_index: Tensor,
    x: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    max_nodes: int = 250,
    seed: int = 0,
) -> Figure:
    """Draw a graph with its nodes colored by expert, a panel a MoE layer, in networkx' spring layout.

    Of a graph with more nodes than ``max_nodes`` the neighborhoods of one node of each expert of the first layer are
    drawn, equal shares of each; the figure's title says so. A node of several experts has the color of the one with the
    largest weight.

    Args:
        routing: of all nodes; a list of them, one a layer; or a model, which then runs as ``model(x, edge_index)`` in
            evaluation mode without gradients.
        edge_index: (2, M); directions are not drawn.
        x: (N, F) the input of a model, else ``None``.
        labels: (N,) classes, for one more panel with the nodes colored by class; below 0 where unknown.
        max_nodes: how many nodes are drawn at most (default 250).
        seed: of the layout and the choice of nodes.

    Raises:
        ValueError: no routing, routings of other numbers of nodes than the edges or labels need, ``x`` with a routing,
            or a model without it.

    Example:
        >>> gnn = gmoe.GNNMoE(16, 32, 4, num_layers=2)
        >>> x, edge_index = torch.randn(40, 16), torch.randint(40, (2, 80))
        >>> expert_graph(gnn, edge_index, x).savefig("graph.png")
    """
    check_count("max_nodes", max_nodes)
    is_model = isinstance(routing, nn.Module)
    check(is_model == (x is not None), "x", type(x).__name__, "a tensor with a model, None with routings")
    if isinstance(routing, nn.Module):
        with _evaluating(routing), record_routing(routing) as routings:
            routing(x, edge_index)
    else:
        routings = [routing] if isinstance(routing, Routing) else list(routing)
    sizes = {one.num_tokens for one in routings}
    check(
        len(sizes) == 1, "routing", f"layers of {sorted(sizes)} tokens", "at least one layer, all of the graph's nodes"
    )
    num_nodes, edge_index = sizes.pop(), edge_index.cpu()
    shaped = edge_index.dim() == 2 and len(edge_index) == 2 and not edge_index.is_floating_point()
    check(shaped, "edge_index", f"shape {tuple(edge_index.shape)} of {edge_index.dtype}", "(2, M) integers")
    largest = int(edge_index.max()) if edge_index.numel() else -1
    check(largest < num_nodes, "edge_index", f"node {largest}", f"at most {num_nodes - 1}, of a routing of all nodes")
    panels = [("expert", f"MoE layer {i}", one.top_expert.cpu(), one.num_experts) for i, one in enumerate(routings, 1)]
    if labels is not None:
        check(labels.shape == (num_nodes,), "labels", f"shape {tuple(labels.shape)}", f"({num_nodes},)")
        classes = max(int(labels.max()) + 1, 1)
        panels.append(("class", "classes", labels.where(labels >= 0, classes).cpu(), classes))
    nodes = _drawn(edge_index, panels[0][2], max_nodes, seed)
    place = torch.full((num_nodes,), -1)
    place[nodes] = torch.arange(len(nodes))
    ends = place[edge_index]
    pairs = ends[:, (ends >= 0).all(0) & (ends[0] != ends[1])].T.tolist()
    at = _layout(len(nodes), pairs, seed)
    figure, axes = _panels(len(panels), 3.7, 4.3)
    for axis, (name, title, value, count) in zip(axes, panels, strict=True):
        shown, colors = value[nodes].tolist(), [*palette(count), NOBODY]
        axis.add_collection(LineCollection([(at[a], at[b]) for a, b in pairs], colors="0.8", linewidths=0.5))
        axis.scatter(
            *zip(*at, strict=True), s=26, c=[colors[e] for e in shown], zorder=2, edgecolors="w", linewidths=0.3
        )
        axis.set_title(title, fontsize="medium")
        axis.set_axis_off()
        _legend(axis, name, count, nobody=count in shown)
    if len(nodes) < num_nodes:
        figure.suptitle(f"{len(nodes)} of {num_nodes:,} nodes: around one node of each expert", fontsize="medium")
    return figure


def _layout(num_nodes: int, pairs: Sequence[Sequence[int]], seed: int) -> list[Any]:
    """A place a node; a hub that is not drawn holds unconnected parts together."""
    graph = nx.Graph()
    graph.add_edges_from(((node, "hub") for node in range(num_nodes)), weight=0.15)
    graph.add_edges_from(pairs, weight=1.0)
    places = nx.spring_layout(graph, seed=seed, iterations=100)
    return [places[node] for node in range(num_nodes)]


def _drawn(edge_index: Tensor, expert_N: Tensor, most: int, seed: int) -> Tensor:
    """All nodes of a small graph; else as many around a node of each expert, hop by hop, until there are ``most``."""
    if len(expert_N) <= most:
        return torch.arange(len(expert_N))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.zeros(len(expert_N), dtype=torch.bool)
    kinds = expert_N.unique()[:most]
    source, destination = torch.cat([edge_index, edge_index.flip(0)], dim=1)
    for number, kind in enumerate(kinds):
        room = (most - int(drawn.sum())) // (len(kinds) - number)
        members = (expert_N == kind).logical_and(~drawn).nonzero().view(-1)
        members = members[torch.randperm(len(members), generator=generator)[:1]]
        seen = torch.zeros_like(drawn)
        seen[members] = True
        fresh = members
        while len(fresh) and room:
            fresh = fresh[:room]
            seen[fresh] = drawn[fresh] = True
            room -= len(fresh)
            fresh = destination[seen[source]].unique()
            fresh = fresh[~(seen | drawn)[fresh]]
            fresh = fresh[torch.randperm(len(fresh), generator=generator)]
    return drawn.nonzero().view(-1)


# Load -----------------------------------------------------------------------------------------------------------------


def expert_load(history: Sequence[Any]) -> Figure:
    """Draw the load of every expert over time, a panel a MoE layer; bars where there is one step.

    The load is the share of an expert among all (token, expert) pairs: 1/E each if balanced.

    Args:
        history: a step an entry, each what :func:`gmoe.record_routing` gives or what :meth:`gmoe.RoutingStats.compute`
            returns, for all layers; or the rows of a run's ``routing.csv``: dictionaries with ``epoch``, ``layer`` and
            ``load_0``, ``load_1``, ...

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
    check(len(history), "history", "no steps", "at least one")
    steps, name, loads = _loads(history)
    figure, axes = _panels(len(loads), 3.7, 2.8)
    for number, (axis, load_SE) in enumerate(zip(axes, loads, strict=True)):
        colors = palette(load_SE.size(1))
        if len(load_SE) == 1:
            axis.bar(range(load_SE.size(1)), load_SE[0].tolist(), color=colors)
            axis.axhline(1 / load_SE.size(1), color="0.3", linewidth=0.8, linestyle="--")
            axis.set(xlabel="expert")
        else:
            axis.stackplot(steps, load_SE.T.numpy(), colors=colors)
            axis.set(xlabel=name, xlim=(steps[0], steps[-1]), ylim=(0, 1))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_title(f"MoE layer {number + 1}", fontsize="medium")
        if number % 2 == 0:
            axis.set(ylabel="load (share of pairs)")
    if len(steps) > 1:
        _legend(figure, "expert", max(load_SE.size(1) for load_SE in loads))
    return figure


def _loads(history: Sequence[Any]) -> tuple[list[float], str, list[Tensor]]:
    """The steps, what they are called, and (S, E) a layer."""
    if isinstance(history[0], Mapping):
        layers = sorted({int(row["layer"]) for row in history})
        steps = list(dict.fromkeys(float(row["epoch"]) + 1 for row in history))
        tables: list[list[Any]] = [[_row_load(row) for row in history if row["layer"] == layer] for layer in layers]
        name = "epoch"
    else:
        entries = [[entry] if isinstance(entry, Routing) else list(entry) for entry in history]
        rows = [[_step_load(layer) for layer in entry] for entry in entries]
        check(len({len(row) for row in rows}) == 1, "history", "steps of different layers", "the same layers in each")
        tables = [list(layer) for layer in zip(*rows, strict=True)]
        steps, name = [float(step) for step in range(1, len(history) + 1)], "step"
    even = tables and all(len(table) == len(steps) and len({len(row) for row in table}) == 1 for table in tables)
    check(even, "history", "steps of different layers or experts", "the same layers and experts in each")
    return steps, name, [torch.tensor(table) for table in tables]


def _row_load(row: Mapping[str, Any]) -> list[float]:
    found = [row[f"load_{expert}"] for expert in range(sum(name.startswith("load_") for name in row))]
    return [float(value) for value in found if value is not None and value == value]  # pandas reads none as NaN


def _step_load(layer: Routing | Mapping[str, Tensor]) -> list[float]:
    load = layer.load if isinstance(layer, Routing) else layer["load"]
    shares: list[float] = (load / load.sum().clamp(min=1e-12)).tolist()
    return shares


# ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and without compilation, which would trace the model anew; then as it was."""
    modes = [(module, module.training) for module in model.modules()]
    compiled = "torch._dynamo" in sys.modules  # which takes seconds to import; who compiled the model has done so
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    try:
        with torch.no_grad(), eager:
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _panels(count: int, width: float, height: float) -> tuple[Figure, list[Any]]:
    """A figure of panels, two in a row."""
    rows, columns = -(-count // 2), min(count, 2)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def _legend(where: Any, name: str, count: int, *, nobody: bool = False) -> None:
    """Color and number of every expert, or class, below a figure or a panel."""
    handles = [Patch(color=color, label=str(number)) for number, color in enumerate(palette(count))]
    handles += [Patch(color=NOBODY, label="none")] if nobody else []
    place: dict[str, Any] = {"loc": "outside lower center"}
    if not isinstance(where, Figure):
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0)}
    rows = -(-len(handles) // 8)
    size = "small" if rows > 1 else "medium"
    where.legend(handles=handles, title=name, ncols=-(-len(handles) // rows), fontsize=size, frameon=False,
                 handlelength=0.8, handletextpad=0.4, columnspacing=0.9, **place)  # fmt: skip
