"""Figures of routings, read back from what matplotlib holds.

Shapes: B images, h x w patches, E experts.
"""

from __future__ import annotations

import doctest
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models import SwinTransformer

import gmoe
from gmoe import (
    OracleRouter,
    Routing,
    RoutingStats,
    ViTMoE,
    moefy,
    record_routing,
)
from gmoe.plot import _grid, _tint, _to_rgb, expert_load, expert_maps, palette, patch_weights
from gmoe.routers import build_router
from tests.helpers.vits import SMALL_VIT

SIZE = SMALL_VIT | {"image_size": 12}
IMAGE = torch.zeros(3, 12, 12)


def of_assignment(assignment: Tensor, experts: int) -> Routing:
    found: Routing = OracleRouter(4, num_experts=experts, assignment=assignment)(
        torch.randn(len(assignment), 4)
    )
    return found


def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {
        "gmoe": gmoe,
        "torch": torch,
        "timm": timm,
        "model": ViTMoE(SIZE),
        "images": torch.rand(2, 3, 12, 12),
    }
    found = doctest.testmod(gmoe.plot, extraglobs=names)
    assert found.attempted >= 8
    assert found.failed == 0
    assert {path.name for path in tmp_path.iterdir()} == {"maps.png", "load.png"}


timm_vit: Any = partial(
    VisionTransformer, (8, 16), 4, embed_dim=8, depth=2, num_heads=2, num_classes=3
)
swin: Any = partial(SwinTransformer, [4, 4], 8, [2, 2], [2, 2], [2, 2], num_classes=5)


@pytest.mark.parametrize(
    ("build", "shape", "grids", "prefix"),
    [
        (partial(ViTMoE, SIZE, router=None), (12, 12), [(3, 3)], 1),
        (partial(timm_vit, reg_tokens=4), (8, 16), [(2, 4)], 5),
        (partial(timm_vit, class_token=False, global_pool="avg"), (8, 16), [(2, 4)], 0),
        (swin, (20, 22), [(5, 5), (3, 3)], 0),  # the last columns are of no patch
    ],
    ids=["ViTMoE", "registers", "no class token", "padded Swin"],
)
def test_weights_are_those_of_the_patches(
    build: Any, shape: tuple[int, int], grids: list[tuple[int, int]], prefix: int
) -> None:
    torch.manual_seed(0)
    model = moefy(build(), every=2, k=2, num_experts=3)
    images = torch.randn(2, 3, *shape)
    with record_routing(model.eval()) as routings, torch.no_grad():
        model(images)
    list(model.train().children())[-1].eval()
    modes = [module.training for module in model.modules()]
    weights = patch_weights(model, images)
    assert [module.training for module in model.modules()] == modes
    for routing, weight, (h, w) in zip(routings, weights, grids, strict=True):
        dense = routing.to_dense().view(2, prefix + h * w, 3)
        assert torch.equal(weight, dense[:, prefix:].reshape(2, h, w, 3))


def test_compiled_models_of_any_dtype_are_drawn() -> None:
    model = ViTMoE(SIZE).double().eval()
    model.compile(backend="eager")
    with torch.no_grad():
        model(torch.zeros(1, 3, 12, 12).double())
    assert [weight.shape for weight in patch_weights(model, torch.zeros(3, 12, 12))] == [
        (1, 3, 3, 8)
    ]


@pytest.mark.parametrize(
    ("images", "options", "argument"),
    [
        (torch.zeros(2, 2, 12, 12), {}, "images"),
        (torch.zeros(3, 3, 12), {}, "images"),
        (IMAGE, {"model": nn.Identity()}, "model"),
        (IMAGE, {"mean": (0.5,)}, "mean"),
        (IMAGE, {"mean": (0.5, 0.5), "std": (0.5, 0.5)}, "mean: got .* a number for each channel"),
        (IMAGE, {"mean": (0.5,), "std": 0.5}, "std: got 0.5, expected a number for each channel"),
        (IMAGE, {"titles": ["one", "two"]}, "titles"),
    ],
)
def test_bad_images_are_refused(images: Tensor, options: dict[str, Any], argument: str) -> None:
    with pytest.raises(ValueError, match=argument):
        expert_maps(**{"model": ViTMoE(SIZE), "images": images, **options})


