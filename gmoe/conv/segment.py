"""Sums and products along messages, without a row for each message.

Shapes: M messages, U senders, P receivers, H heads, C width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch_geometric.utils import index_sort
from torch_geometric.utils.sparse import index2ptr

from gmoe._autograd import first_order

SPARSE_DEVICES = ("cpu",)
"""Where sums and products are one sparse product a head. Elsewhere they are gathered and added, block by block."""

NUMBERS = 2**21
"""How many numbers a block of rows holds: few enough for a CPU's caches, and for memory that needs no fresh pages."""

NUMBERS_ON_GPU = 2**26
"""The same there: enough to fill it."""


@dataclass(frozen=True)
class Messages:
    """Who hears whom. A receiver may hear a sender several times.

    Args:
        sender: (M,) in 0..U-1.
        receiver: (M,) in 0..P-1, ascending.
        num_senders: U.
        num_receivers: P.
    """

    sender: Tensor
    receiver: Tensor
    num_senders: int
    num_receivers: int

    @cached_property
    def start(self) -> Tensor:
        """(P + 1,) where the messages of each receiver start."""
        return index2ptr(self.receiver.contiguous(), self.num_receivers)  # which reads past strides

    @cached_property
    def reverse(self) -> tuple[Messages, Tensor]:
        """The same messages sent the other way, and (M,) which of these each of them is."""
        sender, order = index_sort(self.sender, max_value=self.num_senders)
        return Messages(self.receiver[order], sender, self.num_receivers, self.num_senders), order


def blocks(start: int, end: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices of the messages ``start:end``, to be worked on one after the other with a row of that width for each."""
    step = max((NUMBERS if device.type == "cpu" else NUMBERS_ON_GPU) // width, 1)
    for first in range(start, end, step):
        yield slice(first, min(first + step, end))


@torch.compiler.disable  # the sizes depend on the data
def weighted_sum(weight_MH: Tensor, value_UHC: Tensor, messages: Messages) -> Tensor:
    r"""(P, H, C) what each receiver hears: :math:`y_{ph} = \sum_{m \to p} w_{mh} v_{u(m) h}`.

    Can be differentiated once.

    Args:
        weight_MH: (M, H).
        value_UHC: (U, H, C), or (U, 1, C) where all heads hear the same.
        messages: who hears whom.
    """
    out: Tensor = _WeightedSum.apply(at_least_float32(weight_MH), at_least_float32(value_UHC), messages)
    return out.to(torch.promote_types(weight_MH.dtype, value_UHC.dtype))


@torch.compiler.disable
def dot(query_PHC: Tensor, key_UHC: Tensor, messages: Messages) -> Tensor:
    r"""(M, H) the products of the two ends: :math:`s_{mh} = q_{p(m) h} \cdot k_{u(m) h}`. Can be differentiated once.

    Args:
        query_PHC: (P, H, C).
        key_UHC: (U, H, C), or (U, 1, C) where it is the same for all heads.
        messages: who hears whom.
    """
    out: Tensor = _Dot.apply(at_least_float32(query_PHC), at_least_float32(key_UHC), messages)
    return out.to(torch.promote_types(query_PHC.dtype, key_UHC.dtype))


def at_least_float32(value: Tensor) -> Tensor:
    """What scores and sums are computed in, whatever the type around."""
    return value if value.dtype == torch.float64 else value.float()


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_MH: Tensor, value_UHC: Tensor, messages: Messages) -> Tensor:
        ctx.save_for_backward(weight_MH, value_UHC)
        ctx.messages = messages
        return _sum(weight_MH, value_UHC, messages, weight_MH.size(1))

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_PHC: Tensor) -> tuple[Tensor, Tensor, None]:
        weight_MH, value_UHC = ctx.saved_tensors
        reverse, order = ctx.messages.reverse
        grad_weight = _products(grad_PHC, value_UHC, ctx.messages)
        return grad_weight, _sum(weight_MH[order], grad_PHC, reverse, value_UHC.size(1)), None


class _Dot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_PHC: Tensor, key_UHC: Tensor, messages: Messages) -> Tensor:
        ctx.save_for_backward(query_PHC, key_UHC)
        ctx.messages = messages
        return _products(query_PHC, key_UHC, messages)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_MH: Tensor) -> tuple[Tensor, Tensor, None]:
        query_PHC, key_UHC = ctx.saved_tensors
        reverse, order = ctx.messages.reverse
        grad_query = _sum(grad_MH, key_UHC, ctx.messages, query_PHC.size(1))
        return grad_query, _sum(grad_MH[order], query_PHC, reverse, key_UHC.size(1)), None


def _sum(weight_MH: Tensor, value_UGC: Tensor, messages: Messages, groups: int) -> Tensor:
    """(P, groups, C) the sum of each head, or (groups = 1) of all heads together."""
    out_PGC = value_UGC.new_zeros(messages.num_receivers, groups, value_UGC.size(2))
    if value_UGC.device.type in SPARSE_DEVICES and weight_MH.numel():
        rows = value_UGC.flatten(0, 1)
        for head, matrix in enumerate(_matrices(weight_MH, value_UGC.size(1), messages)):
            out = out_PGC[:, head % groups]
            torch.addmm(out, matrix, rows, out=out)
        return out_PGC
    value_UGC = value_UGC.contiguous()
    for block in blocks(0, weight_MH.size(0), weight_MH.size(1) * value_UGC.size(2), weight_MH.device):
        row_BHC = value_UGC.index_select(0, messages.sender[block]) * weight_MH[block, :, None]
        out_PGC.index_add_(0, messages.receiver[block], row_BHC.sum_to_size(len(row_BHC), *out_PGC.shape[1:]))
    return out_PGC


def _products(query_PHC: Tensor, key_UGC: Tensor, messages: Messages) -> Tensor:
    out_MH = query_PHC.new_zeros(messages.sender.numel(), query_PHC.size(1))
    cells = messages.num_receivers * messages.num_senders * key_UGC.size(1)
    # torch cuts a matrix down to as many entries as it has cells
    if query_PHC.device.type in SPARSE_DEVICES and 0 < out_MH.size(0) <= cells:
        rows = key_UGC.flatten(0, 1)
        for head, matrix in enumerate(_matrices(out_MH, key_UGC.size(1), messages)):
            torch.sparse.sampled_addmm(matrix, query_PHC[:, head], rows.T, out=matrix)
            out_MH[:, head] = matrix.values()
        return out_MH
    query_PHC = query_PHC.contiguous()
    for block in blocks(0, out_MH.size(0), query_PHC.size(1) * query_PHC.size(2), out_MH.device):
        query_BHC = query_PHC.index_select(0, messages.receiver[block])
        torch.sum(query_BHC * key_UGC.index_select(0, messages.sender[block]), dim=-1, out=out_MH[block])
    return out_MH


def _matrices(weight_MH: Tensor, groups: int, messages: Messages) -> Iterator[Tensor]:
    """For each head, the sparse (P, U groups) matrix whose entries are its weights."""
    size = (messages.num_receivers, messages.num_senders * groups)
    for head, weight_M in enumerate(weight_MH.T.contiguous()):
        column = messages.sender * groups + head % groups
        yield torch.sparse_csr_tensor(messages.start, column, weight_M, size, check_invariants=False)
