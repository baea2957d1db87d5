"""Routing by what the model is called with: one decision a call, which all its layers share.

Shapes: T tokens, G groups, E experts, D width.
"""

from __future__ import annotations

import inspect
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from gmoe._autograd import refuse_transforms
from gmoe._checks import INTEGERS, check, check_module, check_one_device, described, readable
from gmoe._torch import (
    NO_BACKWARD,
    backward_number,
    forward_hooks,
    hooks_of_saved,
    remove_forward_hooks,
    version_of,
)
from gmoe.routers.base import Router
from gmoe.routing import Routing

DEFAULT_EXPERTS = 8
"""E, where nothing says how many experts there are."""


@dataclass(frozen=True)
class FromCall(ABC):
    """A router for all layers of a model, which reads an argument of the model's ``forward``.

    Args:
        argument: the name of the argument, or ``"data.NAME"``: an attribute, or key, of one.
        batch: the name of the argument that holds the group of each token; ``None`` (default)
            decides for each token.
    """

    argument: str
    batch: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name, value in (("argument", self.argument), ("batch", self.batch)):
            is_name = isinstance(value, str) and all(map(str.isidentifier, value.split(".")))
            legal = "the name of an argument of the model's forward, or an attribute of one"
            check(is_name or (name, value) == ("batch", None), name, repr(value), legal)

    def experts_of(self, *, num_experts: int | None, model: nn.Module | None = None) -> int:
        """E, for the number that was asked for; ``None`` leaves it to the router.

        Raises:
            ValueError: a number that the router cannot have, or that ``model`` decided already.
        """
        return DEFAULT_EXPERTS if num_experts is None else num_experts

    def k_of(self, *, num_experts: int) -> int:
        """K, the most experts that a decision has."""
        return num_experts

    @abstractmethod
    def decide(self, value: Any, batch_T: Any, takes_others: bool, model: nn.Module) -> Routing:
        """The decision of a call: for each token, or what :meth:`of_groups` makes of one a group.

        Args:
            value: of the argument.
            batch_T: of ``batch``; ``None`` if there is none, or nothing was given.
            takes_others: see :meth:`attach`.
            model: that is called.
        """

    def __call__(self, dim: int, *, num_experts: int) -> CallRouter:
        """Build the router of one layer."""
        return CallRouter(dim, self, self.experts_of(num_experts=num_experts))

    def arguments_in(self, model: nn.Module) -> tuple[Argument, Argument | None]:
        """Look up what is read, and the groups, in the signature of a model's ``forward``.

        Raises:
            ValueError: a model without such an argument.
        """
        check_module("model", model)
        value = Argument.of("argument", self.argument, model)
        return value, None if self.batch is None else Argument.of("batch", self.batch, model)

    def attach(self, model: nn.Module, *, takes_others: bool = False) -> None:
        """Let a model read the argument in each call, once; :func:`gmoe.moefy` does so itself.

        The routers in it take their decisions from its calls, but those that follow the calls of a
        part, to which it was attached before.

        Args:
            model: the module whose ``forward`` has the argument.
            takes_others: leave tokens of which nothing is known to shared experts (default
                ``False``: refuse them).

        Raises:
            ValueError: a model without such an argument.
        """
        decide = _Decide(self, *self.arguments_in(model), takes_others, _Calls())
        before, _ = forward_hooks(model)
        if decide in before.values():
            decide = next(hook for hook in before.values() if hook == decide)
        else:
            model.register_forward_pre_hook(decide, with_kwargs=True)
            model.register_forward_hook(_Forget(decide.calls), always_call=True)
        for router in routers_of(model, self):
            router._calls = decide.calls

    def leave(self, model: nn.Module) -> None:
        """Take away what :meth:`attach` put into a model."""
        remove_forward_hooks(model, (_Decide, _Forget))

    def group_of(self, batch_T: Any, value: Tensor) -> Tensor | None:
        """(T,) the group of each token; ``None`` if all are of one group.

        Raises:
            ValueError: no integers, or not on the device of what decides.
        """
        if batch_T is None:
            return None
        if not isinstance(batch_T, Tensor) or batch_T.dtype not in INTEGERS:
            raise ValueError(
                f"{self.batch}: got {described(batch_T)}, expected integers, the group of each "
                "token"
            )
        check_one_device(f"{self.argument}, {self.batch}", value, batch_T)
        return batch_T.reshape(-1).long()

    def of_groups(self, routing: Routing, group_T: Tensor | None) -> Routing:
        """The decisions of groups for their tokens; one for all tokens is left to the layers.

        Raises:
            ValueError: not one for each group (CPU tensors).
        """
        if group_T is None:
            return routing
        if readable(group_T) and group_T.numel():
            lowest, highest = map(int, group_T.aminmax())
            last = routing.num_tokens - 1
            # Of more groups than there are, the first would decide for tokens of others.
            if lowest < 0 or highest != last:
                raise ValueError(
                    f"{self.batch}: got groups {lowest} to {highest} of {group_T.size(0)} tokens, "
                    f"expected 0 to {last}: {self.argument} has {last + 1} rows, one for each group"
                )
        return routing.expand(group_T)


