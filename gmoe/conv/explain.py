"""What PyG's explainers need of layers that send no messages themselves.

An explainer puts a mask on each ``MessagePassing`` module and counts a hop for each. A layer of
experts is one such module: its prototypes are hidden, and the mask goes along with the graph.

Shapes: M edges.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NoReturn, TypeVar

from torch import Tensor, nn
from torch_geometric.explain.algorithm.utils import set_masks
from torch_geometric.nn import MessagePassing

Layer = TypeVar("Layer", bound=MessagePassing)


def mask_of(conv: MessagePassing, num_edges: int) -> Tensor:
    """(M,) the factors that an explainer of this conv puts on its messages.

    Raises:
        ValueError: an explainer that looks at single messages: convs that aggregate in one product
            do not have them.
    """
    mask = conv._edge_mask
    if not isinstance(mask, Tensor) or mask.shape != (num_edges,):
        got = getattr(mask, "shape", "an explainer without a mask")
        raise ValueError(
            f"explain: got {got}, expected one of the {num_edges} edges: GNNExplainer, "
            "PGExplainer and CaptumExplainer work"
        )
    return mask.sigmoid() if conv._apply_sigmoid else mask


def with_mask(conv: Any, mask: Tensor, edge_index: Tensor) -> Any:
    """A copy of a conv whose messages are masked; another thread may be running the conv itself."""
    masked = copy.copy(conv)
    set_masks(masked, mask, edge_index, apply_sigmoid=False)
    return masked


class HidesPrototype(nn.Module):
    """A module whose ``prototype`` is none of its modules for who lists them.

    The prototype has no parameters; ``to``, ``train`` and ``state_dict``, which go by children,
    reach it.
    """

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """All modules but the prototype."""
        memo = set() if memo is None else memo
        if self in memo:
            return
        if remove_duplicate:
            memo.add(self)
        yield prefix, self
        for name, module in self.named_children():
            if name != "prototype":
                path = f"{prefix}.{name}" if prefix else name
                yield from module.named_modules(memo, path, remove_duplicate)


def sends_no_messages(cls: type[Layer]) -> type[Layer]:
    """Let a class refuse hooks of message passing, such as AttentionExplainer's."""
    for step in ("propagate", "message", "aggregate", "message_and_aggregate", "edge_update"):
        for when in ("forward_pre", "forward"):
            setattr(cls, f"register_{step}_{when}_hook", _refuse_hook)
    return cls


def _refuse_hook(layer: nn.Module, hook: Any) -> NoReturn:
    """Refuse a hook: nothing would call it.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"hook: got {hook}, expected none on a MoEConv, which sends no messages itself"
    )
