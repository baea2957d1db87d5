"""Widths that a layer's first call fills in, as those of PyG's layers are."""

from __future__ import annotations

import copy
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter
from torch_geometric.nn import MessagePassing
from torch_geometric.nn.inits import reset
from torch_geometric.typing import Adj

from gmoe._checks import described, parameters_of
from gmoe._torch import LateState
from gmoe.conv.graph import Graph
from gmoe.start import drawn_apart


class OpenWidths(LateState):
    """A layer whose ``in_channels`` may be -1: it is built by its first call.

    Until then ``unbuilt`` stands for all its parameters: it knows their type and device, and torch
    refuses what needs them, such as DDP and freezing.

    PyG draws a lazy layer's tensors in two turns, some when it is built and some in its first call.
    So that the layer starts as its dense conv, that conv waits inside, open as PyG's are.
    """

    in_channels: int | tuple[int, int]
    experts: Any
    """``None`` until the layer is built."""
    unbuilt: UninitializedParameter
    widths: tuple[int, int]
    waiting: list[MessagePassing]
    """The dense conv of open widths, if there is one; in a list, since it is no part with a state
    to save."""

    @abstractmethod
    def _open_dense(self) -> MessagePassing | None:
        """The dense conv of open widths that the layer starts as; ``None`` if there is none."""

    @abstractmethod
    def _build(
        self,
        in_channels: int | tuple[int, int],
        widths: tuple[int, int],
        drawn: MessagePassing | None = None,
    ) -> None:
        """Make the parameters, once the widths are known.

        Args:
            in_channels: as in the constructor.
            widths: of sources and destinations.
            drawn: a dense conv whose tensors the layer starts with (default: draw one).
        """

    def _leave_open(self) -> None:
        """Let the first call build the layer."""
        self.unbuilt = UninitializedParameter()
        dense = self._open_dense()
        self.waiting = [] if dense is None else [dense]

    def _reset_open(self) -> None:
        """Draw anew what is drawn before the first call."""
        for dense in self.waiting:
            reset(dense)

    def _drawn(
        self, x: Any, edge_index: Adj | Graph, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> MessagePassing | None:
        """The dense conv after it was called as the layer is, which draws its open tensors.

        It draws its dropouts, too, as it does in a dense model. What waits stays open.
        """
        for dense in self.waiting:
            conv = copy.deepcopy(dense).to(self.unbuilt.device, self.unbuilt.dtype)
            conv.train(self.training)
            given = {name: value for name, value in kwargs.items() if value is not None}
            if isinstance(edge_index, Graph):
                given |= edge_index.args_for(conv)
                edge_index = edge_index.adj
            taken = parameters_of(conv)
            given = {name: value for name, value in given.items() if name in taken}
            try:
                with torch.no_grad():
                    conv(x, edge_index, *args, **given)
            except Exception:  # no dense layer runs so, as PyG's lazy TAG: there is none to equal
                return None
            for name, buffer in dense.named_buffers():  # running statistics come later
                conv.get_buffer(name).copy_(buffer)
            return conv
        return None

    def complete(
        self, x: Any, edge_index: Adj | Graph, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        """Fill in the widths that were left open, and build.

        Args:
            x, edge_index, args, kwargs: of the call, those behind the edges by position and by
                name.

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
        is_one_width = isinstance(self.in_channels, int) and widths[0] == widths[1]
        in_channels = widths[0] if is_one_width else widths
        if torch.is_grad_enabled():
            warnings.warn(
                f"{type(self).__name__}: this call fills in the width that was -1, and makes the "
                "parameters: an optimizer that was made before does not train them. Call the model "
                "under torch.no_grad() first",
                stacklevel=6,
            )
        with torch.inference_mode(False):  # the parameters are for training too
            drawn = self._drawn(x, edge_index, args, kwargs)
            self._build(in_channels, widths, drawn)  # the layer stays open if it fails
            unbuilt = self.unbuilt
            del self.unbuilt, self.waiting
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


def first_call(
    layer: Any,
    x: Any,
    edge_index: Adj | Graph,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """Call a layer of open widths, after they were filled in.

    Its dense conv has drawn what a dense model draws, so that nothing else may be drawn.
    """
    layer.complete(x, edge_index, args, kwargs)
    with drawn_apart(True):
        return layer.forward(x, edge_index, *args, **kwargs)
