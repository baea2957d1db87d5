"""A ViT's decisions for each image, by the caller's router."""

from __future__ import annotations

import torch
from torch import nn

from gmoe import TokenChoice, ViTMoE
from tests.helpers.vits import SMALL_VIT, images


def test_a_decision_may_come_from_features_of_the_users() -> None:
    """A view of the images, such as their mean color, and one decision for all blocks."""
    torch.manual_seed(0)
    model = ViTMoE(SMALL_VIT | {"num_layers": 4}, 5, "token_choice", num_experts=4, start="plain")
    nn.init.normal_(model.heads.head.weight)
    router = TokenChoice(3, num_experts=4, balance=None)
    x = images().float()
    image_T = torch.arange(len(x)).repeat_interleave(5)
    routing = router(x.mean(dim=(2, 3))).expand(image_T)
    out, used = model(x, routings=[routing, routing], return_routing=True)
    assert used[0] is used[1] is routing
    out.square().sum().backward()
    assert router.gate.weight.grad is not None
    assert router.gate.weight.grad.any()
