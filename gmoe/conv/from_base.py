"""Convs that share a base; see :mod:`gmoe.from_base`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch_geometric.nn import MessagePassing

from gmoe.conv.base import ConvExperts
from gmoe.conv.call import Call
from gmoe.from_base import FromBase


class ConvsFromBase(FromBase, ConvExperts):
    """E convs of one kind, each a base and a difference.

    Args:
        base: one conv.
        differences: E convs of its kind, run in the same way.
    """

    def __init__(self, base: ConvExperts, differences: ConvExperts) -> None:
        super().__init__(base, differences)
        self.flow = differences.flow

    def aggregate(self, call: Call) -> Tensor | None:
        return self.differences.aggregate(call)

    @property
    def aggregate_width(self) -> int | None:
        return self.differences.aggregate_width

    @property
    def dtype(self) -> torch.dtype | None:
        return self.differences.dtype

    @property
    def too_far(self) -> list[MessagePassing]:
        return self.differences.too_far

    def convs(self) -> list[MessagePassing]:
        return self.differences.convs()

    @torch.no_grad()
    def expert(self, index: int) -> MessagePassing:
        conv = self.differences.expert(index)
        base = self.base.expert(0)
        for difference, value in zip(conv.parameters(), base.parameters(), strict=True):
            difference += value
        return conv

    def become(self, conv: MessagePassing) -> None:
        self.base.become(conv)
        self.differences.become(conv)  # its buffers
        self._zero_differences()
