"""What a model that is exported computes, and what it refuses: the only file that asks.

A kernel names its portable form in ``@operator(portable=...)``, any other function in
``@exported_as(...)``. A form is made of operators that any runtime has: no loop over values, no
check of them, no size that follows from them, and no sparse format. One that runs modules stands
beside the function that it replaces; it, too, is made of what is here.

Shapes: T tokens, E experts, K experts per token, P (token, expert) pairs; M messages, U senders, N
sources, R receivers, H heads, G heads of the senders (H, or 1 that all heads share), C width, I in,
O out features; N blocks of B rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

Inputs = ParamSpec("Inputs")
Value = TypeVar("Value")

# who asks -----------------------------------------------------------------------------------------


def exported_as(
    form: Callable[..., Value],
) -> Callable[[Callable[Inputs, Value]], Callable[Inputs, Value]]:
    """Run a portable form in place of a function in a model that is exported.

    The compiler of torch 2.10 takes itself for an export: there, too, the form is what runs.

    Args:
        form: called like the function, gives the same result.
    """

    def replace(function: Callable[Inputs, Value]) -> Callable[Inputs, Value]:
        @wraps(function)
        def run(*args: Inputs.args, **options: Inputs.kwargs) -> Value:
            if torch.compiler.is_exporting():
                return form(*args, **options)
            return function(*args, **options)

        return run

    return replace


def refuse_in_export(got: str, expected: str) -> None:
    """Refuse what has no portable form.

    Args:
        got: what the exported model would have to compute.
        expected: what it can.

    Raises:
        ValueError: the model is exported.
    """
    if torch.compiler.is_exporting():
        raise ValueError(f"torch.export: got {got}, expected {expected}")


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``; ``torch.export`` would keep a cast that changes nothing, and check it."""
    return x if x.dtype == dtype else x.to(dtype)


# sizes that are not known -------------------------------------------------------------------------


def larger_size(least: int, size: int) -> int:
    """The larger one of two sizes.

    Of a size that is not known, ``torch.export`` would fix by ``max`` which one is larger. Of one
    that is, the compiler of torch 2.10 takes ``max`` alone.
    """
    return max(least, size) if isinstance(size, int) else torch.sym_max(least, size)


def with_spare(size: int, spare: int) -> int:
    """A size and so many more; two more at least, if the size is not known.

    ``torch.export`` would fix whether the sum is more than one.
    """
    return size + (spare if isinstance(size, int) else max(spare, 2))


# choices ------------------------------------------------------------------------------------------


def search(ascending: Tensor, value: Tensor, *, out_int32: bool = False) -> Tensor:
    """How many of ascending numbers are at most each value, ``searchsorted(right=True)``.

    ONNX cannot search.
    """
    number = (ascending <= value[:, None]).sum(dim=1)
    return number.to(torch.int32) if out_int32 else number


def stable_sort(value: Tensor) -> tuple[Tensor, Tensor]:
    """Integers in ascending order, equal ones in the order given; and where each one stood.

    ONNX has no stable sort, so that what is sorted has no equals.
    """
    number = value.size(0)
    _, order = (value * number + torch.arange(number, device=value.device)).sort()
    return value.index_select(0, order), order


def top_k(ranked_TE: Tensor, k: int) -> Tensor:
    """(T, K) the best experts of each token, ties to the lowest index.

    ONNX has no stable sort: take the first of the best, K times.
    """
    experts: list[Tensor] = []
    for _ in range(k):
        experts.append(ranked_TE.argmax(dim=-1, keepdim=True))
        ranked_TE = ranked_TE.scatter(1, experts[-1], -torch.inf)
    return torch.cat(experts, dim=1)


