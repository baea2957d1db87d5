"""Routing by a type that the model is called with, such as the element of an atom.

Shapes: T tokens, G groups, E experts, D width.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from gmoe._checks import INTEGERS, check, check_module, described, is_whole, readable
from gmoe._torch import (
    NO_BACKWARD,
    assert_async,
    backward_number,
    forward_hooks,
    hooks_of_saved,
    remove_forward_hooks,
    version_of,
)
from gmoe.routers.base import Router
from gmoe.routing import Routing


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
    once. Compile the whole model, not a part of it. Of a model, one thread at a time may be inside
    a call.

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

    def __call__(self, dim: int, *, num_experts: int) -> TypeRouter:
        """Build the router of one layer."""
        expected = len(self.values)
        check(num_experts == expected, "num_experts", num_experts, f"{expected}, one a value")
        return TypeRouter(dim, self)

    def attach(self, model: nn.Module, *, takes_others: bool = False) -> None:
        """Let a model read the types in each call, once; :func:`gmoe.moefy` does so itself.

        The routers in it take their decisions from its calls, but those in a part to which the
        types were attached before.

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
        decide = _Decide(self, types, groups, takes_others, _Calls())
        before, _ = forward_hooks(model)
        if decide in before.values():
            decide = next(hook for hook in before.values() if hook == decide)
        else:
            model.register_forward_pre_hook(decide, with_kwargs=True)
            model.register_forward_hook(_Forget(decide.calls), always_call=True)
        _bind(model, self, decide.calls)

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
        count_GE = is_type_TE.new_zeros(size_G.size(0), num_experts, dtype=dtype)
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
        self._calls: _Calls | None = None

    def reset_parameters(self) -> None:
        """Nothing to draw."""

    def check_kept(self, kept: Sequence[int]) -> None:
        raise ValueError(
            f"model: got {type(self).__name__}, of which no expert can be taken away: each is the "
            "only one of its type"
        )

    def route(self, x_TD: Tensor, group: Tensor | int, edge_index: Tensor | None) -> Routing:
        name = self.by_type.argument
        routing = None if self._calls is None else self._calls.decision(name)
        if routing is None:
            raise RuntimeError(
                f"{name}: got a call of a layer alone, expected a call of the whole model, to "
                "which ByType.attach was applied (and of which no part alone is compiled); in a "
                "checkpoint, a call with tensors"
            )
        if routing.num_tokens != x_TD.size(0):
            raise ValueError(
                f"{name}: got {routing.num_tokens} types, expected one for each of {x_TD.size(0)} "
                "tokens of the layer"
            )
        return routing


def detach(model: nn.Module) -> None:
    """Let a model that has no layers by type anymore read no types."""
    remove_forward_hooks(model, (_Decide, _Forget))


# the decision of a call -----------------------------------------------------------------------


@dataclass
class _Call:
    """A call of a model that is running.

    Args:
        backward: the number of the backward pass that makes it, as of a model in a checkpoint.
        thread: the thread that makes it; ``None`` in compiled code.
        routing: what was decided for it.
        hooks: on what autograd saves in it.
    """

    backward: int
    thread: int | None
    routing: Routing | None = None
    hooks: saved_tensors_hooks | None = None


class _Calls:
    """The calls of a model, from which its routers take their decisions.

    A checkpoint inside the model computes a part of a call again in the backward pass, when the
    call is over. Before that it unpacks its inputs, which it saved in that call: whoever unpacks
    what was saved in a call recalls the decision, whatever was called meanwhile.
    """

    def __init__(self) -> None:
        self.running: list[_Call] = []
        """The innermost last."""
        self.recalled: tuple[int, Routing | None] = (NO_BACKWARD, None)
        """A backward pass, and the decision of what it unpacked last."""

    def __getstate__(self) -> dict[str, Any]:
        return vars(_Calls())  # of a copy, no call is running

    def begin(self) -> _Call:
        """Note that a call begins, of which nothing is decided yet."""
        is_compiled = torch.compiler.is_compiling()
        number = NO_BACKWARD if is_compiled else backward_number()
        self.running.append(_Call(number, None if is_compiled else threading.get_ident()))
        return self.running[-1]

    def end(self) -> None:
        """Note that the innermost call is over."""
        call = self.running.pop() if self.running else None
        if call is not None and call.hooks is not None:
            call.hooks.__exit__()

    def decision(self, name: str) -> Routing | None:
        """That of the call around; or, where a checkpoint recomputes a part of a call, of that.

        Args:
            name: of the argument, for an error.
        """
        call = self.running[-1] if self.running else None
        if torch.compiler.is_compiling():
            return None if call is None else call.routing
        number = backward_number()
        if call is not None and call.backward == number:
            check(
                call.thread in (None, threading.get_ident()),
                name,
                "calls of one model in several threads",
                "one at a time, or a copy of the model for each thread",
            )
            return call.routing
        in_pass, routing = self.recalled
        return routing if number == in_pass else None

    def watch(self, call: _Call) -> None:
        """Recall a call's decision when something is unpacked that autograd saves in it."""
        around = hooks_of_saved()  # of a checkpoint around, for example: ours replace them

        def pack(value: Tensor) -> Any:
            return (value, version_of(value)) if around is None else around[0](value)

        def unpack(packed: Any) -> Tensor:
            if around is None:
                value, version = packed
                # Where there are hooks, torch leaves this to them.
                if version_of(value) != version:
                    raise RuntimeError(
                        "a tensor that is needed for the backward pass was changed in place: got "
                        f"version {version_of(value)}, expected {version}"
                    )
            else:
                value = around[1](packed)
            self.recalled = backward_number(), call.routing
            return value

        call.hooks = saved_tensors_hooks(pack, unpack)
        call.hooks.__enter__()


def _bind(part: nn.Module, by_type: ByType, calls: _Calls) -> None:
    """Let the routers in a part of a model take their decisions from its calls."""
    if isinstance(part, TypeRouter) and part.by_type == by_type:
        part._calls = calls
    for child in part.children():
        hooks, _ = forward_hooks(child)
        decides = [hook for hook in hooks.values() if isinstance(hook, _Decide)]
        if all(hook.by_type != by_type for hook in decides):  # else they have calls of their own
            _bind(child, by_type, calls)


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
        calls: of the model.
    """

    by_type: ByType
    types: _Argument
    groups: _Argument | None
    takes_others: bool
    calls: _Calls = field(compare=False)

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        call = self.calls.begin()  # at first: _Forget runs after an error, too
        type_T = self.types.given(args, kwargs)
        batch_T = None if self.groups is None else self.groups.given(args, kwargs)
        call.routing = self.by_type.routing(type_T, self.takes_others, batch_T)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.calls.watch(call)


@dataclass(frozen=True)
class _Forget:
    """Forget the decision at the end of the forward, also of one that failed."""

    calls: _Calls

    def __call__(self, _: nn.Module, args: object, output: object) -> None:
        self.calls.end()