class CallRouter(Router):
    """The router of one layer under :class:`FromCall`: it takes the decision of the model's call.

    Args:
        dim: D, the width of the tokens.
        source: what decides.
        num_experts: E.

    Raises:
        ValueError: in a call, another number of tokens than were decided for; no call of the model
            around it.
    """

    by_token = True
    sums_to_one = True
    can_shrink = False

    def __init__(self, dim: int, source: FromCall, num_experts: int) -> None:
        super().__init__(dim, num_experts=num_experts, k=source.k_of(num_experts=num_experts))
        self.source = source
        self._calls: _Calls | None = None

    def reset_parameters(self) -> None:
        """Nothing to draw."""

    def route(self, x_TD: Tensor, group: Tensor | int, edge_index: Tensor | None) -> Routing:
        name = self.source.argument
        routing = None if self._calls is None else self._calls.decision(name)
        if routing is None:
            raise RuntimeError(
                f"{name}: got a call of a layer alone, expected a call model(...), not "
                "model.forward(...), of the whole model, to which "
                f"{type(self.source).__name__}.attach was applied (and of which no part alone is "
                "compiled); in a checkpoint, a call with tensors, of a model that is not compiled"
            )
        check_one_device(f"{name}, model", routing.scores, x_TD)
        decided, num_tokens = routing.num_tokens, x_TD.size(0)
        if self.source.batch is not None and routing.by_group is None:  # one group for all
            return routing.expand(torch.zeros(num_tokens, dtype=torch.int64, device=x_TD.device))
        if decided == num_tokens:
            return routing
        if isinstance(group, int) and decided * group == num_tokens:
            # (B, ..., D), such as a vector for each atom: an entry's rows follow its decision.
            entry_B = torch.arange(decided, device=x_TD.device)
            of_group = routing.by_group
            if of_group is not None:
                routing, entry_B = of_group.routing, of_group.group_T
            return routing.expand(entry_B.repeat_interleave(group))
        names, advice = name, "where it has a row for each group, name the groups by batch="
        if self.source.batch is not None:
            names = f"{name}, {self.source.batch}"
            advice = "a layer on graphs, such as a readout, takes a router without batch="
        raise ValueError(
            f"{names}: got {decided} tokens, expected {num_tokens}, those of the layer; {advice}, "
            "and a layer on edges a router by an argument of edges: name them in other targets"
        )


def detach(model: nn.Module) -> None:
    """Let a model that has no such layers anymore decide nothing."""
    for part, source in {(part, hook.source): None for _, part, hook in _deciding(model)}:
        source.leave(part)


