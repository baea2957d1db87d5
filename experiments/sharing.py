"""What copies of one layer may have in common while they train, and a router to compare with.

Parts of a study, not of the library. Shapes: E experts, T tokens, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import gmoe
from experiments.config import Sharing
from gmoe.routers.base import Weighting

POOLED = {"pooled": 1.0, "pooled-10": 10.0}
"""The factor of the sum of all experts' gradients, beside an expert's own."""

TIED = {"tied-quarter": 0.25, "tied-half": 0.5}
"""The share of all steps for which the copies stay equal."""

GAIN = 0.1
"""Where the learned gain of ``difference-gain`` starts."""

RANK = 4
"""Of the differences between matrices in ``difference-rank``."""

DECAY = 1e-2
"""The weight decay (in the gradient) of the differences in ``difference-decay``."""


def stacked_parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """The (E, ...) parameters of a model's experts, each with the module that holds it and its name there."""
    for layer in list(model.modules()):
        if isinstance(layer, gmoe.MoELayer):
            experts = layer.get_submodule("experts")
            for module in list(experts.modules()):
                for name, parameter in list(module.named_parameters(recurse=False)):
                    yield module, name, parameter


def share_among_copies(model: nn.Module, sharing: Sharing) -> None:
    """Let the experts of all layers, which are copies of one, learn from each other's tokens.

    ``pooled``: an expert's gradient is its own plus the sum of all experts' (``pooled-10``: ten
    times the sum). ``difference``: its weights are a base, which the tokens of all experts train,
    and a difference that starts at zero. Under plain gradient descent these two are the same; under
    Adam they are not. Three more hold the differences back: by a learned gain, by a low rank, by
    weight decay on them alone. ``tied`` changes nothing here: the training loop calls
    :func:`tie_copies` for the first part of the steps.
    """
    if sharing in TIED:
        return
    for module, name, parameter in stacked_parameters(model):
        if sharing in POOLED:
            parameter.register_hook(Pooling(POOLED[sharing]))
            continue
        base = parameter.detach()[:1].clone()
        with torch.no_grad():
            parameter.zero_()
        if sharing == "difference-decay":
            parameter.register_hook(Decay(parameter))
        held_back = FORMS.get(sharing, FromBase)
        parametrize.register_parametrization(module, name, held_back(base, parameter), unsafe=True)


def tie_copies(model: nn.Module) -> None:
    """Give all experts of a layer the sum of their gradients, so that they stay equal.

    The model trains like the dense one until this is no longer called: what is sparse upcycling
    (Komatsuzaki et al., 2023) within one run.
    """
    for _, _, parameter in stacked_parameters(model):
        if parameter.grad is not None:
            parameter.grad.copy_(parameter.grad.sum(dim=0, keepdim=True).expand_as(parameter))


class Pooling:
    """A hook: each expert's gradient, and the sum of all times a factor."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, gradient: Tensor) -> Tensor:
        return gradient + self.factor * gradient.sum(dim=0, keepdim=True)


class Decay:
    """A hook: the gradient of a parameter with weight decay of its own."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter

    def __call__(self, gradient: Tensor) -> Tensor:
        return gradient + DECAY * self.parameter.detach()


class FromBase(nn.Module):
    """(E, ...) weights as a base (1, ...) and differences (E, ...)."""

    def __init__(self, base: Tensor, _difference: Tensor) -> None:
        super().__init__()
        self.base = nn.Parameter(base)

    def forward(self, difference: Tensor) -> Tensor:
        return self.base + difference


class FromBaseByGain(FromBase):
    """The same, with a learned gain on the differences."""

    def __init__(self, base: Tensor, difference: Tensor) -> None:
        super().__init__(base, difference)
        self.gain = nn.Parameter(torch.tensor(GAIN, dtype=base.dtype))

    def forward(self, difference: Tensor) -> Tensor:
        return self.base + self.gain * difference


class FromBaseOfLowRank(FromBase):
    """The same, where the difference between matrices (I, O) is a product (I, rank) (rank, O)."""

    def __init__(self, base: Tensor, difference: Tensor) -> None:
        super().__init__(base, difference)
        if difference.dim() == 3:
            # As in LoRA: one factor starts at zero, so that the difference does.
            num_experts, num_inputs, num_outputs = difference.shape
            scale = num_inputs**-0.5
            self.left = nn.Parameter(
                scale * base.new_empty(num_experts, num_inputs, RANK).normal_()
            )
            self.right = nn.Parameter(base.new_zeros(num_experts, RANK, num_outputs))

    def forward(self, difference: Tensor) -> Tensor:
        if difference.dim() != 3:
            return self.base + difference
        # The zeros of the parameter that was there get no gradient.
        return self.base + self.left @ self.right


FORMS: dict[str, type[FromBase]] = {
    "difference-gain": FromBaseByGain,
    "difference-rank": FromBaseOfLowRank,
}


class GumbelChoice(gmoe.TokenChoice):
    """Token choice that draws experts by their probabilities in training, by Gumbel's trick."""

    def __init__(
        self, dim: int, num_experts: int, k: int = 1, *, weight: Weighting | None = None
    ) -> None:
        super().__init__(dim, num_experts, k, weight=weight, noise=False)

    def _top_k(self, ranked_TE: Tensor, log_gate_TE: Tensor) -> tuple[Tensor, Tensor]:
        if self.training:
            ranked_TE = ranked_TE - torch.empty_like(ranked_TE).exponential_().log()
        return super()._top_k(ranked_TE, log_gate_TE)
