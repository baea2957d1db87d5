"""A ViT's decisions: for each image, by the caller's router; or of one router for all layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import gmoe
from gmoe import MoE, TokenChoice, ViTMoE
from tests.helpers.shrunk import pruned_on
from tests.helpers.vits import SMALL_VIT, images

E = 4
FOUR_BLOCKS = SMALL_VIT | {"num_layers": 4}


def test_a_decision_may_come_from_features_of_the_users() -> None:
    """A view of the images, such as their mean color, and one decision for all blocks."""
    torch.manual_seed(0)
    model = ViTMoE(FOUR_BLOCKS, 5, "token_choice", num_experts=E, start="plain")
    nn.init.normal_(model.heads.head.weight)
    router = TokenChoice(3, num_experts=E, balance=None)
    x = images().float()
    image_T = torch.arange(len(x)).repeat_interleave(5)
    routing = router(x.mean(dim=(2, 3))).expand(image_T)
    out, used = model(x, routings=[routing, routing], return_routing=True)
    assert used[0] is used[1] is routing
    out.square().sum().backward()
    assert router.gate.weight.grad is not None
    assert router.gate.weight.grad.any()


def shared(**options: Any) -> ViTMoE:
    torch.manual_seed(0)
    options = {"router": "token_choice", "start": "plain"} | options
    model = ViTMoE(FOUR_BLOCKS, 5, num_experts=E, shared_router=True, **options)
    nn.init.normal_(model.heads.head.weight)
    return model.double().eval()


def test_one_router_decides_for_all_layers() -> None:
    model = shared()
    x = images()
    out, routings = model(x, return_routing=True)
    assert len(routings) == 1
    # By hand: the tokens that enter the first block, and the decision given to both layers.
    patches = model.conv_proj(x).flatten(2).transpose(1, 2)
    tokens = torch.cat([model.class_token.expand(3, -1, -1), patches], dim=1)
    tokens = tokens + model.encoder.pos_embedding
    router: Any = model.shared_router
    weight_TE = router(tokens).to_dense()
    torch.testing.assert_close(routings[0].to_dense(), weight_TE)
    layers = [layer for layer in model.modules() if isinstance(layer, MoE)]
    found: list[gmoe.Routing] = []
    for layer in layers:
        layer.register_forward_hook(
            lambda _, __, kwargs, ___: found.append(kwargs["routing"]), with_kwargs=True
        )
    torch.testing.assert_close(model(x, routings=routings), out)
    assert found == [routings[0], routings[0]]
    out.square().sum().backward()
    assert router.gate.weight.grad.any()
    with pytest.raises(ValueError, match="routings: got 2, expected a list of 1 Routings, one a"):
        model(x, routings=routings * 2)
    with pytest.raises(ValueError, match=r"routing: got None, expected a Routing"):
        layers[0](tokens)


@pytest.mark.parametrize("start", ["copies", "shared"])
def test_with_a_shared_router_a_new_model_is_the_dense_one(start: Any) -> None:
    model = shared(start=start)
    torch.manual_seed(0)
    dense = ViTMoE(FOUR_BLOCKS, 5, None)
    nn.init.normal_(dense.heads.head.weight)
    x = images()
    torch.testing.assert_close(model(x), dense.double().eval()(x), rtol=0, atol=1e-10)


def test_a_shared_router_is_saved_and_pruned(tmp_path: Any) -> None:
    model = shared()
    x = images()
    expected = model(x)
    gmoe.save(model, tmp_path)
    loaded: Any = gmoe.load(tmp_path)
    assert not any(layer.router for layer in loaded.modules() if isinstance(layer, MoE))
    torch.testing.assert_close(loaded.double().eval()(x), expected)
    kept = pruned_on(loaded, x)
    assert len(kept) == 2
    assert len({*kept.values()}) == 1
    torch.testing.assert_close(loaded(x), expected)
