"""Products of rows sorted by expert that are padded: to blocks of equal size, or to 16 bytes.

The sizes of blocks are known to the host, so that a GPU is not waited for. torch's own kernel of
grouped products wants columns that fill 16 bytes.

Shapes: P rows sorted by expert, E experts, I in, O out features, N blocks of B rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gmoe._torch import index_put
from gmoe.portable import larger_size, with_spare
from gmoe.routing import expert_at

BLOCK = 16
"""The least number of rows in a block of the padded product."""


class Blocks(NamedTuple):
    """Rows sorted by expert, laid out in N blocks of B rows, each of one expert.

    Rows are written and read by two numbers, not by one among N * B: to view blocks as rows,
    torch.export would ask how N and B are related, and fix the answer for a named batch size.
    """

    block_P: Tensor
    """(P,) int64, the block of each row."""
    slot_P: Tensor
    """(P,) int64, the place of each row in its block."""
    expert_N: Tensor
    """(N,) int64, the expert of each block; the last blocks may hold no rows."""
    size: int
    """B."""

    def filled(self, x_PI: Tensor) -> Tensor:
        """(N, B, I) the rows in their blocks, and zeros elsewhere."""
        zeros = x_PI.new_zeros(self.expert_N.size(0), self.size, x_PI.size(1))
        return zeros.index_put_((self.block_P, self.slot_P), x_PI)

    def rows(self, y_NBO: Tensor) -> Tensor:
        """(P, O) the rows of the blocks, in their order before."""
        return y_NBO[self.block_P, self.slot_P]

    def sum_by_expert(self, value_NO: Tensor, num_experts: int) -> Tensor:
        """(E, O) sums over the blocks of each expert, in a fixed order on any device."""
        return sum_at(self.expert_N, value_NO, num_experts)


def blocks_of(offsets_E: Tensor, num_rows: int) -> Blocks:
    """Lay rows out in blocks, by sizes that the host knows: nothing is read from the device.

    A block has a quarter of an expert's mean load, and ``BLOCK`` rows at least. There are at most
    4 E full blocks, and E that are filled up with zeros: the weights are copied five times at most,
    and a quarter of the rows is added, or ``BLOCK`` rows for each expert.
    """
    num_experts = len(offsets_E)
    quarter = (num_rows + 4 * num_experts - 1) // (4 * num_experts)
    size = larger_size(BLOCK, quarter)
    ends_E = offsets_E.long()
    starts_E = F.pad(ends_E, (1, -1))
    block_ends_E = ((ends_E - starts_E + (size - 1)) // size).cumsum(0)
    block_starts_E = F.pad(block_ends_E, (1, -1))
    # A row moves with its expert: from where the expert's rows start to where its blocks start.
    row_P = torch.arange(num_rows, device=offsets_E.device)
    expert_P = expert_at(ends_E, row_P)
    rank_P = row_P - starts_E.index_select(0, expert_P)
    full_P = rank_P // size  # the blocks of its expert before its own
    block_P = block_starts_E.index_select(0, expert_P) + full_P
    slot_P = rank_P - full_P * size  # ONNX has no remainder by a size that is not known
    # The most blocks that there can be; those that are left over count as the last expert's.
    num_blocks = with_spare(num_rows // size, num_experts)
    block_N = torch.arange(num_blocks, device=offsets_E.device)
    expert_N = expert_at(block_ends_E, block_N).clamp_(max=num_experts - 1)
    return Blocks(block_P, slot_P, expert_N, size)


def padded_mm(x_PI: Tensor, weight_EIO: Tensor, offsets_E: Tensor) -> Tensor:
    """(P, O) rows times the weight of their expert, block by block."""
    blocks = blocks_of(offsets_E, x_PI.size(0))
    if weight_EIO.stride(1) == 1:  # transposed: copy in the order of memory
        weight_NOI = weight_EIO.transpose(1, 2).index_select(0, blocks.expert_N)
        weight_NIO = weight_NOI.transpose(1, 2)
    else:
        weight_NIO = weight_EIO.index_select(0, blocks.expert_N)
    y_NBO = torch.bmm(blocks.filled(x_PI), weight_NIO)
    return blocks.rows(y_NBO)


def padded_outer(x_PI: Tensor, grad_PO: Tensor, offsets_E: Tensor) -> Tensor:
    """(E, I, O) the gradient of the weights, block by block."""
    blocks = blocks_of(offsets_E, x_PI.size(0))
    grad_NIO = torch.bmm(blocks.filled(x_PI).transpose(1, 2), blocks.filled(grad_PO))
    return blocks.sum_by_expert(grad_NIO, len(offsets_E))


def grouped_mm(x_PI: Tensor, weight_EIO: Tensor, offsets_E: Tensor) -> Tensor:
    """(P, O) rows times the weight of their expert, by torch's kernel."""
    weight = _aligned(packed(weight_EIO), 2)
    y_PO = F.grouped_mm(_aligned(x_PI.contiguous()), weight, offs=offsets_E.int())
    is_padded = y_PO.size(1) > weight_EIO.size(2)
    return y_PO[:, : weight_EIO.size(2)].clone() if is_padded else y_PO


