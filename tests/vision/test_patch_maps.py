"""Tints and crops of patches, by hand. Shapes: B images, G patches a side, E experts."""

from __future__ import annotations

import pytest
import torch

from gmoe import Routing, ViTMoE, ViTSize, build_router
from vision.patch_maps import crop_patches, palette, patch_weights, tint


@pytest.mark.parametrize("experts", [1, 2, 10, 11, 64])
def test_colors_differ(experts: int) -> None:
    colors = palette(experts)
    assert colors.shape == (experts, 3)
    assert ((colors >= 0) & (colors <= 1)).all()
    assert len({tuple(row) for row in colors.tolist()}) == experts


def test_weights_leave_the_class_token_out() -> None:
    # 2 images of 1 + 4 tokens; pairs by expert: class token of image 0, its last patch, first patch of image 1
    token = torch.tensor([0, 4, 6])
    routing = Routing(
        token, torch.tensor([1, 3], dtype=torch.int32), torch.tensor([0.9, 0.5, 0.25]), torch.zeros(10, 2), 10
    )
    weight = patch_weights(routing, 2)
    assert weight.shape == (2, 2, 2, 2)
    expected = torch.zeros(2, 2, 2, 2)
    expected[0, 1, 1, 1], expected[1, 0, 0, 1] = 0.5, 0.25
    assert torch.equal(weight, expected)


def test_weights_of_a_model_are_those_of_its_routing() -> None:
    torch.manual_seed(0)
    size = ViTSize(image_size=12, patch_size=4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=8)
    model = ViTMoE(size, router="token_choice", num_experts=3, k=2)
    _, (routing,) = model(torch.randn(4, 3, 12, 12), return_routing=True)
    weight = patch_weights(routing, 4)
    dense = routing.to_dense().detach()
    for image in range(4):
        for row in range(3):
            for column in range(3):
                assert torch.equal(weight[image, row, column], dense[image * 10 + 1 + 3 * row + column])


@pytest.mark.parametrize(("tokens", "images"), [(9, 2), (10, 3), (10, 0), (2, 2), (6, 1)])
def test_tokens_that_are_no_patches_are_refused(tokens: int, images: int) -> None:
    routing = build_router("token_choice", 4, 2, 1)(torch.randn(tokens, 4))
    with pytest.raises(ValueError, match=f"routing: got {tokens} tokens of {images} images"):
        patch_weights(routing, images)


def test_tints_by_hand() -> None:
    images = torch.full((1, 1, 4, 4), 0.5)
    weight = torch.zeros(1, 2, 2, 2)
    weight[0, 0, 0, 0] = 0.2  # the first expert alone
    weight[0, 0, 1] = torch.tensor([0.1, 0.3])  # both, by weight
    colors = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    found = tint(images, weight, colors, strength=0.5)
    assert found.shape == (1, 3, 4, 4)
    for row in (slice(0, 2), slice(2, 4)):
        for column in (slice(0, 2), slice(2, 4)):
            part = found[0, :, row, column].flatten(1)
            assert (part == part[:, :1]).all()
    torch.testing.assert_close(found[0, :, 0, 0], torch.tensor([0.75, 0.25, 0.25]))
    torch.testing.assert_close(found[0, :, 1, 3], torch.tensor([0.25 + 0.5 * 0.25, 0.25, 0.25 + 0.5 * 0.75]))
    torch.testing.assert_close(found[0, :, 3, 3], torch.tensor([0.25, 0.25, 0.25]))  # nobody's is darkened
    assert torch.equal(tint(images, weight, colors, strength=0.0), images.expand(-1, 3, -1, -1))


@pytest.mark.parametrize(
    ("strength", "side", "message"), [(1.5, 4, "strength: got 1.5"), (0.5, 5, "weight_BGGE: got 2 patches")]
)
def test_bad_tints(strength: float, side: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tint(torch.zeros(1, 3, side, side), torch.zeros(1, 2, 2, 2), palette(2), strength)


def test_crops_are_the_patches() -> None:
    images = torch.arange(2 * 3 * 6 * 4, dtype=torch.float).view(2, 3, 6, 4)
    found = crop_patches(images, torch.tensor([1, 0]), torch.tensor([3, 0]), 2)
    assert torch.equal(found[0], images[1, :, 3:, 2:])
    assert torch.equal(found[1], images[0, :, :3, :2])
