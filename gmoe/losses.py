"""Auxiliary losses of routers: what they are, and how they get into what is trained.

Shapes: T tokens, E experts, K experts per token, M centroids per expert, N centroids of all
experts, D width.

All losses are computed over all tokens of the call, and are 0 if there are none. Under
``torch.distributed``, routers use the same formulas on sums over the tokens of all processes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gmoe._checks import check, check_module, check_positive
from gmoe._torch import in_backward
from gmoe.routing import AuxLoss, Routing


def switch_loss(importance_E: Tensor, load_E: Tensor, num_tokens: Tensor) -> Tensor:
    """``E * sum_e f_e P_e`` (Fedus et al., 2021).

    f is the share of the pairs (it sums to 1), P the mean probability. The loss is 1 if both are
    uniform, and E if one expert gets everything.

    Args:
        importance_E: sums of the probabilities over the tokens.
        load_E: the pairs of each expert.
        num_tokens: (), T.
    """
    share_E = load_E.to(importance_E.dtype) / load_E.sum().clamp(min=1)
    return load_E.size(0) * (share_E * importance_E).sum() / num_tokens.clamp(min=1)


def separation_loss(unit_EMD: Tensor) -> Tensor:
    """Similarity of the centroids: the mean of ``max(0, cos)^2`` within experts, plus that across.

    It is 0 if no two centroids have a positive cosine, and 2 if all are the same. Either mean is 0
    if it has no pairs.

    Args:
        unit_EMD: the centroids, divided by their norms.
    """
    num_experts, num_centroids, _ = unit_EMD.shape
    unit_ND = unit_EMD.flatten(0, 1)
    overlap_NN = (unit_ND @ unit_ND.T).clamp(min=0).square()
    owner_N = torch.arange(num_experts, device=unit_ND.device).repeat_interleave(num_centroids)
    across_NN = owner_N[:, None] != owner_N
    within_NN = (~across_NN).fill_diagonal_(False)  # without a centroid's cosine with itself
    pairs_within = num_experts * num_centroids * (num_centroids - 1)
    pairs_across = num_experts * (num_experts - 1) * num_centroids**2
    within = (overlap_NN * within_NN).sum() / max(pairs_within, 1)
    across = (overlap_NN * across_NN).sum() / max(pairs_across, 1)
    return within + across


# in any trainer -----------------------------------------------------------------------------------


def attach_aux_loss(model: nn.Module, scale: float | Callable[[], float] = 1.0) -> AttachedLosses:
    """Train the auxiliary losses of a model's routers in any trainer, without a line in its loop.

    In training, each backward pass of the model's own loss gives the losses their gradient, too,
    as in Megatron and torchtitan. The loss that the trainer logs stays the model's own. Losses in a
    :class:`gmoe.Routing` then have values and no gradient: adding :func:`gmoe.aux_loss` on top
    changes nothing. Each forward in training needs one backward pass; those with
    ``create_graph=True``, as of forces or a gradient penalty, come before it and add nothing. A
    copy of the model that was made before is not attached, one that is made later is.

    Args:
        model: any model that holds routers; attach before it is compiled or wrapped.
        scale: what the trainer multiplies the loss by before its backward pass: one over
            the batches whose gradients it accumulates (default 1), times the scale of a
            ``GradScaler``. A function is asked in each backward pass.

    Returns:
        A handle: ``scale`` may be set anew, ``remove()`` detaches.

    Raises:
        ValueError: no router in the model; a scale that is not positive; in a forward under
            autocast to float16, whose gradients a ``GradScaler`` multiplies, a number as scale.

    Example:
        >>> gmoe.attach_aux_loss(model, scale=1 / arguments.gradient_accumulation_steps)
        >>> Trainer(model=model, args=arguments, train_dataset=images).train()
    """
    check_module("model", model)
    if not callable(scale):
        check_positive("scale", scale)
    routers = [module for module in model.modules() if hasattr(type(module), "route")]
    check(routers, "model", f"{type(model).__name__} without a router", "at least one")
    attached = AttachedLosses(scale)
    attached.handles = [router.register_forward_hook(attached) for router in routers]
    return attached


class AttachedLosses:
    """What :func:`attach_aux_loss` returns."""

    def __init__(self, scale: float | Callable[[], float]) -> None:
        self.scale = scale
        self.handles: list[Any] = []

    def __call__(self, router: nn.Module, _: Any, routing: Routing) -> Routing | None:
        """Hang the losses on the weights, after a router's forward."""
        if not (isinstance(routing, Routing) and routing.losses and router.training):
            return None
        device = routing.weight.device.type
        is_scaled = torch.is_autocast_enabled(device) and not callable(self.scale)
        if is_scaled and torch.get_autocast_dtype(device) == torch.float16:
            raise ValueError(
                f"scale: got {self.scale} under autocast to float16, expected a function that "
                "gives the scale of the GradScaler, over the number of accumulated batches"
            )
        weight, loss = routing.weight, routing.aux_loss
        if loss.requires_grad:
            weight = _WithLoss.apply(weight, loss, self)
        losses = {
            name: AuxLoss(value.detach(), coefficient)
            for name, (value, coefficient) in routing.losses.items()
        }
        return replace(routing, weight=weight, losses=losses, detached=False, validate=False)

    def remove(self) -> None:
        """Detach the losses."""
        for handle in self.handles:
            handle.remove()


class _WithLoss(torch.autograd.Function):
    """The weights as they are. Their backward pass is also that of a loss, times a scale.

    A pass that is differentiated itself, as of forces or a gradient penalty, is not the training
    step's: the loss is not added there.
    """

    @staticmethod
    def forward(ctx: Any, weight_P: Tensor, loss: Tensor, attached: AttachedLosses) -> Tensor:
        ctx.attached, ctx.device, ctx.dtype = attached, loss.device, loss.dtype
        return weight_P.view_as(weight_P)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            return grads[0], None, None
        scale = ctx.attached.scale
        value = float(scale() if callable(scale) else scale)
        return grads[0], torch.full((), value, device=ctx.device, dtype=ctx.dtype), None


class LossWatch:
    """Warns once if the losses of a router train nothing, since nobody adds them.

    Attributes:
        passed: what the gradient of the last step went through, ``"weights"`` and ``"losses"``;
            ``None`` if there are no losses to watch.
    """

    def __init__(self) -> None:
        self.passed: set[str] | None = None
        self.has_warned = False

    def follow(self, routing: Routing) -> None:
        """Judge the step before, and watch the gradients of this one."""
        if self.has_warned:
            return
        if not in_backward():  # there, checkpointing runs the forward of the same step again
            if self.passed == {"weights"}:
                self._warn(routing)
            self.passed = None
        losses = [
            loss.value
            for loss in routing.losses.values()
            if loss.value.requires_grad and loss.coefficient != 0
        ]
        if self.passed is not None or not losses or not routing.weight.requires_grad:
            return
        if routing.num_experts == 1:  # nothing to balance
            return
        passed = self.passed = set()
        routing.weight.register_hook(lambda _: passed.add("weights"))
        for loss in losses:
            loss.register_hook(lambda _: passed.add("losses"))

    def _warn(self, routing: Routing) -> None:
        self.has_warned = True
        warnings.warn(
            f"aux_loss: got losses of routers ({', '.join(routing.losses)}) that the last training "
            "step did not train, expected loss + gmoe.aux_loss(routings), or "
            "gmoe.attach_aux_loss(model) once, before training",
            stacklevel=3,
        )
