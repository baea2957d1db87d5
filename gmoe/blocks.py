"""Rows sorted by expert, and their products in blocks of equal size.

The sizes of blocks are known to the host, so that a GPU is not waited for.

Shapes: P rows sorted by expert, E experts, I in, O out features, N blocks of B rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gmoe import portable
from gmoe._autograd import unbatched
from gmoe._checks import readable
from gmoe._torch import index_put
from gmoe.portable import exported_as, larger_size, with_spare

BLOCK = 16
"""The least number of rows in a block."""


@exported_as(portable.search)
def search(ascending: Tensor, value: Tensor, *, out_int32: bool = False) -> Tensor:
    """How many of ascending numbers are at most each value."""
    return torch.searchsorted(ascending, value, right=True, out_int32=out_int32)


@exported_as(portable.stable_sort)
def stable_sort(value: Tensor) -> tuple[Tensor, Tensor]:
    """Integers in ascending order, equal ones in the order given; and where each one stood."""
    ascending, order = value.sort(stable=True)
    return ascending, order


def expert_of_rows(offsets_E: Tensor, num_rows: int) -> Tensor:
    """(P,) int64, the expert of each row, given the cumulative ends of the experts' rows."""
    row_P = torch.arange(num_rows, dtype=offsets_E.dtype, device=offsets_E.device)
    return search(offsets_E, row_P)


def sum_at(index: Tensor, values: Tensor, size: int) -> Tensor:
    """Sums of values with the same index, in a fixed order.

    On CUDA, torch sorts the indices for ``index_put``; ``index_add`` adds in any order. ``unsafe``
    skips the check of their range, for which older versions wait.
    """
    zeros = values.new_zeros(size, *values.shape[1:])
    return index_put(zeros, [index], values, accumulate=True, unsafe=True)


class AtRows(torch.autograd.Function):
    """(P, ...) what the expert of each row has; its gradient is summed in float32 at least."""

    @staticmethod
    def forward(ctx: Any, value_E: Tensor, expert_P: Tensor) -> Tensor:
        ctx.save_for_backward(expert_P)
        ctx.num_experts = value_E.size(0)
        return value_E.index_select(0, expert_P)

    @staticmethod
    @unbatched
    def backward(ctx: Any, grad_P: Tensor) -> Any:
        (expert_P,) = ctx.saved_tensors
        exact_P = grad_P.to(torch.promote_types(grad_P.dtype, torch.float32))
        return sum_at(expert_P, exact_P, ctx.num_experts).to(grad_P.dtype), None


class Blocks(NamedTuple):
    """P rows, laid out in N blocks of B rows, each of one expert."""

    place_P: Tensor
    """(P,) int64, the place of each row among the N * B that the blocks have."""
    expert_N: Tensor
    """(N,) int64, the expert of each block; the last blocks may hold no rows."""
    size: int
    """B."""

    def linear(self, x_PI: Tensor, weight_EIO: Tensor, bias_EO: Tensor | None) -> Tensor:
        """(P, O) rows times the weight of their expert, plus its bias."""
        return self.rows(_BlockLinear.apply(self.filled(x_PI), weight_EIO, bias_EO, self.expert_N))

    def filled(self, x_PI: Tensor) -> Tensor:
        """(N, B, I) the rows in their blocks, and zeros elsewhere."""
        return _filled(x_PI, self.place_P, self.expert_N.size(0), self.size)

    def rows(self, y_NBO: Tensor) -> Tensor:
        """(P, O) the rows of the blocks, in their order before."""
        return _rows(y_NBO, self.place_P)


