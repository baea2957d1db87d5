"""Sums along edges as matrices: a sum, a mean, GCN's norms, and their products with features.

Shapes: N_src sources, N_dst destinations, N both where they are one set of nodes, M messages, D
width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gmoe._autograd import lazy
from gmoe._torch import is_watched
from gmoe.conv.adjacency import Adjacency
from gmoe.edges import Edges
from gmoe.sums import blocks, weighted_sum

FEW_NUMBERS = 2**17
"""Up to so many numbers, M D, a CPU sums messages in the order given, by plain operators.

To sort them takes longer: measured for 30 to 2,708 nodes of 16 to 1,433 features; both take as long
at 2**17 to 2**18.
"""


@dataclass(eq=False)
class Matrix:
    """The A = L (W + I) R of a sum A x over in-edges, with diagonal L, I and R.

    Args:
        adjacency: which entries of W are not zero.
        weight: (M,) these entries, a message each; ``None`` for ones.
        loops: the I: (N_dst,) numbers, or one for all; the destinations are then the first of the
            sources. ``None`` for zeros.
        left: (N_dst,) the L; ``None`` for ones.
        right: (N_src,) the R, likewise.
        learns: whether it follows from weights that need a gradient, also under ``no_grad``.
    """

    adjacency: Adjacency
    weight: Tensor | None
    loops: Tensor | float | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    learns: bool = False

    def masked(self, mask: Tensor) -> Matrix:
        """The matrix with (M,) factors on the messages, in the order of the edges as given."""
        mask = self.adjacency.of_messages(mask)
        return replace(self, weight=mask if self.weight is None else self.weight * mask)

    def inverse_root(self, dtype: torch.dtype) -> Tensor:
        r"""(N_dst,) the diagonal of :math:`D^{-1/2}`, D the sums of the rows of W + I.

        Zero where the sum is zero.

        Args:
            dtype: least dtype of the sums; they have at least float32.
        """
        exact = torch.promote_types(dtype, torch.float32)
        degree = self.adjacency.degree(exact, self.weight, self.loops)
        # Not the power of zero, which has an infinite slope that a gradient would multiply by zero.
        return degree.masked_fill(degree == 0, torch.inf).rsqrt()

    def scaled(self, scale: Tensor) -> Matrix:
        """The matrix with (N_src,) factors of rows and columns; the first are the destinations'."""
        return replace(self, left=scale[: self.adjacency.num_dst], right=scale)

    def times(self, x: Tensor, order: Tensor | None = None) -> Tensor:
        """(N_dst, D) A x, in the type of ``x`` (N_src, D).

        Args:
            x: the features.
            order: (N_dst,) the destinations in the order in which their rows are wanted, each
                once. Messages are then sorted once more, and no row is moved.
        """
        if order is None and self._takes_given_order(x):
            return self._times_in_given_order(x).to(x.dtype)
        edges, weight = self.entries
        if order is not None:
            edges = edges.of(order, weight.size(0))
            weight = weight.index_select(0, edges.order)
        return weighted_sum(weight[:, None], x[:, None], edges).squeeze(1).to(x.dtype)

    def _takes_given_order(self, x: Tensor) -> bool:
        """True if messages need not be sorted: off the CPU, and where they are few.

        Not where they are sorted already; in compiled code, which does not look into sums; and
        while operators are counted.
        """
        if torch.compiler.is_compiling() or is_watched():
            return False
        is_few = self.adjacency.sender.size(0) * x.size(1) <= FEW_NUMBERS
        is_sorted = self.adjacency.is_sorted or "entries" in vars(self)
        return x.device.type != "cpu" or (is_few and not is_sorted)

    def _times_in_given_order(self, x: Tensor) -> Tensor:
        """(N_dst, D) A x in float32 at least, message by message."""
        sender, receiver = self.adjacency.sender, self.adjacency.receiver
        num_dst = self.adjacency.num_dst
        if self.right is None:
            sent = x.to(torch.promote_types(x.dtype, torch.float32))
        else:
            sent = x * self.right[:, None]
        if self.loops is None:
            y = sent.new_zeros(num_dst, x.size(1))
        else:
            y = sent if len(sent) == num_dst else sent[:num_dst]
            if isinstance(self.loops, Tensor):
                y = y * self.loops[:, None]
            elif self.loops != 1:
                y = y * self.loops
        for block in blocks(0, sender.size(0), x.size(1), x.device):
            message = sent.index_select(0, sender[block])
            if self.weight is not None:
                message = message * self.weight[block, None]
            y = y.index_add(0, receiver[block], message)
        return y if self.left is None else y * self.left[:, None]

    @lazy
    def entries(self) -> tuple[Edges, Tensor]:
        """The messages sorted by receiver, loops among them, and the entry of A for each."""
        edges = (self.adjacency if self.loops is None else self.adjacency.looped).edges
        with torch.inference_mode(False):  # a graph keeps the result, for training too
            weight = self.weight
            if weight is None:
                weight = torch.ones_like(self.adjacency.sender, dtype=torch.float32)
            if self.loops is not None:
                number = edges.sender.size(0) - weight.size(0)
                weight = torch.cat([weight, weight.new_ones(number) * self.loops])
            if self.loops is not None or self.adjacency.ordered is None:
                weight = weight.index_select(0, edges.order)
            if self.left is not None:
                weight = self.left.index_select(0, edges.receiver) * weight
            if self.right is not None:
                weight = weight * self.right.index_select(0, edges.sender)
        return edges, weight


