"""ViTMoE: shapes, pools per image, the dense baseline, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import gmoe
from gmoe.models.vit import SIZES, ViTMoE
from tests.helpers.vits import SMALL_VIT

TINY = SMALL_VIT | {"patch_size": 2}


def vit(router: str | None) -> ViTMoE:
    torch.manual_seed(0)
    model = ViTMoE(TINY, 5, router, num_experts=4)
    torch.nn.init.normal_(model.heads.head.weight)  # torchvision's starts at zero
    return model


@pytest.mark.parametrize("side", sorted(SIZES))
@pytest.mark.parametrize("router", ["expert_choice", None])
def test_presets_run_and_train(side: int, router: str | None) -> None:
    model = ViTMoE(side, router=router)
    logits, routings = model(torch.randn(2, 3, side, side), return_routing=True)
    assert logits.shape == (2, 10)
    tokens = 2 * ((side // SIZES[side]["patch_size"]) ** 2 + 1)  # and the class token
    assert [routing.num_tokens for routing in routings] == (
        [] if router is None else [tokens] * len(routings)
    )
    (F.cross_entropy(logits, torch.tensor([0, 1])) + gmoe.aux_loss(routings)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_dense_baseline_is_torchvisions() -> None:
    """And is upcycled as any."""
    model, images = vit(None), torch.randn(3, 3, 8, 8)
    assert torch.equal(model(images), super(ViTMoE, model).forward(images))
    assert model(images, return_routing=True)[1] == []
    gmoe.moefy(model, num_experts=4)
    assert len(model(images, return_routing=True)[1]) == 1


def test_routings_are_replayed_without_asking_a_router() -> None:
    """Nothing of them is left after the call; other numbers are refused."""
    torch.manual_seed(0)
    model = ViTMoE(TINY | {"num_layers": 4}, 5, start="plain")
    torch.nn.init.normal_(model.heads.head.weight)
    images = torch.randn(2, 3, 8, 8)
    logits, routings = model(images, return_routing=True)
    for router in [part for part in model.modules() if isinstance(part, gmoe.Router)]:
        router.reset_parameters()
    replayed, used = model(images, routings=routings, return_routing=True)
    assert torch.equal(replayed, logits)
    assert [*map(id, used)] == [*map(id, routings)]
    assert not torch.allclose(model(images), logits)
    for given, got in ((routings[:1], "1"), (routings[0], "Routing"), ([None, None], "list")):
        with pytest.raises(ValueError, match=f"^routings: got {got}, expected a list of 2 "):
            model(images, routings=given)
    with pytest.raises(ValueError, match=r"^routing: got .*34 tokens.*, expected .* 51 tokens"):
        model(torch.randn(3, 3, 8, 8), routings=routings)


def test_gray_images_are_repeated() -> None:
    model = vit("expert_choice")
    gray = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(model(gray), model(gray.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        ({"size": 64}, "size"),
        ({"size": TINY | {"image_size": 9}}, "image_size"),
        ({"size": TINY | {"num_heads": 3}}, "hidden_dim"),
        ({"size": TINY | {"img_size": 8}}, "size"),
        ({"size": {"image_size": 8}}, "size"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: got"):
        ViTMoE(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(2, 3, 8, 9), (2, 2, 8, 8), (3, 8, 8)])
def test_bad_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="images"):
        vit("expert_choice")(torch.randn(*shape))
