"""A ViT whose experts are those of the images' domains: the oracle of images of several domains.

T tokens, B images.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import gmoe
from gmoe._checks import check


class DomainRouter(gmoe.Router):
    """All tokens of an image, the class token too, to the expert of its domain, with weight 1.

    The domains of the next call are given to :func:`tell_domains`, since the blocks of
    torchvision's ViT hand on nothing but tokens.
    """

    sums_to_one = True
    domain_B: Tensor | None = None

    def reset_parameters(self) -> None:
        """Nothing to draw."""

    def route(self, x_TD: Tensor, group: Tensor | int, edge_index: Tensor | None) -> gmoe.Routing:
        told = 0 if self.domain_B is None else len(self.domain_B)
        is_whole = told > 0 and len(x_TD) % told == 0
        check(is_whole, "domain", f"those of {told} images for {len(x_TD)} tokens", "one an image")
        assert self.domain_B is not None
        expert_T1 = self.domain_B.repeat_interleave(len(x_TD) // told)[:, None]
        weight_T1 = torch.ones_like(expert_T1, dtype=x_TD.dtype)
        return gmoe.Routing.from_choices(expert_T1, weight_T1, num_experts=self.num_experts)


def tell_domains(model: nn.Module, domain_B: Tensor | None) -> None:
    """Tell a model and its routers, if they need it, the domains of the images of the next call."""
    parts: list[Any] = list(model.modules())
    for module in parts:
        if isinstance(module, DomainRouter):
            module.domain_B = domain_B


class DomainViT(gmoe.ViTMoE):
    """A ``ViTMoE`` of :class:`DomainRouter`, called with images and their domains.

    Without domains, those that it was told last count.
    """

    def forward(self, images: Tensor, domain_B: Tensor | None = None, **kwargs: Any) -> Any:
        """Logits of the images."""
        if domain_B is not None:
            tell_domains(self, domain_B)
        return super().forward(images, **kwargs)
