"""Remove the experts of a trained model that do little on given data.

Shapes: E experts, P (token, expert) pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gmoe._calls import Data, batches_of, outputs_of, relative_change
from gmoe._checks import check_module, is_whole
from gmoe.layer_groups import Group, groups_of, named
from gmoe.routers import UniformRouter
from gmoe.routing import Routing


@dataclass(frozen=True)
class PrunedLayer:
    """What :func:`prune` did to a layer, or to several that one router serves.

    Args:
        names: of the layers in the model.
        kept: the experts that stayed, by their numbers before.
        importance: the importance of each expert before; see :func:`prune`.
        load: the share of all pairs that each expert had.
    """

    names: tuple[str, ...]
    kept: tuple[int, ...]
    importance: tuple[float, ...]
    load: tuple[float, ...]

    def __str__(self) -> str:
        removed = [
            f"{expert} ({self.load[expert]:.1%} of the load)"
            for expert in range(len(self.load))
            if expert not in self.kept
        ]
        gone = f", without {', '.join(removed)}" if removed else ""
        return f"{named(self.names)}: {len(self.kept)} of {len(self.load)} experts{gone}"


class Pruned(NamedTuple):
    """The result of :func:`prune`.

    Args:
        model: the model itself.
        layers: what was done to each layer.
        change: the norm of the difference of the model's outputs on the data, over their norm
            before.
    """

    model: nn.Module
    layers: list[PrunedLayer]
    change: float

    def __str__(self) -> str:
        lines = [*map(str, self.layers), f"relative change of the outputs: {self.change:.2g}"]
        return "\n".join(lines)


def prune(model: nn.Module, data: Data, keep: float | int | Sequence[int] | None = None) -> Pruned:
    r"""Remove dead and weak experts from a model, in place; layers may keep different numbers.

    The importance of expert e is its load times the mean score of its pairs, as a share of its
    layer's:

    .. math::
        I_e = \sum_{(t, e) \in \mathrm{pairs}} s_{te} \Big/ \sum_{\mathrm{pairs}} s

    Experts without a token on the data always go, as long as K experts stay. If only such experts
    go, the outputs on the data stay the same, up to rounding: the router scores all experts as
    before, and chooses among those that stay; see :meth:`gmoe.Router.keep`. Tokens of other removed
    experts go to their next best ones.

    The experts that stay are numbered anew, in their order: E of the layer, of its router and of
    its routings, the columns of :class:`RoutingStats` and of plots are theirs alone.
    ``kept`` of a layer has their numbers before. Each expert that chooses takes as many tokens as
    before.

    The stack of experts, thresholds and the biases that balance the load shrink along. Parameters
    of experts are new ones: make a new optimizer. Experts that share a base stay so.

    Args:
        model: any model with :class:`MoE` or :class:`MoEConv` layers, from :func:`moefy`,
            :class:`GNNMoE`, :class:`ViTMoE` or your own.
        data: what the model is called with: a tensor, a tuple of arguments, or a dictionary of
            arguments by name; or several of these, such as a list or a loader, which are read
            once and kept. The model runs in evaluation.
        keep: which experts stay beside those that are needed for K.

            - ``None`` (default): all that have a token.
            - A fraction, a float in (0, 1]: the most important of all layers together, so that
              layers keep different numbers.
            - A number: the most important of each layer; or a list with a number for each layer
              (one for layers that share a router).

    Returns:
        The model; what was done to each layer; the relative change of the outputs. Printed, it is
        a table.

    Raises:
        ValueError: no layer with experts; one without a router; experts or routers of a class of
            your own, see :meth:`gmoe.Experts.keep`; parts that are parametrized; ``keep`` out of
            range.

    Example:
        >>> pruned = gmoe.prune(vit, images, keep=0.5)
        >>> print(pruned)
    """
    check_module("model", model)
    groups = groups_of(model)
    if not groups:
        raise ValueError(
            f"model: got {type(model).__name__} without layers of experts, expected some"
        )
    check_routers(groups)
    batches = batches_of(data)

    # 1. Run the model, and add up what each expert gets.
    with counting(groups) as counts:
        before = outputs_of(model, batches)
    refuse_unseen(groups, counts)
    loads = [share(count.pairs_E) for count in counts]
    importances = [share(count.scores_E) for count in counts]

    # 2. Choose, and take the others away.
    chosen = _choose(groups, loads, importances, keep)
    for group, kept in zip(groups, chosen, strict=True):
        if len(kept) < group.num_experts:
            group.keep(kept)

    layers = [
        PrunedLayer(tuple(group.layers), kept, tuple(importance.tolist()), tuple(load.tolist()))
        for group, kept, importance, load in zip(groups, chosen, importances, loads, strict=True)
    ]
    return Pruned(model, layers, relative_change(before, outputs_of(model, batches)))


def check_routers(groups: Sequence[Group]) -> None:
    """Refuse layers without a router of their own or of their model, and shared experts.

    Raises:
        ValueError: one of them, by its name.
    """
    owners: dict[nn.Module, Group] = {}
    for group in groups:
        for name, layer in group.layers.items():
            if layer.experts is None:
                raise ValueError(f"model: got {name}, whose widths are open: call it once before")
            if group.router is None:
                raise ValueError(
                    f"model: got {named([name])}, a {type(layer).__name__} without one router "
                    "of its own, expected MoE or MoEConv layers with a router"
                )
            if owners.setdefault(layer.experts, group) is not group:
                raise ValueError(
                    f"model: got {name}, whose experts are those of a layer under another router, "
                    "expected experts of its own"
                )


@dataclass
class Count:
    """What the experts under one router got: pairs, and the sum of their scores."""

    pairs_E: Tensor
    scores_E: Tensor
    calls: int = 0


@contextmanager
def counting(groups: Sequence[Group]) -> Iterator[list[Count]]:
    """Count what the routers give out inside the block, in double precision on the CPU."""
    counts = []
    hooks = []
    for group in groups:
        zeros_E = torch.zeros(group.num_experts, dtype=torch.float64)
        count = Count(zeros_E, zeros_E.clone())
        counts.append(count)
        if group.router is not None:
            hooks.append(group.router.register_forward_hook(partial(_add, count)))
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def refuse_unseen(groups: Sequence[Group], counts: Sequence[Count]) -> None:
    """Refuse data on which a router did not run: of its experts nothing is known.

    Raises:
        ValueError: the names of its layers.
    """
    unseen = [
        name
        for group, count in zip(groups, counts, strict=True)
        if group.router is not None and not count.calls
        for name in group.layers
    ]
    if unseen:
        raise ValueError(
            f"data: got some on which the router of {named(unseen)} does not run, expected data "
            "that reach every layer of experts"
        )


def _add(count: Count, router: nn.Module, args: Any, routing: Routing) -> None:
    """Add a routing, as a hook of its router."""
    score_P = routing.scores[routing.token, routing.expert].detach().double()
    zeros_E = score_P.new_zeros(routing.num_experts)
    count.scores_E += zeros_E.index_add(0, routing.expert, score_P).cpu()
    count.pairs_E += routing.load.cpu()
    count.calls += 1


def share(sum_E: Tensor) -> Tensor:
    """(E,) each number over the sum of all; zeros if that is zero."""
    return sum_E / sum_E.sum().clamp(min=torch.finfo(sum_E.dtype).tiny)


def _choose(
    groups: Sequence[Group],
    loads: Sequence[Tensor],
    importances: Sequence[Tensor],
    keep: float | int | Sequence[int] | None,
) -> list[tuple[int, ...]]:
    """The experts of each group that stay, ascending; see :func:`prune`."""
    needed = [_needed(group) for group in groups]
    # Best first; equal ones by their numbers. Dead ones come last, whatever the scores.
    ranked = [
        sorted(range(len(load)), key=lambda e: (-float(load[e] > 0), -float(importance[e])))
        for load, importance in zip(loads, importances, strict=True)
    ]
    living = [int((load > 0).sum()) for load in loads]
    numbers = _numbers(groups, needed, living, ranked, importances, keep)
    return [
        tuple(sorted(experts[: max(min(number, alive), least)]))
        for experts, number, alive, least in zip(ranked, numbers, living, needed, strict=True)
    ]


def _needed(group: Group) -> int:
    """The fewest experts that a router works with: K, or one if each token goes to all."""
    assert group.router is not None
    return 1 if isinstance(group.router, UniformRouter) else group.router.k


def _numbers(
    groups: Sequence[Group],
    needed: Sequence[int],
    living: Sequence[int],
    ranked: Sequence[Sequence[int]],
    importances: Sequence[Tensor],
    keep: Any,
) -> Sequence[int]:
    """How many experts of each group stay at most."""
    if keep is None:
        return living
    if isinstance(keep, Real) and not isinstance(keep, Integral):
        # The most important of all layers together, beside those that each needs.
        fraction = float(keep)
        is_legal = 0 < fraction <= 1  # NaN is not
        total = round(fraction * sum(group.num_experts for group in groups)) if is_legal else 0
        if total < sum(needed):
            raise ValueError(
                f"keep: got {keep}, expected a fraction of at most 1 that leaves {sum(needed)} "
                "experts, K for each layer"
            )
        optional = [
            (float(importance[expert]), index)
            for index, (experts, importance) in enumerate(zip(ranked, importances, strict=True))
            for expert in experts[needed[index] : living[index]]
        ]
        optional.sort(key=lambda pair: -pair[0])
        numbers = list(needed)
        for _, index in optional[: total - sum(needed)]:
            numbers[index] += 1
        return numbers
    numbers = list(keep) if isinstance(keep, Sequence) else [keep] * len(groups)
    fits = len(numbers) == len(groups) and all(
        is_whole(number) and least <= number <= group.num_experts
        for number, least, group in zip(numbers, needed, groups, strict=False)
    )
    if not fits:
        ranges = ", ".join(
            f"{least} to {group.num_experts} ({named(group.layers)})"
            for least, group in zip(needed, groups, strict=True)
        )
        raise ValueError(
            f"keep: got {keep!r}, expected a fraction, or a number of experts for each layer: "
            f"{ranges}"
        )
    return numbers