def sum_matrix(
    adjacency: Adjacency, factor: Tensor | None, *, mean: bool, dtype: torch.dtype
) -> Matrix:
    """The matrix of a sum over in-edges, or of a mean.

    Args:
        adjacency: the edges.
        factor: (M,) factors of the messages, in the order of the edges as given; rows of several
            numbers are features, not factors.
        mean: divide by the number of in-edges.
        dtype: least dtype of the entries; they have at least float32.
    """
    exact = torch.promote_types(dtype, torch.float32)
    weight = None
    if factor is not None and factor.dim() == 1:
        weight = adjacency.of_messages(factor).to(exact)
    share = adjacency.degree(exact).clamp(min=1).reciprocal() if mean else None
    return Matrix(adjacency, weight, left=share, learns=_learns(factor))


def looped_matrix(
    adjacency: Adjacency,
    factor: Tensor | None,
    *,
    loop_weight: float | None,
    replace_loops: bool,
    keep_loop_weights: bool,
    dtype: torch.dtype,
) -> Matrix:
    """The matrix A + I of PyG's ``GCNConv``, before it is normalized.

    Args:
        adjacency: the edges of A.
        factor: (M,) their weights, in the order of the edges as given; ``None`` for ones.
        loop_weight: the entries of I; ``None`` to leave I out.
        replace_loops: I takes the place of the loops in A, and is not added to them.
        keep_loop_weights: a loop that is replaced keeps its weight, if there is a ``factor``.
        dtype: least dtype of the entries; they have at least float32.
    """
    exact = torch.promote_types(dtype, torch.float32)
    # 1. A: the weights of the edges.
    weight = None if factor is None else adjacency.of_messages(factor).to(exact)

    # 2. I: the weights of the loops.
    loops: Tensor | float | None = loop_weight
    if loop_weight is not None and replace_loops:
        num_dst, receiver = adjacency.num_dst, adjacency.receiver
        is_kept = adjacency.sender != receiver
        if weight is None:
            weight = is_kept.to(exact)
        else:
            if keep_loop_weights:
                # Of several loops at a node, the last one's weight counts. How many loops there
                # are depends on the data: all other edges write to a row that is cut off.
                row = torch.where(is_kept, num_dst, receiver)
                padded = weight.new_full((num_dst + 1,), loop_weight)
                loops = padded.scatter(0, row, weight)[:-1]
            weight = torch.where(is_kept, weight, 0.0)
    return Matrix(adjacency, weight, loops, learns=_learns(factor))


def _learns(factor: Tensor | None) -> bool:
    """Whether the weights of the edges need a gradient."""
    return factor is not None and factor.requires_grad
