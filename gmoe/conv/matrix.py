"""Sums along edges as matrices: a sum, a mean, GCN's norms, and their products with features.

Shapes: N_src sources, N_dst destinations, N both where they are one set of nodes, M edges, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gmoe.edges import Edges
from gmoe.sums import weighted_sum


class ScaleOf(Protocol):
    """Gives GCN's factors of the nodes of a part, by their degrees in the whole graph."""

    def __call__(self, *, improved: bool, loops: bool, dtype: torch.dtype) -> Tensor:
        """(N,) the factors; see :meth:`Graph.normalized` for the options."""


@dataclass(eq=False)
class Matrix:
    """The A of a sum A x over in-edges.

    Args:
        edges: which of its entries are not zero.
        weight: (M,) these entries.
        diagonal: (N_dst,) further entries, for loops that are not among the edges; the destinations
            are then the first of the sources.
        scale: (N,) the factors of rows and columns that normalized it, if it is normalized.
        learns: whether it follows from weights that need a gradient, also under ``no_grad``.
    """

    edges: Edges
    weight: Tensor
    diagonal: Tensor | None = None
    scale: Tensor | None = None
    learns: bool = False

    def times(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N_dst, D) A x, in the type of ``x``.

        Args:
            x: (N_src, D) features.
            mask: (M,) factors on the messages, in the order of the edges as given.
        """
        weight = self.weight
        if mask is not None:
            weight = weight * mask.index_select(0, self.edges.order)
        y = weighted_sum(weight[:, None], x[:, None], self.edges)
        if self.diagonal is not None:
            loop_source = x[: self.edges.num_receivers, None]
            y.addcmul_(self.diagonal[:, None, None], loop_source)
        return y.squeeze(1).to(x.dtype)


def sum_matrix(edges: Edges, factor: Tensor | None, *, mean: bool, dtype: torch.dtype) -> Matrix:
    """The matrix of a sum over in-edges, or of a mean.

    Args:
        edges: the edges.
        factor: (M,) factors of the messages, in the order of the edges as given; rows of several
            numbers are features, not factors.
        mean: divide by the number of in-edges.
        dtype: least dtype of the entries; they have at least float32.
    """
    exact = torch.promote_types(dtype, torch.float32)
    if mean:
        share_R = edges.degree.to(exact).reciprocal()
        weight = share_R.index_select(0, edges.receiver)
    else:
        weight = torch.ones_like(edges.sender, dtype=exact)
    if factor is not None and factor.dim() == 1:
        weight = weight * factor.index_select(0, edges.order)
    return Matrix(edges, weight, learns=_learns(factor))


def normalized_matrix(
    edges: Edges,
    factor: Tensor | None,
    *,
    loop_weight: float | None,
    replace_loops: bool,
    keep_loop_weights: bool,
    scale: Tensor | None,
    dtype: torch.dtype,
) -> Matrix:
    r"""The matrix :math:`D^{-1/2} (A + I) D^{-1/2}` of PyG's ``GCNConv``.

    The loops of the I are not among its edges, but in its diagonal.

    Args:
        edges: the edges of A.
        factor: (M,) their weights, in the order of the edges as given; ``None`` for ones.
        loop_weight: the entries of I; ``None`` to leave I out.
        replace_loops: I takes the place of the loops in A, and is not added to them.
        keep_loop_weights: a loop that is replaced keeps its weight, if there is a ``factor``.
        scale: (N,) the diagonal of :math:`D^{-1/2}`, where the edges do not tell the degrees.
        dtype: least dtype of the entries; they have at least float32.
    """
    weight, diagonal = entries(
        edges,
        factor,
        loop_weight=loop_weight,
        replace_loops=replace_loops,
        keep_loop_weights=keep_loop_weights,
        dtype=dtype,
    )
    scale = inverse_root(edges, weight, diagonal) if scale is None else scale.to(weight.device)
    weight = scale.index_select(0, edges.receiver) * weight
    weight = weight * scale.index_select(0, edges.sender)
    scaled = None if loop_weight is None else scale[: edges.num_receivers].square() * diagonal
    return Matrix(edges, weight, scaled, scale, _learns(factor))


def entries(
    edges: Edges,
    factor: Tensor | None,
    *,
    loop_weight: float | None,
    replace_loops: bool,
    keep_loop_weights: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(M,) the entries of A, and (N_dst,) those of I; see :func:`normalized_matrix`."""
    num_dst = edges.num_receivers
    # 1. A: the weights of the edges.
    weight = torch.ones_like(edges.sender, dtype=torch.promote_types(dtype, torch.float32))
    if factor is not None:
        weight = weight * factor.index_select(0, edges.order)

    # 2. I: the weights of the loops.
    diagonal = weight.new_full((num_dst,), 0.0 if loop_weight is None else loop_weight)
    if loop_weight is not None and replace_loops:
        is_loop = edges.sender == edges.receiver
        if factor is not None and keep_loop_weights:
            # Of several loops at a node, the last one's weight counts. How many loops there are
            # depends on the data: all other edges write to a row that is cut off.
            row = torch.where(is_loop, edges.receiver, num_dst)
            padded = torch.cat([diagonal, diagonal[:1]])
            diagonal = padded.scatter(0, row, weight)[:-1]
        weight = torch.where(is_loop, 0.0, weight)
    return weight, diagonal


def inverse_root(edges: Edges, weight: Tensor, diagonal: Tensor) -> Tensor:
    r"""(N_dst,) the diagonal of :math:`D^{-1/2}`, zero where the degree is zero.

    Args:
        edges: the edges of A.
        weight, diagonal: see :func:`entries`.
    """
    degree = diagonal.index_add(0, edges.receiver, weight)
    # The power of zero has an infinite slope, which a second gradient would multiply by zero.
    is_zero = degree == 0
    return degree.masked_fill(is_zero, 1.0).pow(-0.5).masked_fill(is_zero, 0.0)


def _learns(factor: Tensor | None) -> bool:
    """Whether the weights of the edges need a gradient."""
    return factor is not None and factor.requires_grad
