"""Messages along edges, and the sums over them: the one place where edges are sorted or multiplied.

Shapes: M edges or messages (B of them in a block), U senders, R receivers, H heads, G heads of the
senders (H, or 1 that all heads share), C width.

The kernels are operators of torch (``torch.ops.gmoe``), opaque to ``torch.compile``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_geometric.utils import segment

from gmoe._autograd import first_order, lazy, operator
from gmoe._torch import assert_async, row_pointers
from gmoe.conv import exported

# Once a process, torch warns that sparse CSR matrices are in beta. Make one here, so that users do
# not get the warning from a layer.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0], [], [], (0, 0), check_invariants=False)

SPARSE_DEVICES = ("cpu",)
"""Devices on which torch's own sums and products along edges beat gathered blocks of messages."""

NUMBERS = 2**21
"""Numbers in a block of messages on a CPU: they fit its caches, and need no fresh pages."""

NUMBERS_ON_GPU = 2**26
"""The same on a GPU: enough to fill it."""

RADIX_RECEIVERS = 2**16
"""Up to so many receivers, NumPy's radix sort takes a tenth to a half of torch's time."""


@dataclass(eq=False)
class Edges:
    """Messages sorted by receiver: the structure of a CSR matrix.

    Args:
        ptr: (R + 1,) where the messages of each receiver start.
        sender: (M,) in 0..U-1.
        receiver: (M,) in 0..R-1, ascending.
        num_senders: U.
        order: (M,) the position of each message among the edges as they were given.
    """

    ptr: Tensor
    sender: Tensor
    receiver: Tensor
    num_senders: int
    order: Tensor

    @staticmethod
    def sorted(
        sender: Tensor,
        receiver: Tensor,
        num_senders: int,
        num_receivers: int,
        validate: bool = True,
    ) -> Edges:
        """The edges in the order of their receivers.

        Args:
            sender: (M,) integers.
            receiver: (M,) integers.
            num_senders: U.
            num_receivers: R.
            validate: check that both are in range (default ``True``).

        Raises:
            ValueError: nodes out of range (CPU tensors).
        """
        with torch.inference_mode(False):  # a graph keeps the result, for training too
            ptr, sender, receiver, order = _sort_edges(
                sender, receiver, num_senders, num_receivers, validate
            )
        return Edges(ptr, sender, receiver, num_senders, order)

    @property
    def num_receivers(self) -> int:
        """R."""
        return self.ptr.numel() - 1

    @lazy
    def degree(self) -> Tensor:
        """(R,) the number of messages of each receiver."""
        return self.ptr[1:] - self.ptr[:-1]

    @lazy
    def transpose(self) -> Edges:
        """The same messages sent the other way."""
        return Edges.sorted(
            self.receiver, self.sender, self.num_receivers, self.num_senders, validate=False
        )

    def to(self, device: torch.device | str) -> Edges:
        """The same edges on another device."""
        return replace(
            self,
            ptr=self.ptr.to(device),
            sender=self.sender.to(device),
            receiver=self.receiver.to(device),
            order=self.order.to(device),
        )

    def of(self, receivers: Tensor, number: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The messages of some receivers, one receiver after the other.

        Args:
            receivers: (r,) integers; a receiver may occur several times.
            number: m, where it is known. Else it is read from the device, for which the host waits.

        Returns:
            (m,) the messages; (m,) the position of each one's receiver among ``receivers``; and
            (r + 1,) where the messages of each position start.
        """
        return _find_messages(self.ptr, receivers, number)

    def with_loops(self, number: int) -> tuple[Edges, Tensor]:
        """The edges and a loop at each of the first nodes.

        How many loops there were depends on the data. They stay, so that the host does not wait for
        their number, and are marked.

        Args:
            number: of nodes that get a loop.

        Returns:
            The edges, whose ``order`` counts those there were, then the loops; and which of them
            are loops that a new one replaces.
        """
        with torch.inference_mode(False):  # a graph keeps the result, for training too
            ptr, sender, receiver, order = _add_loops(self.ptr, self.sender, self.receiver, number)
            is_replaced = (sender == receiver) & (order < self.sender.numel())
        return Edges(ptr, sender, receiver, self.num_senders, order), is_replaced


def renumber(first: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Number the nodes of a part of a graph anew.

    Args:
        first: (n,) distinct nodes, which come first.
        others: (m,) nodes, in any order and as often as they occur.

    Returns:
        (S,) the distinct nodes of both, and (m,) the place of each of ``others`` among them.
    """
    nodes = torch.cat([first, others[~torch.isin(others, first)].unique()])
    ascending, order = nodes.sort()
    return nodes, order[torch.searchsorted(ascending, others)]


def weighted_sum(weight_MH: Tensor, value_UGC: Tensor, edges: Edges) -> Tensor:
    r"""(R, H, C) the sum of each receiver's messages.

    .. math:: y_{rh} = \sum_{m \to r} w_{mh} v_{u(m) h}

    Can be differentiated once.

    Args:
        weight_MH: (M, H) the messages' weights.
        value_UGC: (U, H, C) the senders' values, or (U, 1, C) if all heads share them.
        edges: the messages.
    """
    _transpose_where_compiled(edges)
    return _WeightedSum.apply(weight_MH, value_UGC, edges)


def dot(query_RHC: Tensor, key_UGC: Tensor, edges: Edges) -> Tensor:
    r"""(M, H) the dot product of the two ends of each message.

    .. math:: s_{mh} = q_{r(m) h} \cdot k_{u(m) h}

    Can be differentiated once.

    Args:
        query_RHC: (R, H, C) the receivers' queries.
        key_UGC: (U, H, C) the senders' keys, or (U, 1, C) if all heads share them.
        edges: the messages.
    """
    _transpose_where_compiled(edges)
    return _Dot.apply(query_RHC, key_UGC, edges)


def add_ends(sent_UH: Tensor, received_RH: Tensor, edges: Edges) -> Tensor:
    r"""(M, H) the sum of what the two ends of each message have.

    .. math:: s_{mh} = a_{u(m) h} + b_{r(m) h}

    Can be differentiated once. The gradients are sums in the order of the messages: those of plain
    indexing sort their index first, on all threads.

    Args:
        sent_UH: (U, H) of the senders.
        received_RH: (R, H) of the receivers.
        edges: the messages.
    """
    _transpose_where_compiled(edges)
    return _AddEnds.apply(sent_UH, received_RH, edges)


def to_messages(value_R: Tensor, ptr: Tensor, receiver: Tensor) -> Tensor:
    """(M, ...) what the receiver of each message has.

    Can be differentiated once. The gradient is a sum in the order of the messages, see
    :func:`add_ends`.

    Args:
        value_R: (R, ...) of the receivers.
        ptr: (R + 1,) where the messages of each receiver start.
        receiver: (M,) in 0..R-1, ascending.
    """
    return _ToMessages.apply(value_R, ptr, receiver)


def softmax(score_MH: Tensor, edges: Edges) -> Tensor:
    r"""(M, H) the softmax over each receiver's messages.

    Can be differentiated once. PyG's takes twice as many operators, and three times in the
    backward.

    Args:
        score_MH: (M, H) the scores, in float32 at least.
        edges: the messages.
    """
    return _Softmax.apply(score_MH, edges.ptr, edges.receiver)


def blocks(start: int, end: int, width: int, device: torch.device) -> Iterator[slice]:
    """Cut the messages ``start:end`` into blocks, to be worked on one after the other.

    Args:
        start: the first message.
        end: the message after the last.
        width: numbers that each message takes.
        device: where they lie.
    """
    numbers = NUMBERS if device.type == "cpu" else NUMBERS_ON_GPU
    step = max(numbers // max(width, 1), 1)
    for first in range(start, end, step):
        yield slice(first, min(first + step, end))


def _transpose_where_compiled(edges: Edges) -> None:
    """Compiled code: make ``edges.transpose`` in the forward, since a backward could not keep it.

    The compiler drops the sort again where no gradient needs it.
    """
    has_backward = torch.is_grad_enabled() and not torch.compiler.is_exporting()
    if has_backward and torch.compiler.is_compiling():
        _ = edges.transpose


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_MH: Tensor, value_UGC: Tensor, edges: Edges) -> Tensor:
        ctx.save_for_backward(weight_MH, value_UGC)
        ctx.edges = edges
        return _sum_messages(weight_MH, value_UGC, edges.ptr, edges.sender, edges.receiver, None)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_RHC: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weight_MH, value_UGC = ctx.saved_tensors
        edges = ctx.edges
        grad_weight = None
        grad_value = None
        if ctx.needs_input_grad[0]:
            grad_weight = _multiply_ends(
                grad_RHC, value_UGC, edges.ptr, edges.sender, edges.receiver
            )
        if ctx.needs_input_grad[1]:
            grad_value = _sum_sent(weight_MH, grad_RHC, edges).sum_to_size(value_UGC.shape)
        return grad_weight, grad_value, None


class _Dot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_RHC: Tensor, key_UGC: Tensor, edges: Edges) -> Tensor:
        ctx.save_for_backward(query_RHC, key_UGC)
        ctx.edges = edges
        return _multiply_ends(query_RHC, key_UGC, edges.ptr, edges.sender, edges.receiver)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_MH: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        query_RHC, key_UGC = ctx.saved_tensors
        edges = ctx.edges
        grad_query = None
        grad_key = None
        if ctx.needs_input_grad[0]:
            grad_query = _sum_messages(
                grad_MH, key_UGC, edges.ptr, edges.sender, edges.receiver, None
            )
        if ctx.needs_input_grad[1]:
            grad_key = _sum_sent(grad_MH, query_RHC, edges).sum_to_size(key_UGC.shape)
        return grad_query, grad_key, None


