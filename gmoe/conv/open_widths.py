"""Widths that a layer's first call fills in, as those of PyG's layers are."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from gmoe._checks import described
from gmoe._torch import LateState


class OpenWidths(LateState):
    """A layer whose ``in_channels`` may be -1: it is built by its first call.

    Until then ``unbuilt`` stands for all its parameters: it knows their type and device, and torch
    refuses what needs them, such as DDP and freezing.
    """

    in_channels: int | tuple[int, int]
    experts: Any
    """``None`` until the layer is built."""
    unbuilt: UninitializedParameter
    widths: tuple[int, int]

    @abstractmethod
    def _build(self, in_channels: int | tuple[int, int], widths: tuple[int, int]) -> None:
        """Make the parameters, once the widths are known."""

    def _leave_open(self) -> None:
        """Let the first call build the layer."""
        self.unbuilt = UninitializedParameter()

    def _complete(self, x: Any) -> None:
        """Fill in the widths that were left open, and build.

        Raises:
            ValueError: features that are no matrices of floats, or that the convs do not take; the
                layer stays open.
        """
        pair = tuple(x) if isinstance(x, tuple | list) else (x, x)
        are_nodes = len(pair) == 2 and all(
            isinstance(nodes, Tensor) and nodes.dim() == 2 and nodes.is_floating_point()
            for nodes in pair
        )
        if not are_nodes:
            raise ValueError(
                f"x: got {[*map(described, pair)]}, expected source and destination nodes, since "
                "widths are open"
            )
        widths: Any = tuple(
            nodes.size(-1) if width == -1 else width
            for width, nodes in zip(self.widths, pair, strict=True)
        )
        is_one_set = isinstance(self.in_channels, int) and pair[0] is pair[1]
        in_channels = widths[0] if is_one_set else widths
        if torch.is_grad_enabled():
            warnings.warn(
                f"{type(self).__name__}: this call fills in the width that was -1, and makes the "
                "parameters: an optimizer that was made before does not train them. Call the model "
                "under torch.no_grad() first",
                stacklevel=5,
            )
        with torch.inference_mode(False):  # the parameters are for training too
            self._build(in_channels, widths)  # the layer stays open if it fails
            unbuilt = self.unbuilt
            del self.unbuilt
            self.to(unbuilt.device, unbuilt.dtype)
        self.train(self.training)
        self.in_channels = in_channels
        self.widths = widths

    def is_built(self) -> bool:
        return self.experts is not None

    def refuse_state(self) -> None:
        raise RuntimeError(
            f"in_channels: got {self.in_channels}, expected a call to fill it in before a state is "
            "loaded"
        )
