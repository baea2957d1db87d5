"""Routing by a type that the model is called with, such as the element of an atom.

Shapes: T tokens, G groups, E experts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gmoe._checks import INTEGERS, check, described, is_whole, readable
from gmoe._torch import assert_async
from gmoe.portable import refuse_in_export
from gmoe.routers.from_call import FromCall
from gmoe.routing import Routing


@dataclass(frozen=True)
class ByType(FromCall):
    """A router for all layers of a model: each token goes to the expert of its type, by weight 1.

    Pass it to :func:`gmoe.moefy`. The types are an argument of the model's ``forward``. They are
    read once in each call of the model, and all layers share the one decision. It depends neither
    on features nor on positions, so that the model stays as smooth as the dense one; nothing has
    to be balanced, and ``num_experts`` is the number of values.

    Tokens may be nodes or edges: a linear layer on the nodes of ``data.to_homogeneous()``, routed
    by its ``node_type``, or one on messages, by ``edge_type``, is PyG's ``HeteroLinear``. PyG's
    ``HeteroConv`` has weights for each relation already.

    In a model of your own layers, use it as the factory of their routers, and ``attach(model)``
    once. Compile the whole model, not a part of it. Of a model, one thread at a time may be inside
    a call.

    With ``batch``, a decision is one for each group of tokens, such as a molecule, which is what
    ``mix="weights"`` needs. If the argument holds a type for each group, such as its source, the
    group goes to the expert of its type. If it holds one for each token, the group is routed by its
    composition: to all experts, by the shares of their types; to mix outputs that costs E times one
    expert.

    Args:
        argument: the name of the argument, or ``"data.NAME"`` for an attribute of one; it holds an
            integer for each token, or, with ``batch``, for each group.
        values: the type of each expert. A token of another type goes to no expert: beside a shared
            expert that is the shared one alone, else it is an error.
        batch: the name of the argument that holds the group of each token, PyG's ``batch``; if the
            model is called with ``None``, all tokens are one group. ``None`` (default) routes each
            token by itself.

    Raises:
        ValueError: no name, or values that are no distinct integers.

    Example:
        >>> by_element = gmoe.routers.ByType("z", [1, 6, 7, 8, 9, 16, 17])
        >>> model = gmoe.moefy(SchNet(), targets="interactions.*.lin", router=by_element,
        ...                    start="copies")
        >>> energy = model(z, pos, batch)
    """

    values: Sequence[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        is_legal = isinstance(self.values, Collection) and len(self.values) > 0
        is_legal = is_legal and all(map(is_whole, self.values))
        is_legal = is_legal and all(-(2**63) <= value < 2**63 for value in self.values)
        check(
            is_legal and len({*self.values}) == len(self.values),
            "values",
            repr(self.values),
            "distinct integers, one for each expert",
        )
        object.__setattr__(self, "values", tuple(map(int, self.values)))

    def experts_of(self, *, num_experts: int | None, model: nn.Module | None = None) -> int:
        expected = len(self.values)
        legal = f"{expected}, one for each value of the router"
        check(num_experts in (None, expected), "num_experts", num_experts, legal)
        return expected

    def k_of(self, *, num_experts: int) -> int:
        return 1 if self.batch is None else num_experts

    def decide(self, value: Any, batch_T: Any, takes_others: bool, model: nn.Module) -> Routing:
        if not isinstance(value, Tensor) or value.dtype not in INTEGERS:
            each = "token" if self.batch is None else "group"
            raise ValueError(
                f"{self.argument}: got {described(value)}, expected a tensor of integers, "
                f"one a {each}: number names, and leave types of nodes and relations to PyG's "
                "HeteroConv"
            )
        type_T = value.reshape(-1).long()  # of narrow integers, 255 may be -1
        # One by one: a list of values would be copied to the device, for which the host waits.
        is_type_TE = torch.stack([type_T == value for value in self.values], dim=1)
        is_known_T = is_type_TE.any(dim=1)
        if not takes_others:
            self._check_known(type_T, is_known_T)
        group_T = self.group_of(batch_T, type_T)
        if self.batch is not None and group_T is None and type_T.size(0) != 1:
            group_T = torch.zeros_like(type_T)
        if group_T is not None and group_T.size(0) == type_T.size(0):
            self._check_told_apart(group_T)
            return _of_composition(is_type_TE, group_T)
        # A token of another type gets the first expert by weight 0: how many there are depends on
        # the data, and nothing should wait for it.
        routing = Routing.from_choices(
            is_type_TE.int().argmax(dim=1, keepdim=True),
            is_known_T.float()[:, None],
            num_experts=len(self.values),
            scores=is_type_TE.float(),
            validate=False,
        )
        return self.of_groups(routing, group_T)

    def _check_told_apart(self, group_T: Tensor) -> None:
        """Refuse as many types as tokens where they may be those of as many groups."""
        num_tokens = group_T.size(0)
        if not readable(group_T) or not num_tokens or group_T.max() != num_tokens - 1:
            return
        if not torch.equal(group_T, torch.arange(num_tokens, device=group_T.device)):
            raise ValueError(
                f"{self.argument}: got {num_tokens} types for {num_tokens} tokens in as many "
                "groups, some of them empty or out of order, which may be types of either; "
                "expected groups that each have a token, in order"
            )

    def _check_known(self, type_T: Tensor, is_known_T: Tensor) -> None:
        """Refuse types without an expert."""
        if not readable(type_T):
            message = f"{self.argument}: got other types, expected some of {self.values}"
            assert_async(is_known_T.all(), message)
        elif not is_known_T.all():
            others = sorted({*type_T[~is_known_T].tolist()})
            raise ValueError(
                f"{self.argument}: got types {others} without an expert, expected some of "
                f"{[*self.values]}; or start='shared', which leaves them to the shared expert"
            )


def _of_composition(is_type_TE: Tensor, batch_T: Tensor) -> Routing:
    """All experts for each token, by the shares of the types in its group."""
    refuse_in_export("the composition of groups", "a type for each group")
    _, group_T, size_G = torch.unique(batch_T, return_inverse=True, return_counts=True)
    # Shares that sum to 1 in double precision, too, which this device may not have.
    dtype = torch.float32 if is_type_TE.device.type == "mps" else torch.float64
    count_GE = is_type_TE.new_zeros(size_G.size(0), is_type_TE.size(1), dtype=dtype)
    count_GE = count_GE.index_add(0, group_T, is_type_TE.to(dtype))
    return Routing.to_all(count_GE / size_G[:, None]).expand(group_T)
