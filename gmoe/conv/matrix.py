"""Sums along edges as matrices: a sum, a mean, GCN's norms, and their products with features.

Shapes: N_src sources, N_dst destinations, N both where they are one set of nodes, M edges, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gmoe._torch import is_watched
from gmoe.conv.edges import Edges
from gmoe.conv.kept import KeptResult, versions_of
from gmoe.conv.sums import weighted_sum


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
    """

    edges: Edges
    weight: Tensor
    diagonal: Tensor | None = None
    scale: Tensor | None = None
    kept_product: KeptResult[Tensor] | None = None
    """The last product that was kept; see :meth:`times`."""

    def times(self, x: Tensor, mask: Tensor | None = None, *, keep: bool = False) -> Tensor:
        """(N_dst, D) A x, in the type of ``x``.

        Args:
            x: (N_src, D) features.
            mask: (M,) factors on the messages, in the order of the edges as given.
            keep: keep the product, and return it until ``x`` or the product itself changes. It is
                computed all the same if a gradient flows through it (default ``False``).
        """
        weight = self.weight
        if mask is not None:
            weight = weight * mask.index_select(0, self.edges.order)
        can_keep = (
            keep
            and not (x.requires_grad or weight.requires_grad)
            # Compiled code and tensors of inference mode have no versions, by which a change shows.
            and not (torch.compiler.is_compiling() or x.is_inference())
            # Fake tensors have no values, and counters want to see the product.
            and not is_watched()
        )
        if not can_keep:
            if keep:
                # Optimizers may write to what they train without a trace in its version.
                self.kept_product = None
            return self._times(weight, x)

        kept = self.kept_product
        if kept is not None and kept.is_fresh((x, kept.result)):
            return kept.result
        # What is kept is for training too, whatever the mode of the first call.
        with torch.inference_mode(False):
            y = self._times(weight, x)
        # The result is a source, too: a caller may have written to it.
        self.kept_product = KeptResult((x, y), versions_of((x, y)), y)
        return y

    def _times(self, weight: Tensor, x: Tensor) -> Tensor:
        """(N_dst, D) the product, with these entries in place of the matrix's own."""
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
    return Matrix(edges, weight)


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

    # 3. D^-1/2.
    if scale is None:
        degree = diagonal.index_add(0, edges.receiver, weight)
        scale = degree.pow(-0.5).nan_to_num(nan=torch.nan, posinf=0.0)
    else:
        scale = scale.to(weight.device)
    weight = scale.index_select(0, edges.receiver) * weight
    weight = weight * scale.index_select(0, edges.sender)
    scaled = None if loop_weight is None else scale[:num_dst].square() * diagonal
    return Matrix(edges, weight, scaled, scale)