def true_columns(mask_ET: Tensor, num_pairs: int) -> Tensor:
    """(P,) the columns of the true cells, row by row; each row has the same number of them.

    ONNX finds no fixed number of places: sort each row's columns in front of all others.
    """
    num_experts, num_tokens = mask_ET.shape
    token_T = torch.arange(num_tokens, device=mask_ET.device)
    first_ET = torch.where(mask_ET, token_T, num_tokens).sort(dim=1).values
    return first_ET[:, : num_pairs // num_experts].reshape(-1)


# products -----------------------------------------------------------------------------------------


def kernel(*_: object) -> str:
    """The kernel of grouped products whose operators other runtimes know, on any device."""
    return "padded"


# Rows of blocks are written and read by two numbers, not by one among N * B: to view blocks as
# rows, torch.export would ask how N and B are related, and fix the answer for a named batch size.
# ONNX has no remainder by a size that is not known.


def filled_blocks(x_PI: Tensor, place_P: Tensor, num_blocks: int, size: int) -> Tensor:
    """(N, B, I) rows at their places in N blocks of B rows, and zeros elsewhere."""
    zeros = x_PI.new_zeros(num_blocks, size, x_PI.size(1))
    block_P = place_P // size
    return zeros.index_put_((block_P, place_P - block_P * size), x_PI)


def rows_of_blocks(y_NBO: Tensor, place_P: Tensor) -> Tensor:
    """(P, O) the rows at some places."""
    block_P = place_P // y_NBO.size(1)
    return y_NBO[block_P, place_P - block_P * y_NBO.size(1)]


# edges and messages -------------------------------------------------------------------------------


def counts(index: Tensor, size: int) -> Tensor:
    """(size,) how often each of 0..size-1 occurs."""
    return index.new_zeros(size).index_add(0, index, torch.ones_like(index))


def positions(size: Tensor, number: int | None) -> Tensor:
    """(number,) the part in which each place lies, given the sizes of the parts.

    That is the number of parts that end up to the place. Where the number of places is not known,
    ``torch.export`` makes a size of it; ONNX cannot.
    """
    if number is None:
        return torch.arange(size.size(0), device=size.device).repeat_interleave(size)
    return counts(size.cumsum(0), number + 1)[:-1].cumsum(0)


def sort_edges(
    sender: Tensor, receiver: Tensor, _: int, num_receivers: int, __: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row pointers, senders, receivers and order of the edges by receiver; equals stay in order."""
    by_receiver, order = stable_sort(receiver)
    ends_R = counts(receiver, num_receivers).cumsum(0)
    ptr = torch.cat([ends_R.new_zeros(1), ends_R])
    return ptr, sender.index_select(0, order), by_receiver, order


def largest(score_MH: Tensor, ptr: Tensor, receiver: Tensor) -> Tensor:
    """(R, H) the largest of each receiver's messages."""
    none_RH = score_MH.new_full((ptr.size(0) - 1, score_MH.size(1)), -torch.inf)
    return none_RH.scatter_reduce(0, receiver[:, None].expand_as(score_MH), score_MH, "amax")


def sum_messages(
    weight_MH: Tensor,
    value_UGC: Tensor,
    ptr: Tensor,
    sender: Tensor,
    receiver: Tensor,
    order: Tensor | None,
) -> Tensor:
    """(R, H, C) the weighted sum of each receiver's messages, in float32 at least.

    On a CPU, bags of rows take a fraction of the time: no row for each message is written. ONNX
    has none.
    """
    dtype = torch.promote_types(weight_MH.dtype, value_UGC.dtype)
    exact = torch.promote_types(dtype, torch.float32)
    weight_MH, value_UGC = cast(weight_MH, exact), cast(value_UGC, exact)
    if order is not None:
        weight_MH = weight_MH.index_select(0, order)
    if torch.onnx.is_in_onnx_export() or value_UGC.device.type != "cpu":
        message_MHC = value_UGC.index_select(0, sender) * weight_MH[..., None]
        zero_RHC = message_MHC.new_zeros(ptr.size(0) - 1, *message_MHC.shape[1:])
        return cast(zero_RHC.index_add(0, receiver, message_MHC), dtype)
    value_UHC = value_UGC.expand(-1, weight_MH.size(1), -1)
    sums = [
        F.embedding_bag(
            sender, value_UC, ptr, mode="sum", per_sample_weights=weight_M, include_last_offset=True
        )
        for weight_M, value_UC in zip(weight_MH.unbind(1), value_UHC.unbind(1), strict=True)
    ]
    return cast(torch.stack(sums, dim=1), dtype)


def sum_values(value_MH: Tensor, ptr: Tensor, receiver: Tensor, order: Tensor | None) -> Tensor:
    """(R, H) the sum of each receiver's messages, in float32 at least."""
    dtype = value_MH.dtype
    value_MH = cast(value_MH, torch.promote_types(dtype, torch.float32))
    if order is not None:
        value_MH = value_MH.index_select(0, order)
    zeros_RH = value_MH.new_zeros(ptr.size(0) - 1, value_MH.size(1))
    return cast(zeros_RH.index_add_(0, receiver, value_MH), dtype)


def multiply_ends(
    query_RHC: Tensor, key_UGC: Tensor, _: Tensor, sender: Tensor, receiver: Tensor
) -> Tensor:
    """(M, H) the dot product of the two ends of each message, in float32 at least."""
    dtype = torch.promote_types(query_RHC.dtype, key_UGC.dtype)
    exact = torch.promote_types(dtype, torch.float32)
    query_MHC = cast(query_RHC, exact).index_select(0, receiver)
    product_MHC = query_MHC * cast(key_UGC, exact).index_select(0, sender)
    return cast(product_MHC.sum(dim=-1), dtype)
