"""Cosine similarity of tokens and centroids. Shapes: T tokens, D width, N centroids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gmoe._autograd import first_order

EPS = 1e-12
"""The smallest norm that a token is divided by, as in ``torch.nn.functional.normalize``."""


def cosine(x_TD: Tensor, center_D: Tensor, unit_ND: Tensor) -> Tensor:
    """(T, N) the cosine of ``x - center`` and each centroid; 0 of a token at the center.

    Holds no unit vector a token, forward or backward. Can be differentiated once, by tokens and centroids.

    Args:
        x_TD: tokens.
        center_D: the origin, which gets no gradient.
        unit_ND: centroids of norm 1.
    """
    found: Tensor = _Cosine.apply(x_TD, center_D, unit_ND)
    return found


class _Cosine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, center_D: Tensor, unit_ND: Tensor) -> Tensor:
        centred_TD = x_TD - center_D
        norm_T1 = torch.linalg.vector_norm(centred_TD, dim=-1, keepdim=True).clamp_(min=EPS)
        cosine_TN = (centred_TD @ unit_ND.T).div_(norm_T1)
        ctx.save_for_backward(centred_TD, norm_T1, cosine_TN, unit_ND)
        return cosine_TN

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_TN: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        centred_TD, norm_T1, cosine_TN, unit_ND = ctx.saved_tensors
        grad_x = grad_unit = None
        scaled_TN = grad_TN / norm_T1
        if ctx.needs_input_grad[0]:  # d cos / dx = (unit - cos * x / |x|) / |x|
            along_T1 = (scaled_TN * cosine_TN).sum(dim=-1, keepdim=True).div_(norm_T1)
            grad_x = (scaled_TN @ unit_ND).addcmul_(centred_TD, along_T1, value=-1.0)
        if ctx.needs_input_grad[2]:
            grad_unit = scaled_TN.T @ centred_TD
        return grad_x, None, grad_unit
