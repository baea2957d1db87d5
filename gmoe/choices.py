"""Each token's K experts, and what a routing makes of them when it is asked.

Shapes: T tokens, E experts, K experts per token, P (token, expert) pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gmoe._autograd import unbatched
from gmoe._checks import INTEGERS, check_range, described, readable
from gmoe.blocks import AtPlaces, search, stable_sort

SHORT = 16
"""On a CPU, :func:`over_experts` of fewer experts works on the transpose.

torch's kernel takes rows that are shorter than its vectors one number at a time. Measured with 2 to
8 experts, forward and backward: 0.25 to 0.5 of the time for 2,708 tokens and more; for 30 tokens
10 us more.
"""

LATE = ("token", "offsets", "weight", "scores", "slot")
"""What a routing of choices computes when it is asked for."""


class Choices(NamedTuple):
    """What :meth:`Routing.from_choices` was given; the rest of a routing follows when it is asked.

    Where all experts run on all tokens, no pair has to be sorted.
    """

    expert_TK: Tensor
    weight_TK: Tensor
    num_experts: int
    logits_TE: Tensor | None = None

    def pairs(self) -> dict[str, Tensor]:
        """The pairs by the names that a routing has for them, sorted by expert.

        The sort is stable: an expert's tokens ascend.
        """
        k = self.expert_TK.size(1)
        expert_P, slot_P = stable_sort(self.expert_TK.reshape(-1))
        experts_E = torch.arange(self.num_experts, device=expert_P.device)
        return {
            "token": slot_P if k == 1 else slot_P // max(k, 1),
            "offsets": search(expert_P, experts_E, out_int32=True),
            "weight": AtPlaces.apply(self.weight_TK.reshape(-1), slot_P),
            "slot": slot_P,
            "expert": expert_P,
        }

    def scores(self) -> dict[str, Tensor]:
        """The scores: the softmax of the logits, or the weights, 0 where not chosen."""
        if self.logits_TE is not None:
            return {"scores": _Softmax.apply(self.logits_TE)}
        weight_TK = self.weight_TK.detach()
        zero_TE = weight_TK.new_zeros(weight_TK.size(0), self.num_experts)
        return {"scores": zero_TE.scatter(1, self.expert_TK, weight_TK)}


def check_choices(
    expert_TK: Tensor, weight_TK: Tensor, num_experts: int, scores: Tensor | None
) -> None:
    """Refuse what :meth:`Routing.from_choices` cannot take; values only where they are readable."""
    is_matrix = isinstance(expert_TK, Tensor) and expert_TK.dim() == 2
    if not is_matrix or expert_TK.dtype not in INTEGERS:
        raise ValueError(f"expert_TK: got {described(expert_TK)}, expected (T, K) integers")
    is_floats = isinstance(weight_TK, Tensor) and weight_TK.is_floating_point()
    if not is_floats or weight_TK.shape != expert_TK.shape:
        shape = tuple(expert_TK.shape)
        raise ValueError(f"weight_TK: got {described(weight_TK)}, expected floats of {shape}")
    check_range("expert_TK", expert_TK, num_experts)
    shape = (expert_TK.size(0), num_experts)
    if scores is not None and scores.shape != shape:
        raise ValueError(f"scores: got {described(scores)}, expected a tensor of {shape}")
    if readable(expert_TK):
        ascending_TK = expert_TK.sort(dim=1).values
        is_doubled_T = (ascending_TK.diff(dim=1) == 0).any(dim=1)
        if is_doubled_T.any():
            doubled = expert_TK[is_doubled_T][0].tolist()
            raise ValueError(f"expert_TK: got a row {doubled}, expected distinct experts in a row")


@contextmanager
def to_keep() -> Iterator[None]:
    """Compute what a routing keeps for training, too: whoever asks first may need no gradient."""
    # Compiled code may not ask for the mode.
    leaves = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    with torch.inference_mode(False) if leaves else nullcontext(), torch.enable_grad():
        yield


def over_experts(function: Callable[..., Tensor], logits_TE: Tensor) -> Tensor:
    """(T, E) ``torch.softmax`` or ``torch.log_softmax`` over each token's experts.

    On a CPU with few experts it works on the transpose, so that its gradient lies in columns.
    """
    if logits_TE.device.type == "cpu" and logits_TE.size(1) < SHORT:
        return function(logits_TE.T, dim=0).T
    return function(logits_TE, dim=-1)


class _Softmax(torch.autograd.Function):
    """The softmax over experts; saves no tensor, as :class:`gmoe.blocks.AtPlaces`."""

    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor) -> Tensor:
        ctx.logits_TE = logits_TE
        return over_experts(torch.softmax, logits_TE)

    @staticmethod
    @unbatched
    def backward(ctx: Any, grad_TE: Tensor) -> Any:
        share_TE = over_experts(torch.softmax, ctx.logits_TE)
        return share_TE * (grad_TE - (grad_TE * share_TE).sum(dim=-1, keepdim=True))
