"""Tokens and their pairs, by places: no row is added to another one where that can be avoided.

Adds of floats are atomic on a GPU, in any order; and on a CPU, to add a row takes twice as long as
to fetch it.

Shapes: T tokens, K experts per token, P pairs sorted by expert, I, O features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gmoe._autograd import unbatched
from gmoe.blocks import sum_at
from gmoe.routing import Routing


def uses_places(x: Tensor, routing: Routing) -> bool:
    """True if rows are sent back by their places, not added to their tokens.

    On a GPU, that needs no atomic adds. On a CPU, a sum of several pairs would read all of them
    again; but where each token has one pair, its row takes half of the time of an addition.
    """
    return x.is_cuda or routing.pairs_each == 1


# Both take places, not slots: at K = 1 the slots and the tokens are one tensor, which
# torch.compile refuses to pass twice.


class ToPairs(torch.autograd.Function):
    """(P, I) the token of each pair, given the places of pairs, :attr:`gmoe.Routing.place`."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, token_P: Tensor, place_P: Tensor | None) -> Tensor:
        ctx.save_for_backward(token_P, place_P)
        ctx.num_tokens = x_TI.size(0)
        return x_TI.index_select(0, token_P)

    @staticmethod
    @unbatched
    def backward(ctx: Any, grad_PI: Tensor) -> Any:
        token_P, place_P = ctx.saved_tensors
        return _sum_by_token(grad_PI, token_P, place_P, ctx.num_tokens), None, None


class ToTokens(torch.autograd.Function):
    """(T, O) the sum over each token's pairs, given their places."""

    @staticmethod
    def forward(
        ctx: Any, y_PO: Tensor, token_P: Tensor, place_P: Tensor | None, num_tokens: int
    ) -> Tensor:
        ctx.save_for_backward(token_P)
        return _sum_by_token(y_PO, token_P, place_P, num_tokens)

    @staticmethod
    @unbatched
    def backward(ctx: Any, grad_TO: Tensor) -> Any:
        (token_P,) = ctx.saved_tensors
        return grad_TO.index_select(0, token_P), None, None, None


def _sum_by_token(y_PO: Tensor, token_P: Tensor, place_P: Tensor | None, num_tokens: int) -> Tensor:
    """(T, O) sums over each token's pairs, in a fixed order."""
    if place_P is None or not num_tokens:
        return sum_at(token_P, y_PO, num_tokens)
    rows_PO = y_PO.index_select(0, place_P)
    if place_P.size(0) == num_tokens:
        return rows_PO
    return rows_PO.unflatten(0, (num_tokens, place_P.size(0) // num_tokens)).sum(dim=1)
