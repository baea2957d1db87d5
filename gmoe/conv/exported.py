"""Sums along edges in a model that is exported: by operators that any runtime has.

No loop over values, no check of them, no size that follows from them, and no sparse format. But for
sums on a CPU, a row for each message is in memory.

Shapes: M messages, U senders, R receivers, H heads, G heads of the senders (H, or 1 that all heads
share), C width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``; ``torch.export`` would keep a cast that changes nothing, and check it."""
    return x if x.dtype == dtype else x.to(dtype)


def sort_edges(
    sender: Tensor, receiver: Tensor, num_receivers: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row pointers, senders, receivers and order of the edges by receiver; equals stay in order.

    ONNX has no stable sort, so that what is sorted has no equals.
    """
    number = receiver.size(0)
    place = torch.arange(number, device=receiver.device)
    order = (receiver * number + place).argsort()
    ends_R = counts(receiver, num_receivers).cumsum(0)
    ptr = torch.cat([ends_R.new_zeros(1), ends_R])
    return ptr, sender.index_select(0, order), receiver.index_select(0, order), order


def counts(index: Tensor, size: int) -> Tensor:
    """(size,) how often each of 0..size-1 occurs."""
    return index.new_zeros(size).index_add(0, index, torch.ones_like(index))


def positions(ends: Tensor, number: int) -> Tensor:
    """(number,) the part in which each place lies, given the cumulative ends of the parts.

    That is the number of ends up to the place.
    """
    return counts(ends, number + 1)[:-1].cumsum(0)


def largest(score_MH: Tensor, receiver: Tensor, num_receivers: int) -> Tensor:
    """(R, H) the largest of each receiver's messages."""
    none_RH = score_MH.new_full((num_receivers, score_MH.size(1)), -torch.inf)
    return none_RH.scatter_reduce(0, receiver[:, None].expand_as(score_MH), score_MH, "amax")


def sum_messages(
    weight_MH: Tensor, value_UGC: Tensor, ptr: Tensor, sender: Tensor, receiver: Tensor
) -> Tensor:
    """(R, H, C) the weighted sum of each receiver's messages.

    On a CPU, bags of rows take a fraction of the time: no row for each message is written. ONNX
    has none.
    """
    if torch.onnx.is_in_onnx_export() or value_UGC.device.type != "cpu":
        message_MHC = value_UGC.index_select(0, sender) * weight_MH[..., None]
        zero_RHC = message_MHC.new_zeros(ptr.size(0) - 1, *message_MHC.shape[1:])
        return zero_RHC.index_add(0, receiver, message_MHC)
    value_UHC = value_UGC.expand(-1, weight_MH.size(1), -1)
    sums = [
        F.embedding_bag(
            sender, value_UC, ptr, mode="sum", per_sample_weights=weight_M, include_last_offset=True
        )
        for weight_M, value_UC in zip(weight_MH.unbind(1), value_UHC.unbind(1), strict=True)
    ]
    return torch.stack(sums, dim=1)


def multiply_ends(query_RHC: Tensor, key_UGC: Tensor, sender: Tensor, receiver: Tensor) -> Tensor:
    """(M, H) the dot product of the two ends of each message."""
    query_MHC = query_RHC.index_select(0, receiver)
    return (query_MHC * key_UGC.index_select(0, sender)).sum(dim=-1)