class _AddEnds(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sent_UH: Tensor, received_RH: Tensor, edges: Edges) -> Tensor:
        ctx.edges = edges
        sent_MH = sent_UH.index_select(0, edges.sender)
        return sent_MH + received_RH.index_select(0, edges.receiver)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_MH: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        edges = ctx.edges
        grad_sent = None
        grad_received = None
        if ctx.needs_input_grad[0]:
            back = edges.transpose
            grad_sent = _sum_values(grad_MH, back.ptr, back.receiver, back.order)
        if ctx.needs_input_grad[1]:
            grad_received = _sum_values(grad_MH, edges.ptr, edges.receiver, None)
        return grad_sent, grad_received, None


class _ToMessages(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value_R: Tensor, ptr: Tensor, receiver: Tensor) -> Tensor:
        ctx.save_for_backward(ptr, receiver)
        return value_R.index_select(0, receiver)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Tensor, None, None]:
        sum_R = _sum_values(grad_M.flatten(1), *ctx.saved_tensors, None)
        return sum_R.unflatten(1, grad_M.shape[1:]), None, None


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, score_MH: Tensor, ptr: Tensor, receiver: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            largest_RH = exported.largest(score_MH, receiver, ptr.size(0) - 1)
        else:
            largest_RH = segment(score_MH, ptr, reduce="max")
        exp_MH = (score_MH - largest_RH.index_select(0, receiver)).exp_()
        sum_RH = _sum_values(exp_MH, ptr, receiver, None)
        alpha_MH = exp_MH / sum_RH.index_select(0, receiver)
        ctx.save_for_backward(alpha_MH, ptr, receiver)
        return alpha_MH

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_MH: Tensor) -> tuple[Tensor, None, None]:
        alpha_MH, ptr, receiver = ctx.saved_tensors
        product_MH = grad_MH * alpha_MH
        mean_RH = _sum_values(product_MH, ptr, receiver, None)
        return product_MH - alpha_MH * mean_RH.index_select(0, receiver), None, None