def grouped_outer(x_PI: Tensor, grad_PO: Tensor, offsets_E: Tensor) -> Tensor:
    """(E, I, O) the gradient of the weights, by torch's kernel."""
    padded_EIO = F.grouped_mm(
        _aligned(x_PI.contiguous()).T, _aligned(grad_PO.contiguous()), offs=offsets_E.int()
    )
    # Contiguous, as compiled code expects of each operator: not a part of the padded product.
    grad_EIO = padded_EIO[:, : x_PI.size(1), : grad_PO.size(1)].contiguous()
    if not grad_EIO.is_cuda:
        return grad_EIO
    # The kernel of CUDA leaves anything in the place of an expert without rows.
    has_rows_E = offsets_E.diff(prepend=offsets_E.new_zeros(1)) > 0
    return torch.where(has_rows_E[:, None, None], grad_EIO, 0.0)


def packed(weight_EIO: Tensor) -> Tensor:
    """The same weights, each one's rows or columns side by side, as torch's kernel wants them."""
    is_packed = weight_EIO.is_contiguous() or weight_EIO.mT.is_contiguous()
    return weight_EIO if is_packed else weight_EIO.contiguous()


def has_own_loop(x_PI: Tensor, out_features: int) -> bool:
    """True if torch's own loop over experts, that of a CPU, takes rows, if any, as they are.

    It takes 0.4 to 1.0 of the time of Python's, with 4 to 64 experts of 16 to 512 features; with
    weights that are padded first, up to 17 times as long.
    """
    step = 16 // x_PI.element_size()
    fits = x_PI.size(1) % step == 0 and out_features % step == 0
    is_own = x_PI.dtype != torch.float64 and x_PI.device.type == "cpu"
    return len(x_PI) > 0 and fits and is_own


def _aligned(x: Tensor, dims: int = 1) -> Tensor:
    """Pad the last dimensions with zeros to multiples of 16 bytes, and start at such an address.

    A part of a flat buffer, as FSDP2 keeps parameters, may start anywhere.
    """
    step = 16 // x.element_size()
    pads = [pad for width in reversed(x.shape[-dims:]) for pad in (0, -width % step)]
    if any(pads):
        return F.pad(x, pads)
    return x if x.data_ptr() % 16 == 0 else x.clone()


def sum_at(index: Tensor, values: Tensor, size: int) -> Tensor:
    """Sums of values with the same index, in a fixed order.

    On CUDA, torch sorts the indices for ``index_put``; ``index_add`` adds in any order. ``unsafe``
    skips the check of their range, for which older versions wait.
    """
    zeros = values.new_zeros(size, *values.shape[1:])
    return index_put(zeros, [index], values, accumulate=True, unsafe=True)
