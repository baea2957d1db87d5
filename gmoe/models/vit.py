"""ViTMoE: torchvision's VisionTransformer with experts.

Shapes: B images, H x W pixels, T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from torchvision.models import VisionTransformer

from gmoe._checks import check, check_counts
from gmoe.convert import moefy
from gmoe.experts import LinearExperts
from gmoe.moe import MoE, checked_routings
from gmoe.recorded import Recorded, given_to
from gmoe.recording import record_routing
from gmoe.routers import ROUTERS, RouterLike
from gmoe.routing import Routing
from gmoe.saved import Pretrained
from gmoe.start import Start, drawn_apart, resolved_start

NAMES = ("image_size", "patch_size", "num_layers", "num_heads", "hidden_dim", "mlp_dim")
"""What torchvision calls the sizes of a ViT."""

SIZES: dict[int, dict[str, int]] = {
    sizes[0]: dict(zip(NAMES, sizes, strict=True))
    for sizes in ((8, 2, 4, 4, 48, 96), (32, 4, 6, 4, 128, 256), (160, 16, 6, 4, 192, 384))
}
"""Sizes by image size: handwritten digits (8x8), CIFAR (32x32), Imagenette (160x160)."""


class ViTMoE(Pretrained, VisionTransformer):
    r"""torchvision's ViT (Dosovitskiy et al., 2021) with a MoE in the MLP of every n-th block.

    The tokens of one image, the class token included, form a group: they compete for experts only
    among themselves.

    Args:
        size: an image size with defaults, 8, 32 or 160; or a dictionary of torchvision's
            ``image_size``, ``patch_size``, ``num_layers``, ``num_heads``, ``hidden_dim`` and
            ``mlp_dim``, the hidden width of the MLPs and of each expert.
        num_classes: default 10.
        router: a name or factory (default ``"expert_choice"``); ``None`` leaves the dense ViT, the
            baseline.
        num_experts: E (default 8).
        k: K, experts per token (default 1).
        every: block ``i`` is MoE if ``i % every == every - 1`` (default 2).
        start: how the experts start; see :func:`moefy`. ``"shared"`` (default, ``None``): the dense
            MLP runs on every token, and what the routed experts add starts at zero. ``"copies"``:
            all experts start as copies of the dense MLP. ``"plain"``: independent experts. With the
            first two, the outputs of a new model equal those of the dense one (``router=None``)
            with the same seed.
        dropout: of the dense ViT and the experts (default 0).
        router_kwargs: further arguments of the routers.

    Shapes:
        - ``images``: (B, 3, H, W), or (B, 1, H, W) gray ones, H = W = ``image_size``.
        - returns (B, num_classes), and the list of :class:`gmoe.Routing` with
          ``return_routing=True`` (one per MoE layer), empty if dense.
        - ``routings``: such a list, of an earlier call on as many images; no router is asked.

    Raises:
        ValueError: an image size without a preset, a size below 1 or one that another does not
            divide, or images of another shape.

    Example:
        >>> logits, routings = ViTMoE(32, router="expert_choice")(images, return_routing=True)
        >>> loss = F.cross_entropy(logits, labels) + gmoe.aux_loss(routings)
    """

    def __init__(
        self,
        size: Mapping[str, int] | int,
        num_classes: int = 10,
        router: RouterLike | None = "expert_choice",
        *,
        num_experts: int = 8,
        k: int = 1,
        every: int = 2,
        start: Start | None = None,
        dropout: float = 0.0,
        router_kwargs: Mapping[str, object] | None = None,
    ) -> None:
        start = resolved_start(start)
        sizes = dict(size) if isinstance(size, Mapping) else SIZES.get(size, {})
        legal = f"one of {[*SIZES]}, or a dictionary of {', '.join(NAMES)}"
        check({*sizes} == {*NAMES}, "size", repr(size), legal)
        check_counts(num_classes=num_classes, **sizes)
        for whole, part in (("image_size", "patch_size"), ("hidden_dim", "num_heads")):
            legal = f"a multiple of {part}={sizes[part]}"
            check(sizes[whole] % sizes[part] == 0, whole, sizes[whole], legal)
        super().__init__(**sizes, num_classes=num_classes, dropout=dropout)
        self.recorded = Recorded.of(given_to(ViTMoE, locals()), ROUTERS)
        if router is None:
            return
        with drawn_apart(start != "plain"):
            moefy(
                self,
                every=every,
                k=k,
                router=router,
                num_experts=num_experts,
                start=start,
                router_kwargs=router_kwargs,
            )
            if start != "copies":
                self._init_experts()
        for layer in self._layers():
            layer.moefied = None  # a file has the arguments of this constructor

    def _layers(self) -> list[MoE]:
        """The layers with experts, in order."""
        return [layer for layer in self.modules() if isinstance(layer, MoE)]

    def _init_experts(self) -> None:
        """Draw the experts as torchvision draws the MLPs of the dense model."""
        for module in self.modules():
            if not isinstance(module, LinearExperts):
                continue
            if module.bias is not None and not module.zero_init:
                for weight in module.weight:
                    nn.init.xavier_uniform_(weight)
                nn.init.normal_(module.bias, std=1e-6)

    def forward(
        self,
        images: Tensor,
        *,
        routings: Sequence[Routing] | None = None,
        return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, list[Routing]]:
        """Logits of the images; see the class."""
        side = self.image_size
        if images.dim() != 4 or images.size(1) not in (1, 3) or images.shape[2:] != (side, side):
            raise ValueError(
                f"images: got shape {tuple(images.shape)}, expected (B, 3 or 1, {side}, {side})"
            )
        layers = self._layers()
        recording: AbstractContextManager[list[Routing]] = nullcontext([])
        if routings is not None:
            recording = _giving(layers, checked_routings(routings, len(layers), "layer"))
        elif return_routing and layers:
            recording = record_routing(self.encoder)
        with recording as used:
            logits: Tensor = super().forward(images.expand(-1, 3, -1, -1))  # gray becomes RGB
        return (logits, used) if return_routing else logits


@contextmanager
def _giving(layers: Sequence[MoE], routings: list[Routing]) -> Iterator[list[Routing]]:
    """Give each layer its routing in calls of this thread, which torchvision's blocks cannot."""
    thread = threading.get_ident()

    def give(routing: Routing, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        is_asked = threading.get_ident() == thread
        return (args, {**kwargs, "routing": routing}) if is_asked else None

    with ExitStack() as stack:
        for layer, routing in zip(layers, routings, strict=True):
            hook = layer.register_forward_pre_hook(partial(give, routing), with_kwargs=True)
            stack.callback(hook.remove)
        yield routings