def _sum_sent(weight_MH: Tensor, value_RHC: Tensor, edges: Edges) -> Tensor:
    """(U, H, C) the weighted sum, over each sender's messages, of their receivers' values."""
    back = edges.transpose
    return _sum_messages(weight_MH, value_RHC, back.ptr, back.sender, back.receiver, back.order)


# the kernels --------------------------------------------------------------------------------------


def check_nodes(row: Tensor, size: int) -> None:
    """Refuse edges outside the nodes: sums over them would read and write elsewhere."""
    if row.device.type != "cpu":
        # On the device, whenever it gets to it: a message with the values would cost a host sync.
        is_inside = ((row >= 0) & (row < size)).all()
        assert_async(is_inside, f"edge_index: got nodes outside 0..{size - 1}")
    elif row.numel():
        low, high = map(int, row.aminmax())
        if low < 0 or high >= size:
            raise ValueError(
                f"edge_index: got nodes {low}..{high}, expected values in 0..{size - 1}"
            )


def _empty_edges(
    sender: Tensor, receiver: Tensor, _: int, num_receivers: int, *__: Any
) -> tuple[Tensor, ...]:
    return receiver.new_empty(num_receivers + 1), *(torch.empty_like(sender) for _ in range(3))


@operator(fake=_empty_edges)
def _sort_edges(
    sender: Tensor, receiver: Tensor, num_senders: int, num_receivers: int, validate: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row pointers, senders, receivers and order of the edges by receiver.

    Checks them first, inside the operator, so that compiled code keeps the check.
    """
    if torch.compiler.is_exporting():
        return exported.sort_edges(sender, receiver, num_receivers)
    if validate:
        check_nodes(sender, num_senders)
        check_nodes(receiver, num_receivers)
    if receiver.device.type == "cpu" and num_receivers <= RADIX_RECEIVERS:
        short = receiver.numpy().astype(np.uint16)  # NumPy sorts 16 bits by radix
        order = torch.from_numpy(short.argsort(kind="stable"))
    else:
        order = receiver.argsort(stable=True)
    receiver = receiver.index_select(0, order)
    ptr = row_pointers(receiver, num_receivers)
    return ptr, sender.index_select(0, order), receiver, order


def _empty_messages(
    ptr: Tensor, receivers: Tensor, number: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    num_messages = torch.library.get_ctx().new_dynamic_size() if number is None else number
    starts = ptr.new_empty(receivers.size(0) + 1)
    return ptr.new_empty(num_messages), ptr.new_empty(num_messages), starts


@operator(fake=_empty_messages)
def _find_messages(
    ptr: Tensor, receivers: Tensor, number: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See :meth:`Edges.of`."""
    first = ptr.index_select(0, receivers)
    degree = ptr.index_select(0, receivers + 1) - first
    starts = torch.cat([ptr.new_zeros(1), degree.cumsum(0)])
    if number is not None and torch.compiler.is_exporting():
        position = exported.positions(starts[1:], number)
    else:
        place = torch.arange(receivers.size(0), device=ptr.device)
        position = place.repeat_interleave(degree, output_size=number)
    # A receiver's messages are consecutive, in the graph and here: their numbers differ by a shift.
    shift = (first - starts[:-1]).index_select(0, position)
    message = torch.arange(position.size(0), device=ptr.device) + shift
    return message, position, starts


def _empty_loops(ptr: Tensor, sender: Tensor, _: Tensor, number: int) -> tuple[Tensor, ...]:
    edges = (sender.new_empty(sender.size(0) + number) for _ in range(3))
    return ptr.new_empty(ptr.shape), *edges


@operator(fake=_empty_loops)
def _add_loops(
    ptr: Tensor, sender: Tensor, receiver: Tensor, number: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :meth:`Edges.with_loops`.

    A receiver's loop becomes its last message: nothing has to be sorted.
    """
    # 1. Each of the first receivers gets one message more.
    loops_before = torch.arange(ptr.size(0), device=ptr.device).clamp(max=number)
    ptr = ptr + loops_before

    # 2. The place of each edge, behind the loops of the receivers before; and of each loop.
    rank = torch.arange(sender.size(0), device=ptr.device)
    place = torch.cat([rank + receiver.clamp(max=number), ptr[1 : number + 1] - 1])
    order = torch.empty_like(place)
    order.index_copy_(0, place, torch.arange(place.size(0), device=ptr.device))

    # 3. Both ends of the messages, in this order.
    node = torch.arange(number, device=ptr.device)
    senders = torch.cat([sender, node]).index_select(0, order)
    receivers = torch.cat([receiver, node]).index_select(0, order)
    return ptr, senders, receivers, order


def _empty_sums(weight_MH: Tensor, value_UGC: Tensor, ptr: Tensor, *_: Any) -> Tensor:
    dtype = torch.promote_types(weight_MH.dtype, value_UGC.dtype)
    shape = (ptr.size(0) - 1, weight_MH.size(1), value_UGC.size(2))
    return value_UGC.new_empty(shape, dtype=dtype)


@operator(fake=_empty_sums)
def _sum_messages(
    weight_MH: Tensor,
    value_UGC: Tensor,
    ptr: Tensor,
    sender: Tensor,
    receiver: Tensor,
    order: Tensor | None,
) -> Tensor:
    """(R, H, C) the sums, in float32 at least; no row for each message is kept.

    If an order is given, message ``m`` has the weights ``order[m]``.
    """
    dtype = torch.promote_types(weight_MH.dtype, value_UGC.dtype)
    exact = torch.promote_types(dtype, torch.float32)
    num_receivers = ptr.numel() - 1
    if torch.compiler.is_exporting():
        weight_MH, value_UGC = weight_MH.to(exact), value_UGC.to(exact)
        sum_RHC = exported.sum_messages(weight_MH, value_UGC, sender, receiver, num_receivers)
        return sum_RHC.to(dtype)
    weights = weight_MH.to(exact).T.contiguous()
    values = value_UGC.to(exact).expand(-1, weight_MH.size(1), -1).unbind(1)
    sums: list[Tensor] = []
    for weight_M, value_UC in zip(weights, values, strict=True):
        if order is not None:  # head by head: rows of one number are slow to gather
            weight_M = weight_M.index_select(0, order)
        if value_UC.device.type in SPARSE_DEVICES and weight_M.numel():
            # The messages of a receiver are a bag. A sparse product gives the same float32 numbers
            # in two to three times the time.
            sum_RC, *_ = torch.embedding_bag(
                value_UC.contiguous(),
                sender,
                ptr,
                mode=0,  # sum
                per_sample_weights=weight_M,
                include_last_offset=True,
            )
        else:
            sum_RC = value_UC.new_zeros(num_receivers, value_UC.size(1))
            for block in blocks(0, weight_M.numel(), value_UC.size(1), value_UC.device):
                value_BC = value_UC.index_select(0, sender[block]) * weight_M[block, None]
                sum_RC.index_add_(0, receiver[block], value_BC)
        sums.append(sum_RC)
    if len(sums) == 1:
        # .data: Matrix adds its diagonal to the sum in place, which autograd refuses for a view.
        return sums[0][:, None].data.to(dtype)
    return torch.stack(sums, dim=1).to(dtype)


def _empty_sums_of_values(value_MH: Tensor, ptr: Tensor, *_: Any) -> Tensor:
    return value_MH.new_empty(ptr.size(0) - 1, value_MH.size(1))


@operator(fake=_empty_sums_of_values)
def _sum_values(value_MH: Tensor, ptr: Tensor, receiver: Tensor, order: Tensor | None) -> Tensor:
    """(R, H) the sum of each receiver's messages, one after the other, in float32 at least.

    If an order is given, message ``m`` has the values ``order[m]``.
    """
    dtype = value_MH.dtype
    value_MH = value_MH.to(torch.promote_types(dtype, torch.float32))
    is_plain = torch.compiler.is_exporting() or value_MH.device.type not in SPARSE_DEVICES
    if is_plain or not len(receiver):
        if order is not None:
            value_MH = value_MH.index_select(0, order)
        zeros = value_MH.new_zeros(ptr.numel() - 1, value_MH.size(1))
        return zeros.index_add_(0, receiver, value_MH).to(dtype)
    if order is None:
        order = torch.arange(len(receiver), device=receiver.device)
    # mode 0: sum
    sum_RH, *_ = torch.embedding_bag(
        value_MH.contiguous(), order, ptr, mode=0, include_last_offset=True
    )
    return sum_RH.to(dtype)


def _empty_products(
    query_RHC: Tensor, key_UGC: Tensor, _: Tensor, sender: Tensor, *__: Any
) -> Tensor:
    dtype = torch.promote_types(query_RHC.dtype, key_UGC.dtype)
    return query_RHC.new_empty(sender.size(0), query_RHC.size(1), dtype=dtype)


@operator(fake=_empty_products)
def _multiply_ends(
    query_RHC: Tensor, key_UGC: Tensor, ptr: Tensor, sender: Tensor, receiver: Tensor
) -> Tensor:
    """(M, H) the dot product of the two ends of each message, computed in float32 at least."""
    dtype = torch.promote_types(query_RHC.dtype, key_UGC.dtype)
    exact = torch.promote_types(dtype, torch.float32)
    size = (ptr.numel() - 1, key_UGC.size(0))
    num_messages = sender.numel()
    if torch.compiler.is_exporting():
        query_RHC, key_UGC = query_RHC.to(exact), key_UGC.to(exact)
        return exported.multiply_ends(query_RHC, key_UGC, sender, receiver).to(dtype)
    # torch cuts a matrix down to as many entries as it has cells.
    fits_matrix = 0 < num_messages <= size[0] * size[1]
    queries = query_RHC.to(exact).unbind(1)
    keys = key_UGC.to(exact).expand(-1, query_RHC.size(1), -1).unbind(1)
    products: list[Tensor] = []
    for query_RC, key_UC in zip(queries, keys, strict=True):
        product_M = query_RC.new_zeros(num_messages)
        if query_RC.device.type in SPARSE_DEVICES and fits_matrix:
            matrix = torch.sparse_csr_tensor(ptr, sender, product_M, size, check_invariants=False)
            torch.sparse.sampled_addmm(
                matrix, query_RC.contiguous(), key_UC.contiguous().T, out=matrix
            )
            product_M = matrix.values()
        else:
            for block in blocks(0, num_messages, query_RC.size(1), query_RC.device):
                query_BC = query_RC.index_select(0, receiver[block])
                key_BC = key_UC.index_select(0, sender[block])
                torch.sum(query_BC * key_BC, dim=-1, out=product_M[block])
        products.append(product_M)
    return torch.stack(products, dim=1).to(dtype)