class Fixed(nn.Module):
    """Routes 2 x 2 patches: the first to expert 0, the second to both, the others to none.

    The weights of the second are 1 : 3.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 4, 2, stride=2)
        self.router = build_router("uniform", 4, num_experts=2, k=1)
        fixed = Routing(
            torch.tensor([0, 1, 1]),
            torch.tensor([2, 3], dtype=torch.int32),
            torch.tensor([0.2, 0.1, 0.3]),
            torch.zeros(4, 2),
            4,
        )
        self.router.register_forward_hook(lambda *_: fixed, prepend=True)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        self.router(x)
        return x


def pixels(figure: Figure, panel: int) -> np.ndarray:
    return np.asarray(figure.axes[panel].images[0].get_array())


def test_tints_by_hand() -> None:
    figure = expert_maps(
        Fixed(), torch.full((1, 4, 4), 0.5) * 4 - 1, mean=(0.25,), std=(0.25,), titles=["gray " * 9]
    )
    assert np.allclose(pixels(figure, 0), 0.5)
    first, second = (np.array(color) for color in palette(num_experts=2))
    for place, color in (
        ((slice(0, 2), slice(0, 2)), first),
        ((slice(0, 2), slice(2, 4)), 0.25 * first + 0.75 * second),
        ((slice(2, 4), slice(0, 4)), np.zeros(3)),  # dark, without an expert
    ):
        assert np.allclose(pixels(figure, 1)[place], 0.4 * 0.5 + 0.6 * color, atol=1e-6)
    assert figure.axes[0].get_ylabel() == "gray gray…gray gray "
    assert [axis.get_title() for axis in figure.axes] == ["", "MoE layer 1"]
    (legend,) = figure.legends
    assert len(legend.legend_handles) == 2  # experts
    stretched = expert_maps(Fixed(), torch.arange(16.0).view(1, 4, 4))
    assert np.allclose(pixels(stretched, 0)[..., 0].ravel(), np.arange(16) / 15)
    both = torch.arange(16.0).view(1, 1, 4, 4) * torch.tensor([1.0, 9.0])[:, None, None, None]
    assert torch.allclose(*_to_rgb(both, None, None))  # each image by itself
    numbers: Any = np.array([0.25])  # of float64
    figure = expert_maps(Fixed(), IMAGE[:1, :4, :4], mean=numbers, std=numbers)
    assert np.allclose(pixels(figure, 0), 0.25)


def test_the_legend_has_every_expert() -> None:
    (legend,) = expert_maps(ViTMoE(SIZE, num_experts=5), IMAGE).legends
    assert len(legend.legend_handles) == 5  # beside grids of 3 x 3 patches


def test_a_grid_that_a_stage_has_merged_covers_the_picture() -> None:
    """One place of 2 x 4 pixels that were patches of 1 x 2."""
    weight_hwE = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    tinted = _tint(torch.zeros(3, 2, 8), weight_hwE, (1, 2))
    for columns, expert in ((slice(0, 4), 0), (slice(4, 8), 1)):
        color = 0.6 * torch.tensor(palette(num_experts=2)[expert])[:, None, None]
        torch.testing.assert_close(tinted[..., columns], color.expand(3, 2, 4))


def test_no_expert_is_gray_and_no_two_are_alike() -> None:
    """Gray stands for what has no expert, in every figure."""
    for num_experts in range(1, 257):
        colors = palette(num_experts=num_experts)
        assert len(set(colors)) == num_experts
        assert min(max(color) - min(color) for color in colors) > 0.14  # pale violet


def test_loads_of_routings_and_of_stats_are_the_same() -> None:
    """Three steps in which 1/5, 2/5 and 3/5 of the tokens go to the first expert."""
    steps = [
        [of_assignment(torch.tensor([0] * n + [1] * (5 - n)), 2) for _ in range(2)]
        for n in (1, 2, 3)
    ]
    counted = []
    for layers in steps:
        stats = RoutingStats(num_experts=[2, 2])
        stats.update(layers)
        counted.append(stats.compute())
    for history in (steps, counted):
        figure = expert_load(history)
        assert [len(legend.legend_handles) for legend in figure.legends] == [2]
        for axis in figure.axes[:2]:
            first, second = axis.collections
            points = {
                tuple(point)
                for point in np.round(np.asarray(first.get_paths()[0].vertices), 4).tolist()
            }
            assert {(1.0, 0.2), (2.0, 0.4), (3.0, 0.6)} <= points
            assert tuple(np.asarray(second.get_facecolor())[0]) == to_rgba(
                palette(num_experts=2)[1]
            )


def test_one_step_is_drawn_as_bars() -> None:
    figure = expert_load([of_assignment(torch.tensor([0, 0, 0, 2]), 3)])
    (axis,) = figure.axes
    assert not figure.legends  # experts stand below their bars
    colors = [tuple(bar.get_facecolor()[:3]) for bar in axis.patches]
    assert colors == palette(num_experts=3)
    assert [bar.get_height() for bar in axis.patches] == [0.75, 0.0, 0.25]  # type: ignore[attr-defined]
    stats = RoutingStats(num_experts=[1])  # whose figures of a single expert are scalars
    stats.update(of_assignment(torch.tensor([0]), 1))
    assert len(expert_load([stats.compute()]).axes) == 1


def test_bad_histories_are_refused() -> None:
    one, other = of_assignment(torch.zeros(5).long(), 2), of_assignment(torch.zeros(5).long(), 3)
    histories: list[Any] = [[], [[]], [one, other], [[one], [one, one]], one, [{"paper": one}]]
    for history in histories:
        with pytest.raises(ValueError, match="history"):
            expert_load(history)


def test_a_class_token_alone_is_no_grid_of_one_patch() -> None:
    """As in the last layers of CaiT; an image of one patch has one."""
    assert _grid(1, 14, 14) is None
    assert _grid(1, 1, 1) == (1, 1)
    assert _grid(4, 14, 14) == (2, 2)