def blocks_of(offsets_E: Tensor, expert_P: Tensor) -> Blocks:
    """Lay rows out in blocks, by sizes that the host knows: nothing is read from the device.

    A block has a quarter of an expert's mean load, and ``BLOCK`` rows at least. There are at most
    4 E full blocks, and E that are filled up with zeros: the weights are copied five times at most,
    and a quarter of the rows is added, or ``BLOCK`` rows for each expert.

    Args:
        offsets_E: (E,) cumulative ends of the experts' rows.
        expert_P: (P,) the expert of each row, ascending.
    """
    num_experts, num_rows = offsets_E.size(0), expert_P.size(0)
    quarter = (num_rows + 4 * num_experts - 1) // (4 * num_experts)
    size = larger_size(BLOCK, quarter)
    ends_E = offsets_E.long()
    starts_E = F.pad(ends_E, (1, -1))
    block_ends_E = ((ends_E - starts_E + (size - 1)) // size).cumsum(0)
    block_starts_E = F.pad(block_ends_E, (1, -1))
    # A row moves with its expert: from where the expert's rows start to where its blocks start.
    shift_E = block_starts_E * size - starts_E
    row_P = torch.arange(num_rows, device=offsets_E.device)
    place_P = row_P + shift_E.index_select(0, expert_P)
    # The most blocks that there can be; those that are left over count as the last expert's.
    num_blocks = with_spare(num_rows // size, num_experts)
    expert_N = expert_of_rows(block_ends_E[:-1], num_blocks)
    return Blocks(place_P, expert_N, size)


class RowsByGroup(NamedTuple):
    """Where T tokens stand among rows that are sorted by their groups."""

    place_T: Tensor
    """(T,) int64, of which no two are the same."""
    offsets_G: Tensor
    """(G,) int32, cumulative ends of the groups' tokens."""
    size: int | None
    """B rows of each group, some of which may be of no token; ``None`` for its tokens alone."""

    def filled(self, x_TI: Tensor) -> Tensor:
        """(G, B, I) the tokens at their places, and zeros elsewhere; (T, I) without a size."""
        if self.size is None:
            return _filled(x_TI, self.place_T, 1, x_TI.size(0))[0]
        return _filled(x_TI, self.place_T, self.offsets_G.size(0), self.size)

    def taken(self, y: Tensor) -> Tensor:
        """(T, O) the rows of the tokens."""
        return y.flatten(0, -2).index_select(0, self.place_T)


def rows_by_group(group_T: Tensor, num_groups: int) -> RowsByGroup:
    """Sort tokens by group; to groups of nearly the same size, add rows until they are.

    One product then has all groups. Where it would have twice the rows, or sizes cannot be read
    without waiting for a GPU, each group has its own tokens alone.

    Args:
        group_T: (T,) int64, the group of each token.
        num_groups: G.
    """
    num_tokens = group_T.size(0)
    ascending_T, order_T = stable_sort(group_T)
    row_T = torch.arange(num_tokens, device=group_T.device)
    place_T = torch.empty_like(order_T).scatter_(0, order_T, row_T)
    number_G = torch.arange(num_groups, device=group_T.device)
    ends_G = search(ascending_T, number_G)
    if readable(group_T) and num_tokens:
        starts_G = F.pad(ends_G, (1, -1))
        largest = int((ends_G - starts_G).max())
        if num_groups * largest <= 2 * num_tokens:
            place_T = place_T + (number_G * largest - starts_G).index_select(0, group_T)
            return RowsByGroup(place_T, ends_G.int(), largest)
    return RowsByGroup(place_T, ends_G.int(), None)


@exported_as(portable.filled_blocks)
def _filled(x_PI: Tensor, place_P: Tensor, num_blocks: int, size: int) -> Tensor:
    """(N, B, I) rows at their places, and zeros elsewhere."""
    zeros = x_PI.new_zeros(num_blocks * size, x_PI.size(1))
    return zeros.index_copy_(0, place_P, x_PI).view(num_blocks, size, x_PI.size(1))


@exported_as(portable.rows_of_blocks)
def _rows(y_NBO: Tensor, place_P: Tensor) -> Tensor:
    """(P, O) the rows at some places."""
    rows_PO: Tensor = AtPlaces.apply(y_NBO.flatten(0, 1), place_P)
    return rows_PO


class AtPlaces(torch.autograd.Function):
    """(P, ...) values at places of which no two are the same: gradients are copied, not added.

    It saves no tensors: a checkpoint counts those that a forward and its recomputation save, and
    only the first of the two computes what a routing keeps.
    """

    @staticmethod
    def forward(ctx: Any, value_R: Tensor, place_P: Tensor) -> Tensor:
        ctx.place_P = place_P
        ctx.shape = value_R.shape
        return value_R.index_select(0, place_P)

    @staticmethod
    @unbatched
    def backward(ctx: Any, grad_P: Tensor) -> Any:
        return grad_P.new_zeros(ctx.shape).index_copy_(0, ctx.place_P, grad_P), None


class _BlockLinear(torch.autograd.Function):
    """(N, B, O) blocks times the weight of their expert, plus its bias.

    The copies of the weights, one a block, are made again in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x_NBI: Tensor, weight_EIO: Tensor, bias_EO: Tensor | None, expert_N: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x_NBI, weight_EIO, expert_N)
        ctx.bias_dtype = None if bias_EO is None else bias_EO.dtype
        # Transposed weights are copied in the order of memory.
        is_transposed = weight_EIO.stride(1) == 1
        stored_E = weight_EIO.mT if is_transposed else weight_EIO
        stored_N = stored_E.index_select(0, expert_N)
        weight_NIO = stored_N.mT if is_transposed else stored_N
        if bias_EO is None:
            return torch.bmm(x_NBI, weight_NIO)
        bias_NO = bias_EO.to(x_NBI.dtype).index_select(0, expert_N)
        return torch.baddbmm(bias_NO[:, None], x_NBI, weight_NIO)

    @staticmethod
    @unbatched
    def backward(ctx: Any, grad_NBO: Tensor) -> Any:
        x_NBI, weight_EIO, expert_N = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        num_experts = weight_EIO.size(0)
        grad_x = None
        grad_weight = None
        grad_bias = None
        if needs_x:
            grad_x = _BlockLinear.apply(grad_NBO, weight_EIO.mT, None, expert_N)
        if needs_weight:
            # In memory as nn.Linear has it, (E, O, I): a stacked layer's gradient is not copied.
            outer_NOI = torch.bmm(grad_NBO.mT, x_NBI)
            grad_weight = sum_at(expert_N, outer_NOI, num_experts).mT
        if needs_bias:
            exact = torch.promote_types(grad_NBO.dtype, torch.float32)
            sum_NO = grad_NBO.sum(dim=1, dtype=exact)
            grad_bias = sum_at(expert_N, sum_NO, num_experts).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None
