"""From convs to the experts of a MoEConv."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch_geometric.nn import GCNConv, MessagePassing

from gmoe._checks import check_count
from gmoe.conv.experts import ConvExperts
from gmoe.conv.filter_conv import FilterConv
from gmoe.conv.mixed import MixedExperts
from gmoe.conv.mlp_conv import MLPConv
from gmoe.conv.probe import is_local
from gmoe.conv.registry import LOCAL, ConvFactory, ConvLike, conv_factory, make_conv
from gmoe.conv.separate import SeparateExperts
from gmoe.conv.stacks import stack_of
from gmoe.dispatch import Backend


def build_experts(
    conv: ConvLike,
    conv_kwargs: Mapping[str, Any],
    in_channels: int | tuple[int, int],
    out_channels: int,
    num_experts: int,
    local: bool | None,
    backend: Backend,
) -> ConvExperts:
    """The experts of a layer, each kind of conv run in the cheapest way that is right for it.

    Raises:
        ValueError: a list of another length than E; ``local=True`` for a conv that is not; convs that share parameters.
    """
    one_kind = isinstance(conv, str) or callable(conv)
    kinds: list[str | ConvFactory] = [conv] * num_experts if one_kind else list(conv)  # type: ignore[list-item,arg-type]
    if len(kinds) != num_experts:
        raise ValueError(f"conv: got a list of {len(kinds)} convs, expected num_experts={num_experts}")
    make = _Make([conv_factory(kind, conv_kwargs) for kind in kinds], in_channels, out_channels)
    samples = [make(expert) for expert in (range(min(2, num_experts)) if one_kind else range(num_experts))]
    _check_own_parameters(samples)
    samples += samples[-1:] * (num_experts - len(samples))

    groups: dict[Hashable, list[int]] = {}
    for expert, (kind, sample) in enumerate(zip(kinds, samples, strict=True)):
        groups.setdefault(_group_of(kind, sample, local), []).append(expert)
    built: list[ConvExperts] = []
    full: set[str] = set()
    for key, members in groups.items():
        own = make if len(groups) == 1 else make.of(members)
        if isinstance(key, tuple):
            built.append(key[0](own, len(members), backend))
            continue
        tried = [samples[expert] for expert in members]
        known = {id(sample): _takes_local_path(sample, in_channels, local) for sample in tried}
        flags = [known[id(sample)] for sample in tried]
        full |= {type(sample).__name__ for sample, flag in zip(tried, flags, strict=True) if not flag}
        built.append(SeparateExperts(own, len(members), flags))
    if full:
        warnings.warn(
            f"{', '.join(sorted(full))} runs on the whole graph for every expert, so that its cost follows "
            "num_experts, not k; if its output at a node follows from the node's in-edges alone, pass local=True",
            stacklevel=3,
        )
    return built[0] if len(built) == 1 else MixedExperts(built, list(groups.values()))


def count_experts(conv: ConvLike | None, num_experts: int | None) -> int:
    """E: as asked for, or the length of a list of convs, or 8."""
    if num_experts is not None:
        check_count("num_experts", num_experts)
        return num_experts
    return 8 if isinstance(conv, str) or not isinstance(conv, Sequence) else len(conv)


def looks_one_hop(conv: MessagePassing, in_channels: int) -> bool:
    """Whether the conv's output follows from in-edges, their ends, and the degrees that ``Pieces.of`` knows."""
    if isinstance(conv, FilterConv):
        return conv.hops == 1
    return isinstance(conv, GCNConv | MLPConv) or _takes_local_path(conv, in_channels, None)


def _group_of(kind: str | ConvFactory, sample: MessagePassing, local: bool | None) -> Hashable:
    """What experts that can be stacked have in common; ``None`` for those that are run one by one."""
    stack = stack_of(sample) if local is None else None
    if stack is None:
        return None
    if isinstance(sample, FilterConv):  # whose filters may differ
        return stack, sample.add_self_loops, sample.bias is None
    if isinstance(kind, partial):
        return stack, kind.func, repr(kind.args), repr(kind.keywords)
    return stack, type(sample) if isinstance(kind, str | type) else kind


def _check_own_parameters(convs: list[MessagePassing]) -> None:
    own: set[int] = set()
    for conv in convs:
        ids = {id(parameter) for parameter in conv.parameters()}
        if own & ids:
            raise ValueError("conv: got a factory whose convs share parameters, expected fresh ones at each call")
        own |= ids


@dataclass(frozen=True)
class _Make:
    """Makes the conv of an expert. A class, not a closure, so that layers can be pickled."""

    factories: list[Callable[[Any, int], MessagePassing]]
    in_channels: int | tuple[int, int]
    out_channels: int

    def of(self, experts: list[int]) -> _Make:
        """Makes only some of the experts."""
        return _Make([self.factories[expert] for expert in experts], self.in_channels, self.out_channels)

    def __call__(self, expert: int) -> MessagePassing:
        return make_conv(self.factories[expert], self.in_channels, self.out_channels)


def _takes_local_path(conv: MessagePassing, in_channels: int | tuple[int, int], local: bool | None) -> bool:
    if local is False or (local is None and type(conv) not in LOCAL):
        return False
    if any(parameter.is_meta for parameter in conv.parameters()):  # nothing to run
        return True
    try:
        verified = is_local(conv, in_channels)
    except Exception as error:
        if local is None:
            return False
        raise ValueError(
            f"local: got True, but {type(conv).__name__} fails on a small random graph: {error}"
        ) from error
    if local and not verified:
        raise ValueError(
            f"local: got True, but {type(conv).__name__} gives another output on a node's in-edges than on the whole "
            "graph; expected None or False"
        )
    return verified
