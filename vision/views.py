"""A ViT that is given a low-level view of each image, or its domain: to its router, or as a token.

Shapes: B images, H x W pixels, T tokens of width D, V numbers of a view, E experts, K of a token.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gmoe
from gmoe._checks import check
from gmoe.start import build_layer_router, resolved_start

ExtraInput: TypeAlias = Literal["view", "domain"]
VIEW = 4
"""V: the numbers of a view."""


def view_of(images: Tensor) -> Tensor:
    """(B, V) of images (B, C, H, W): the mean of each channel, and the edge energy.

    That is the mean absolute difference of neighbors in a row and in a column. Gray images have
    three times the same mean.
    """
    color = images.mean(dim=(2, 3)).expand(-1, VIEW - 1)
    across = (images[..., 1:] - images[..., :-1]).abs().mean(dim=(1, 2, 3))
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().mean(dim=(1, 2, 3))
    return torch.cat([color, (across + down)[:, None] / 2], dim=1)


class Standardized(nn.BatchNorm1d):
    """(B, V) views by the statistics of a batch; of one image and in evaluation, their averages.

    Without it, the edge energy, which is never negative, would send most images to one expert.
    """

    def __init__(self) -> None:
        super().__init__(VIEW, affine=False)

    def forward(self, view_BV: Tensor) -> Tensor:
        """The views, each number with mean 0 and variance 1."""
        if len(view_BV) > 1:
            return super().forward(view_BV)
        return F.batch_norm(view_BV, self.running_mean, self.running_var, eps=self.eps)


class ViewViT(gmoe.ViTMoE):
    """A ``ViTMoE`` that is given more than the patches.

    Args:
        size, num_classes, router: as in :class:`gmoe.ViTMoE`.
        by_view: one router sees the view of an image, and decides for all of its tokens in all
            blocks; else each block's router sees its tokens, as ever.
        extra_input: a further token before the patches, made of the ``"view"`` or of the
            ``"domain"`` (default ``None``: there is none). What a router by view gives to experts,
            this gives to a dense model.
        num_domains: of the data.
        options: further ones of :class:`gmoe.ViTMoE`.

    Shapes:
        - ``images``: (B, C, H, W); ``domain_B``: (B,) int64, only with ``extra_input="domain"``;
          without it, the domains that :func:`vision.told_domain.tell_domains` told last.
        - returns logits, (B, num_classes).

    Raises:
        ValueError: ``by_view`` without a router, or with one in which experts choose; a domain that
            is missing or not wanted.
    """

    domain_B: Tensor | None = None

    def __init__(
        self,
        size: Any,
        num_classes: int,
        router: Any,
        *,
        by_view: bool = False,
        extra_input: ExtraInput | None = None,
        num_domains: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(size, num_classes, router, **options)
        check(router is not None or not by_view, "router", router, "one, to decide by the view")
        self.by_view = by_view
        self.standardized = Standardized()
        self.extra_input = extra_input
        if extra_input == "domain":
            check(num_domains, "extra_input", "'domain' without domains", "data of several domains")
            self.embedding: nn.Module = nn.Embedding(num_domains, self.hidden_dim)
        elif extra_input == "view":
            self.embedding = nn.Linear(VIEW, self.hidden_dim)
        self.given: Tensor | None = None
        if extra_input is not None:
            self.encoder.dropout.register_forward_hook(self._add_token)
        if by_view:
            layers = [layer for layer in self.modules() if isinstance(layer, gmoe.MoE)]
            self.num_layers = len(layers)
            for layer in layers:
                del layer.router
                layer.register_module("router", None)
            self.view_router = build_layer_router(
                resolved_start(options.get("start")),
                router,
                VIEW,
                layers[0].num_experts,
                layers[0].k,
                options.get("router_kwargs"),
            )
            self.view_router.refuse_competition("view")

    def _add_token(self, dropout: nn.Module, _: Any, tokens: Tensor) -> Tensor:
        """Put the token behind the class token of (B, T, D) tokens, and before the patches."""
        assert self.given is not None
        return torch.cat([tokens[:, :1], self.given[:, None], tokens[:, 1:]], dim=1)

    def forward(self, images: Tensor, domain_B: Tensor | None = None, **kwargs: Any) -> Any:
        """Logits of the images; see the class."""
        domain_B = self.domain_B if domain_B is None else domain_B
        got = "no domain" if domain_B is None else "domains"
        legal = "the domain of each image" if self.extra_input == "domain" else "none"
        check((domain_B is None) == (self.extra_input != "domain"), "domain_B", got, legal)
        view_BV = self.standardized(view_of(images))
        if self.extra_input is not None:
            self.given = self.embedding(view_BV if domain_B is None else domain_B)
        if self.by_view:
            kwargs["routings"] = [self._routing(view_BV)] * self.num_layers
        return super().forward(images, **kwargs)

    def _routing(self, view_BV: Tensor) -> gmoe.Routing:
        """The decision for each image, for all of its tokens."""
        tokens = self.encoder.pos_embedding.size(1) + (self.extra_input is not None)
        image_B = torch.arange(len(view_BV), device=view_BV.device)
        image_T = image_B.repeat_interleave(tokens)
        routing: gmoe.Routing = self.view_router(view_BV, image_B, members=image_T)
        return routing
