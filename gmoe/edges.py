"""Messages along edges: the one place where edges are sorted. Sums are in :mod:`gmoe.sums`.

Shapes: M edges or messages, U senders, R receivers.

The kernels are operators of torch (``torch.ops.gmoe``), opaque to ``torch.compile``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gmoe import portable
from gmoe._autograd import lazy, operator
from gmoe._checks import readable
from gmoe._torch import assert_async, row_pointers
from gmoe.portable import exported_as

RADIX_RECEIVERS = 2**16
"""Up to this many receivers, NumPy's radix sort takes a tenth to a half of torch's time."""

BLOCK = 2**20
"""Values of a row of edges that are compared at once."""


@dataclass(eq=False)
class Edges:
    """Messages sorted by receiver: the structure of a CSR matrix.

    Args:
        ptr: (R + 1,) where the messages of each receiver start.
        sender: (M,) in 0..U-1.
        receiver: (M,) in 0..R-1, ascending.
        num_senders: U.
        given_order: (M,) the position of each message among the edges as they were given; ``None``
            if they were given in this order.
    """

    ptr: Tensor
    sender: Tensor
    receiver: Tensor
    num_senders: int
    given_order: Tensor | None

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

    @property
    def order(self) -> Tensor:
        """(M,) the position of each message among the edges as they were given."""
        if self.given_order is None:
            return torch.arange(self.sender.numel(), device=self.sender.device)
        return self.given_order

    def as_given(self, message: Tensor) -> Tensor:
        """(m,) the positions of some messages among the edges as they were given."""
        if self.given_order is None:
            return message
        return self.given_order.index_select(0, message)

    @lazy
    def transpose(self) -> Edges:
        """The same messages sent the other way."""
        return Edges.sorted(
            self.receiver, self.sender, self.num_receivers, self.num_senders, validate=False
        )

    def to(self, device: torch.device | str) -> Edges:
        """The same edges on another device."""
        given = vars(self).items()
        moved: Any = {name: part.to(device) for name, part in given if isinstance(part, Tensor)}
        return replace(self, **moved)

    def of(self, receivers: Tensor, number: int | None = None) -> Edges:
        """The messages of some receivers, one receiver after the other, which are counted anew.

        ``order`` has the places of the messages among these edges.

        Args:
            receivers: (r,) integers; a receiver may occur several times.
            number: m, where it is known. Else it is read from the device, for which the host waits.
        """
        message, position, ptr = _find_messages(self.ptr, receivers, number)
        sender = self.sender.index_select(0, message)
        return Edges(ptr, sender, position, self.num_senders, message)


def renumber(first: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Number the nodes of a part of a graph anew.

    Args:
        first: (n,) distinct nodes, which come first.
        others: (m,) nodes, in any order and as often as they occur.

    Returns:
        (S,) the distinct nodes of both, and (m,) the place of each of ``others`` among them.
    """
    ascending, place = torch.cat([first, others]).unique(return_inverse=True)
    place_of_first, place_of_others = place.split([first.numel(), others.numel()])
    is_first = torch.zeros_like(ascending, dtype=torch.bool)
    is_first[place_of_first] = True
    nodes = torch.cat([first, ascending[~is_first]])
    number = torch.empty_like(ascending)
    number[torch.cat([place_of_first, (~is_first).nonzero()[:, 0]])] = torch.arange(
        nodes.numel(), device=nodes.device
    )
    return nodes, number[place_of_others]


def ascends(row: Tensor) -> bool:
    """True if values on the CPU can be read, and none is below the one before it.

    They are read in blocks, since they may lie in a file.
    """
    if not readable(row):
        return False
    firsts = range(0, row.numel(), BLOCK)
    return all(bool((row[first : first + BLOCK + 1].diff() >= 0).all()) for first in firsts)


def check_ends(edge_index: Tensor, num_senders: int, num_receivers: int) -> None:
    """Refuse edges outside the nodes: sums over them would read and write elsewhere."""
    if num_senders == num_receivers:
        check_nodes(edge_index, num_senders)
    else:
        check_nodes(edge_index[0], num_senders)
        check_nodes(edge_index[1], num_receivers)


def check_nodes(node: Tensor, size: int) -> None:
    """Refuse nodes outside 0..size-1."""
    if node.device.type != "cpu":
        # On the device, whenever it gets to it: a message with the values would cost a host sync.
        is_inside = node.clamp(0, size - 1) == node
        assert_async(is_inside.all(), f"edge_index: got nodes outside 0..{size - 1}")
    elif type(node) is Tensor and node.numel():  # fake ones have no values
        low, high = map(int, node.aminmax())
        if low < 0 or high >= size:
            raise ValueError(
                f"edge_index: got nodes {low}..{high}, expected values in 0..{size - 1}"
            )


def _empty_edges(
    sender: Tensor, receiver: Tensor, _: int, num_receivers: int, *__: Any
) -> tuple[Tensor, ...]:
    return receiver.new_empty(num_receivers + 1), *(torch.empty_like(sender) for _ in range(3))


@operator(fake=_empty_edges, portable=portable.sort_edges)
def _sort_edges(
    sender: Tensor, receiver: Tensor, num_senders: int, num_receivers: int, validate: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row pointers, senders, receivers and order of the edges by receiver.

    Checks them inside the operator, so that compiled code keeps the check.
    """
    if validate:
        check_nodes(sender, num_senders)
        check_nodes(receiver, num_receivers)
    if receiver.device.type == "cpu" and num_receivers <= RADIX_RECEIVERS:
        import numpy as np  # here, to keep the import of gmoe light

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
    position = _positions(degree, number)
    # A receiver's messages are consecutive, in the graph and here: their numbers differ by a shift.
    shift = (first - starts[:-1]).index_select(0, position)
    message = torch.arange(position.size(0), device=ptr.device) + shift
    return message, position, starts


@exported_as(portable.positions)
def _positions(size: Tensor, number: int | None) -> Tensor:
    """(number,) the part in which each place lies, given the sizes of the parts."""
    part = torch.arange(size.size(0), device=size.device)
    return part.repeat_interleave(size, output_size=number)