def decided_from(model: nn.Module, told: Mapping[str, Any]) -> dict[Router | None, Tensor]:
    """(1, E) what routers decide if they are told their arguments alone, by router.

    Args:
        model: that was attached to.
        told: arguments by name, each for one group.

    Returns:
        Nothing, if ``told`` has none, or some that no router reads.

    Raises:
        ValueError: no argument of a router; several values, or one on another device.
    """
    hooks = [(part, hook) for _, part, hook in _deciding(model)]
    if not told or not told.keys() <= {hook.value.name for _, hook in hooks}:
        return {}
    found: dict[Router | None, Tensor] = {}
    for part, hook in hooks:
        name, value = hook.source.argument, hook.value.given((), told)
        others = ", ".join(told)
        check(hook.value.name in told, name, f"nothing beside {others}", "all that routers read")
        with torch.no_grad():
            routing = hook.source.decide(value, None, hook.takes_others, part)
        check_one_device(f"{name}, model", routing.scores, next(part.parameters()))
        # Several types without groups: of a composition, or of several sources.
        number = len(torch.atleast_1d(value).unique(dim=0))
        legal = "one, for one group; for a composition, a call of the model by position"
        check(number == 1, name, f"{number} different values", legal)
        decided = routing if routing.by_group is None else routing.by_group.routing
        found |= dict.fromkeys(routers_of(part, hook.source), decided.to_dense()[:1])
    return found


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
        if number != in_pass or routing is None:
            return None
        # A reentrant checkpoint sets no hooks. Its own backward pass would free what the network
        # saved, which other layers need.
        is_learned = routing.choices is None and routing.weight.requires_grad
        is_freed = is_learned and hooks_of_saved() is None
        got = "a learned decision in a reentrant checkpoint"
        check(not is_freed, name, got, "checkpoint(..., use_reentrant=False)")
        return routing

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


def _deciding(model: nn.Module) -> Iterator[tuple[str, nn.Module, _Decide]]:
    """The parts of a model that decide, with their names and hooks."""
    for name, part in model.named_modules():
        for hook in forward_hooks(part)[0].values():
            if isinstance(hook, _Decide):
                yield name, part, hook


def routers_of(model: nn.Module, source: FromCall) -> Iterator[CallRouter]:
    """The routers in a model that take their decisions from its calls, not from those of a part."""
    of_parts = [hook.calls for _, part, hook in _deciding(model) if part is not model]
    for part in model.modules():
        if isinstance(part, CallRouter) and part.source == source and part._calls not in of_parts:
            yield part


def part_of(model: nn.Module, router: Router | None) -> str:
    """The name of the part of a model, ``""`` for all of it, whose calls a router decides by."""
    calls = getattr(router, "_calls", None)
    return next((name for name, _, hook in _deciding(model) if hook.calls is calls), "")


class Argument(NamedTuple):
    """An argument of a model's forward, or an attribute of one, or an entry of a dictionary."""

    name: str
    place: int | None
    """Among those by position; ``None`` for one by name alone."""
    default: Any
    attributes: tuple[str, ...]
    """Of what is given, or keys, one inside the other."""

    @classmethod
    def of(cls, label: str, name: str, model: nn.Module) -> Argument:
        """Look an argument up in the signature of a model.

        Args:
            label: what the user calls it, for an error.
            name: of the argument.
            model: the module whose ``forward`` has it.

        Raises:
            ValueError: a model without such an argument.
        """
        name, *attributes = name.split(".")
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
        default = None if found.default is found.empty else found.default
        return cls(name, place, default, tuple(attributes))

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Its value in a call.

        Raises:
            ValueError: what is given lacks an attribute.
        """
        value = kwargs.get(self.name, self.default)
        if self.place is not None and self.place < len(args):
            value = args[self.place]
        for name in self.attributes:
            is_dict = isinstance(value, Mapping)
            holder = value
            value = value.get(name, value) if is_dict else getattr(value, name, value)
            if value is holder:
                whole = ".".join((self.name, *self.attributes))
                raise ValueError(f"{whole}: got {described(value)} without {name}, expected one")
        return value


@dataclass(frozen=True)
class _Decide:
    """Decide at the start of a model's forward, as a hook of it.

    Args:
        source: what decides.
        value: the argument that it reads.
        groups: the one that holds the groups, if there is one.
        takes_others: see :meth:`FromCall.attach`.
        calls: of the model.
    """

    source: FromCall
    value: Argument
    groups: Argument | None
    takes_others: bool
    calls: _Calls = field(compare=False)

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        call = self.calls.begin()  # at first: _Forget runs after an error, too
        refuse_transforms(traces=False)  # what torch says of hooks names no layer
        value = self.value.given(args, kwargs)
        batch_T = None if self.groups is None else self.groups.given(args, kwargs)
        call.routing = self.source.decide(value, batch_T, self.takes_others, model)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.calls.watch(call)


@dataclass(frozen=True)
class _Forget:
    """Forget the decision at the end of the forward, also of one that failed."""

    calls: _Calls

    def __call__(self, _: nn.Module, args: object, output: object) -> None:
        self.calls.end()
