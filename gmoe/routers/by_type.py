"""Routing by a type that the model is called with, such as the element of an atom.

Shapes: T tokens, G groups, E experts, D width.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from gmoe._checks import INTEGERS, check, check_module, described, is_whole, readable
from gmoe._torch import (
    assert_async,
    forward_hooks,
    in_backward,
    keeps_graph,
    remove_forward_hooks,
    untraced,
)
from gmoe.routers.base import Router
from gmoe.routing import Routing

Key: TypeAlias = tuple[str, tuple[int, ...], str | None]


@dataclass(frozen=True)
class ByType:
    """A router for all layers of a model: each token goes to the expert of its type, by weight 1.

    Pass it to :func:`gmoe.moefy`. The types are an argument of the model's ``forward``. They are
    read once in each call of the model, and all layers share the one decision. It depends neither
    on features nor on positions, so that the model stays as smooth as the dense one; nothing has
    to be balanced, and ``num_experts`` is the number of values.

    Tokens may be nodes or edges: a linear layer on the nodes of ``data.to_homogeneous()``, routed
    by its ``node_type``, or one on messages, by ``edge_type``, is PyG's ``HeteroLinear``. PyG's
    ``HeteroConv`` has weights for each relation already.

    In a model of your own layers, use it as the factory of their routers, and call :meth:`attach`
    once. Compile the whole model, not a part of it.

    With ``batch``, a group of tokens, such as a molecule, is routed by its composition: all its
    tokens go to all experts, whose weights are the shares of their types in the group. That is what
    ``mix="weights"`` needs; to mix outputs it costs E times one expert.

    Args:
        argument: the name of the argument; it holds an integer for each token.
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

    argument: str
    values: Sequence[int]
    batch: str | None = None
    _others: str = field(default="", init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, value in (("argument", self.argument), ("batch", self.batch)):
            check(
                (isinstance(value, str) and value.isidentifier())
                or (name, value) == ("batch", None),
                name,
                repr(value),
                "the name of an argument of the model's forward",
            )
        is_legal = len(self.values) > 0 and all(map(is_whole, self.values))
        is_legal = is_legal and all(-(2**63) <= value < 2**63 for value in self.values)
        check(
            is_legal and len({*self.values}) == len(self.values),
            "values",
            repr(self.values),
            "distinct integers, one for each expert",
        )
        object.__setattr__(self, "values", tuple(map(int, self.values)))
        # Once: compiled code takes no text that it would have to put together.
        others = f"{self.argument}: got other types, expected some of {[*self.values]}"
        object.__setattr__(self, "_others", others)

    @property
    def key(self) -> Key:
        """What a decision is kept under."""
        return self.argument, tuple(self.values), self.batch

    def __call__(self, dim: int, *, num_experts: int) -> TypeRouter:
        """Build the router of one layer."""
        expected = len(self.values)
        check(num_experts == expected, "num_experts", num_experts, f"{expected}, one a value")
        return TypeRouter(dim, self)

    def attach(self, model: nn.Module, *, takes_others: bool = False) -> None:
        """Let a model read the types in each call, once; :func:`gmoe.moefy` does so itself.

        Args:
            model: the module whose ``forward`` has the argument.
            takes_others: leave tokens of other types to shared experts (default ``False``: refuse
                them).

        Raises:
            ValueError: a model without such an argument.
        """
        check_module("model", model)
        types = _Argument.of("argument", self.argument, model)
        groups = None if self.batch is None else _Argument.of("batch", self.batch, model)
        decide = _Decide(self, types, groups, takes_others)
        before, _ = forward_hooks(model)
        if decide in before.values():
            return
        model.register_forward_pre_hook(decide, with_kwargs=True)
        model.register_forward_hook(_Forget(self), always_call=True)

    def routing(self, type_T: Any, takes_others: bool, batch_T: Any = None) -> Routing:
        """The decision for tokens of these types, and of these groups.

        Raises:
            ValueError: no integers; types without an expert (CPU tensors).
        """
        if not isinstance(type_T, Tensor) or type_T.dtype not in INTEGERS:
            raise ValueError(
                f"{self.argument}: got {described(type_T)}, expected integers, one for each token; "
                "types of nodes and relations have weights of their own in PyG's HeteroConv"
            )
        type_T = type_T.reshape(-1).long()  # of narrow integers, 255 may be -1
        # One by one: a list of values would be copied to the device, for which the host waits.
        is_type_TE = torch.stack([type_T == value for value in self.values], dim=1)
        is_known_T = is_type_TE.any(dim=1)
        if not takes_others:
            self._check_known(type_T, is_known_T)
        if self.batch is not None:
            return self._of_composition(is_type_TE, batch_T)
        # A token of another type gets the first expert by weight 0: how many there are depends on
        # the data, and nothing should wait for it.
        return Routing.from_choices(
            is_type_TE.int().argmax(dim=1, keepdim=True),
            is_known_T.float()[:, None],
            num_experts=len(self.values),
            scores=is_type_TE.float(),
            validate=False,
        )

    def _of_composition(self, is_type_TE: Tensor, batch_T: Any) -> Routing:
        """All experts for each token, by the shares of the types in its group."""
        num_tokens, num_experts = is_type_TE.shape
        if batch_T is None:
            batch_T = is_type_TE.new_zeros(num_tokens, dtype=torch.int64)
        is_fitting = isinstance(batch_T, Tensor) and batch_T.numel() == num_tokens
        if not is_fitting or batch_T.dtype not in INTEGERS:
            raise ValueError(
                f"{self.batch}: got {described(batch_T)}, expected integers, the group of each of "
                f"{num_tokens} tokens"
            )
        _, group_T, size_G = torch.unique(
            batch_T.reshape(-1), return_inverse=True, return_counts=True
        )
        # Shares that sum to 1 in double precision, too, which this device may not have.
        dtype = torch.float32 if is_type_TE.device.type == "mps" else torch.float64
        count_GE = is_type_TE.new_zeros(len(size_G), num_experts, dtype=dtype)
        count_GE = count_GE.index_add(0, group_T, is_type_TE.to(dtype))
        return Routing.to_all(count_GE / size_G[:, None]).expand(group_T)

    def _check_known(self, type_T: Tensor, is_known_T: Tensor) -> None:
        """Refuse types without an expert."""
        if not readable(type_T):
            assert_async(is_known_T.all(), self._others)
        elif not is_known_T.all():
            others = sorted({*type_T[~is_known_T].tolist()})
            raise ValueError(
                f"{self.argument}: got types {others} without an expert, expected some of "
                f"{[*self.values]}; or start='shared', which leaves them to the shared expert"
            )


class TypeRouter(Router):
    """The router of one layer under :class:`ByType`: it takes the decision of the model's call.

    Args:
        dim: D, the width of the tokens.
        by_type: the argument and its values.

    Raises:
        ValueError: in a call, another number of tokens than types; no call of the model around it.
    """

    by_token = True
    sums_to_one = True

    def __init__(self, dim: int, by_type: ByType) -> None:
        num_experts = len(by_type.values)
        super().__init__(
            dim, num_experts=num_experts, k=1 if by_type.batch is None else num_experts
        )
        self.by_type = by_type
        self._recent: list[Routing] = []
        self._was_recomputed = False

    def reset_parameters(self) -> None:
        """Nothing to draw."""

    def keep(self, kept: Sequence[int]) -> None:
        raise ValueError(
            f"kept: got {[*kept]}, expected all experts: each is the only one of its type"
        )

    def route(self, x_TD: Tensor, group: Tensor | int, edge_index: Tensor | None) -> Routing:
        name = self.by_type.argument
        routing = self._decision()
        if routing.num_tokens != len(x_TD):
            raise ValueError(
                f"{name}: got {routing.num_tokens} types, expected one for each of {len(x_TD)} "
                "tokens of the layer"
            )
        return routing

    def train(self, mode: bool = True) -> TypeRouter:
        self._recent.clear()  # of passes that nobody will differentiate now
        super().train(mode)
        return self

    def _decision(self) -> Routing:
        """That of the call around; or, where a checkpoint recomputes a forward, of that forward."""
        held = _held(self.by_type)
        if held:
            decision = held[-1]
            if not torch.compiler.is_compiling():
                self._remember(decision)
            return decision.routing
        if in_backward() and self._recent:
            # A graph that is kept may be recomputed once more, after other forward passes.
            self._was_recomputed |= not keeps_graph()
            if len(self._recent) > 1:
                raise RuntimeError(
                    f"{self.by_type.argument}: got several forward passes before the backward pass "
                    "of a checkpointed model, expected a backward pass after each"
                )
            return self._recent[0]
        raise RuntimeError(
            f"{self.by_type.argument}: got a call of a layer alone, expected a call of the whole "
            "model, to which ByType.attach was applied (and of which no part alone is compiled)"
        )

    def _remember(self, decision: _Decision) -> None:
        """Keep the decision for checkpoints that recompute this forward in the backward pass."""
        if in_backward() or not decision.has_gradients:
            return
        if self._was_recomputed:
            self._recent.clear()
            self._was_recomputed = False
        if not any(decision.routing is one for one in self._recent):
            self._recent = [*self._recent[-1:], decision.routing]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_recent": []}


def detach(model: nn.Module) -> None:
    """Let a model that has no layers by type anymore read no types."""
    remove_forward_hooks(model, (_Decide, _Forget))


# the decision of a call -----------------------------------------------------------------------


class _Decision(NamedTuple):
    """What was decided for a call of a model."""

    routing: Routing
    has_gradients: bool
    """The model was called with gradients on, even if a reentrant checkpoint turns them off."""


_BY_THREAD = threading.local()
_COMPILED: dict[Key, list[_Decision]] = {}
"""Of a call that is being traced: a compiler knows of no threads, and traces one at a time."""


def _store() -> dict[Key, list[_Decision]]:
    """Where the decisions of running calls are: those of this thread, or of what is traced."""
    if torch.compiler.is_compiling():
        return _COMPILED
    held: dict[Key, list[_Decision]] = _BY_THREAD.__dict__.setdefault("held", {})
    return held


def _held(by_type: ByType) -> list[_Decision]:
    """The decisions of the calls around, the innermost last."""
    # A part that is left out of compiled code is inside a call that is compiled.
    return _store().get(by_type.key) or _COMPILED.get(by_type.key, [])


@untraced
def _forget_eagerly(by_type: ByType) -> None:
    """Forget a decision that was made before the compiler gave up on the start of a call."""
    held = _held(by_type)
    if held:
        held.pop()


class _Argument(NamedTuple):
    """An argument of a model's forward."""

    name: str
    place: int | None
    """Among those by position; ``None`` for one by name alone."""
    default: Any

    @classmethod
    def of(cls, label: str, name: str, model: nn.Module) -> _Argument:
        """Look an argument up in the signature of a model.

        Args:
            label: what the user calls it, for an error.
            name: of the argument.
            model: the module whose ``forward`` has it.

        Raises:
            ValueError: a model without such an argument.
        """
        parameters = inspect.signature(model.forward).parameters
        found = parameters.get(name)
        check(
            found is not None and found.kind not in (found.VAR_POSITIONAL, found.VAR_KEYWORD),
            label,
            repr(name),
            f"an argument of {type(model).__name__}.forward: {', '.join(parameters)}",
        )
        assert found is not None
        place = None if found.kind is found.KEYWORD_ONLY else [*parameters].index(name)
        return cls(name, place, None if found.default is found.empty else found.default)

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Its value in a call."""
        if self.place is not None and self.place < len(args):
            return args[self.place]
        return kwargs.get(self.name, self.default)


@dataclass(frozen=True)
class _Decide:
    """Decide at the start of a model's forward, as a hook of it.

    Args:
        by_type: the arguments and the values.
        types: the argument that holds the types.
        groups: the one that holds the groups, if there is one.
        takes_others: see :meth:`ByType.attach`.
    """

    by_type: ByType
    types: _Argument
    groups: _Argument | None
    takes_others: bool

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        type_T = self.types.given(args, kwargs)
        batch_T = None if self.groups is None else self.groups.given(args, kwargs)
        routing = self.by_type.routing(type_T, self.takes_others, batch_T)
        decision = _Decision(routing, torch.is_grad_enabled())
        _store().setdefault(self.by_type.key, []).append(decision)


@dataclass(frozen=True)
class _Forget:
    """Forget the decision at the end of the forward, also of one that failed."""

    by_type: ByType

    def __call__(self, _: nn.Module, args: object, output: object) -> None:
        held = _held(self.by_type)
        if held:
            held.pop()
        elif torch.compiler.is_compiling():
            _forget_eagerly(self.by_type)
