"""How the experts of a layer are built: stacked where possible, else one by one.

Shapes: N nodes and M edges of the small graph on which a conv is tried.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing
from torch_geometric.nn.dense.linear import Linear

from gmoe._checks import change_of, check, parameters_of
from gmoe._verify import SCALES, comparable, form_of, probe_copy, rows_are_equal
from gmoe.conv.base import ConvExperts, MixedExperts, StackedExperts, to_one
from gmoe.conv.call import Call
from gmoe.conv.graph import Graph
from gmoe.conv.kinds import CopyOf, Make, are_alike, base_kind_of, is_of_library, kind_of, name_of
from gmoe.conv.plain import run
from gmoe.conv.separate import SeparateExperts, Way, not_local, way_on


def build_experts(
    make: Make, local: bool | None, copied: MessagePassing | None = None
) -> ConvExperts:
    """The experts of a layer, each kind of conv run in the cheapest way that is right for it.

    Args:
        make: makes the conv of an expert.
        local: see :class:`gmoe.MoEConv`.
        copied: the conv as whose copies all experts start; ``None`` to draw each by itself.

    Raises:
        ValueError: ``local=True`` for a conv that is not local; convs that share parameters;
            output widths or flows that differ.
    """
    num_experts = len(make.kinds)
    first = make(0) if copied is None else copied
    # Convs of one class, and copies of one conv, are alike: one of them is enough for a stack.
    if local is None and (copied is not None or are_alike(make.kinds)):
        trial = Trial(first, make.in_channels, is_of_library(make.kinds[0]))
        if trial.form is not None:
            # A class that gmoe knows has the width that it was asked for.
            _check_together(make, [first], [] if trial.is_of_library else [trial.width])
            experts = trial.form[0]([first] * num_experts, make)
            if copied is None and trial.is_of_library:
                experts.draw(first, range(1, num_experts))
            return experts
    if copied is None:
        return _grouped(make, local, [first, *map(make, range(1, num_experts))])
    return _grouped(make, local, [first, *(copy.deepcopy(first) for _ in range(1, num_experts))])


def _grouped(make: Make, local: bool | None, convs: Sequence[MessagePassing]) -> ConvExperts:
    """Experts of these convs: those that can be stacked together form a group, the rest another."""
    # One trial a kind: it tells the output width, and whether the conv is local.
    trials = {
        id(kind): Trial(conv, make.in_channels, is_of_library(kind))
        for kind, conv in zip(make.kinds, convs, strict=True)
    }
    _check_together(make, convs, [trial.width for trial in trials.values()])

    members_of: dict[Form | None, list[int]] = {}
    is_right: dict[Form, bool] = {}
    for expert, conv in enumerate(convs):
        form = _form_of(conv) if local is None else None
        trial = trials[id(make.kinds[expert])]
        # Convs of the library compute by construction what their stack does. A user's may have been
        # changed after they were built: one of each form is tried.
        if form is not None and form not in is_right:
            is_right[form] = trial.is_of_library or trial.equals(form)
        if form is not None and not is_right[form]:
            form = None
        members_of.setdefault(form, []).append(expert)
    groups: list[ConvExperts] = []
    for form, members in members_of.items():
        group_convs = [convs[expert] for expert in members]
        group_kinds = [make.kinds[expert] for expert in members]
        if form is not None:
            stacked_class = form[0]
            groups.append(stacked_class(group_convs, replace(make, kinds=group_kinds)))
            continue
        ways = [trials[id(kind)].way(local) for kind in group_kinds]
        is_tried = all(trials[id(kind)].outcome.way for kind in group_kinds)
        separate = SeparateExperts(group_convs, ways, is_tried=is_tried or not local)
        groups.append(separate)
        if separate.too_far and len(convs) > 1:
            names = ", ".join(sorted({type(conv).__name__ for conv in separate.too_far}))
            warnings.warn(
                f"{names} runs on the whole graph for every expert, so that its cost follows "
                "num_experts, not k; if its output at a node follows from the node's in-edges "
                "alone, pass local=True",
                stacklevel=5,
            )
    return groups[0] if len(groups) == 1 else MixedExperts(groups, list(members_of.values()))


def _check_together(
    make: Make, convs: Sequence[MessagePassing], widths_of_kinds: Sequence[int | None]
) -> None:
    """Refuse convs that do not go together.

    Args:
        make: made the convs.
        convs: the conv of each expert.
        widths_of_kinds: the widths of their outputs; ``None`` where it is unknown.
    """
    widths = [width for width in widths_of_kinds if width is not None]
    ids = [id(parameter) for conv in convs for parameter in conv.parameters()]
    shares = len(ids) != len(set(ids))
    got = "a factory whose convs share parameters"
    check(not shares, "conv", got, "fresh ones at each call")
    flows = sorted({conv.flow for conv in convs})
    check(len(flows) == 1, "conv", f"experts of flows {flows}", "one flow for all")
    got = f"experts of output widths {sorted(set(widths))}"
    check(len(set(widths)) <= 1, "conv", got, "one width for all")
    # Heads and powers give a multiple of out_channels.
    for width in widths[:1]:
        got = f"{make.out_channels}, but {name_of(make.kinds[0])} gives {width} columns"
        legal = "that width, or a multiple of it"
        check(width % make.out_channels == 0, "out_channels", got, legal)


# which convs are stacked together -----------------------------------------------------------------

Form: TypeAlias = tuple[type[StackedExperts], Hashable, tuple[Hashable, ...]]
"""A class of stacked experts, and all that its convs have in common but the stacked values."""


def _form_of(conv: MessagePassing) -> Form | None:
    """A class of stacked experts, and all that must be equal in a stack; or ``None``.

    Stacking must not lose what a user put on a conv: hooks, parametrizations, frozen parameters,
    linear layers of another class, methods of an instance, parts in another mode.
    """
    stack = kind_of(type(conv)).stack
    if stack is None or not all(p.requires_grad for p in conv.parameters()):
        return None
    if any(part.training != conv.training for part in conv.modules() if _has_mode(part)):
        return None
    if any(change_of(part) is not None for part in conv.modules()) or not stack.accepts(conv):
        return None
    aggregation = set(conv.aggr_module.modules())
    values: list[Hashable] = []
    for part in conv.modules():
        if part in aggregation:
            # Its buffers are part of what it computes. A GIN's buffer, eps, is stacked.
            values += [comparable(value) for value in part.buffers(recurse=False)]
        elif part is not conv and not _is_known(part):
            return None
    return stack, form_of(conv), tuple(values)


def _has_mode(part: nn.Module) -> bool:
    """False for an activation of torch's, which computes the same in both modes.

    One that is PyG's default argument is a part of all convs of a class, in the last one's mode.
    """
    return type(part).__module__ != nn.ReLU.__module__ or isinstance(part, nn.RReLU)


def _is_known(part: nn.Module) -> bool:
    """True for a part of a conv that stacks can read.

    That is a linear layer, a batch norm, or a module of torch's or PyG's without parameters.
    """
    if type(part) in (nn.Linear, Linear, nn.BatchNorm1d):
        return True
    package = type(part).__module__.partition(".")[0]
    has_parameters = any(True for _ in part.parameters(recurse=False))
    return package in ("torch", "torch_geometric") and not has_parameters


# what a conv does, found out by running it --------------------------------------------------------

NODES = 14
EDGES = 60
"""Sizes of the graph on which convs are tried."""


def looks_one_hop(conv: MessagePassing, in_channels: int, local: bool | None) -> bool:
    """True if the conv's output at a node depends only on its in-edges, their ends, and degrees."""
    is_known = base_kind_of(type(conv)).is_one_hop
    return is_known or Trial(conv, in_channels).way(local) != "whole"


class Outcome(NamedTuple):
    """What a trial found."""

    width: int | None
    """Columns of the output; ``None`` if the run failed."""
    way: Way | None
    """The cheapest way in which it is right; ``None`` if the run failed."""


@dataclass
class Trial:
    """A run of a conv on a small random graph with self-loops, parallel edges, isolated nodes.

    What runs is a float64 copy with other weights, without dropout, and in training mode, so that
    batch norm shows, unless somebody says that the conv is local. It runs once, when its outcome is
    first asked for.

    Args:
        conv: the conv; it is not changed.
        in_channels: its widths.
        is_of_library: gmoe built it from a class that it knows, so that nobody has changed it.
    """

    conv: MessagePassing
    in_channels: int | tuple[int, int]
    is_of_library: bool = False

    @cached_property
    def outcome(self) -> Outcome:
        """Run the conv."""
        width = None
        try:
            with torch.no_grad(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
                conv = probe_copy(self.conv)
                inputs = self._inputs(torch.Generator().manual_seed(0))
                width = run(conv, *inputs).size(1)
                return Outcome(width, way_on(conv, Call(*inputs)))
        except Exception:  # it may ask for anything: edge features, regular graphs, other packages
            return Outcome(width, None)

    @cached_property
    def form(self) -> Form | None:
        """How the conv is stacked; ``None`` if a stack would compute something else."""
        form = _form_of(self.conv)
        if form is None or self.is_of_library or self.equals(form):
            return form
        return None

    def equals(self, form: Form) -> bool:
        """True if such a stack gives the conv's outputs, and has as many trained parameters."""
        try:
            with torch.no_grad(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
                conv = probe_copy(self.conv)
                experts = form[0]([conv], Make([CopyOf(conv)], self.in_channels, 1, (), {}))
                # Tied weights, or a weight that is a buffer, would be trained by themselves.
                if _num_trained(experts) != _num_trained(conv):
                    return False
                graph, x_src, x_dst = self._inputs(torch.Generator().manual_seed(0))
                for scale in SCALES:
                    scaled_src = scale * x_src
                    scaled_dst = scaled_src if x_dst is x_src else scale * x_dst
                    call = Call(graph, scaled_src, scaled_dst)
                    for is_training in (True, False):
                        if not _run_alike(conv.train(is_training), experts, call):
                            return False
                return True
        except Exception:  # a conv that was changed may lack what a stack reads, or not run
            return False

    def _inputs(self, generator: torch.Generator) -> tuple[Graph, Tensor, Tensor]:
        """The graph, and the features (N, D) of its sources and destinations."""
        conv = self.conv
        takes = parameters_of(conv)
        random = partial(torch.randn, dtype=torch.float64, generator=generator)
        # The last two nodes stay isolated; the first edges are a loop and two parallel edges.
        edge_index = torch.randint(NODES - 2, (2, EDGES), generator=generator)
        edge_index[:, :3] = torch.tensor([[0, 1, 1], [0, 2, 2]])
        weight = random(EDGES).abs() + 0.1 if "edge_weight" in takes else None
        if isinstance(self.in_channels, int):
            source_width = self.in_channels
            destination_width = 0  # the nodes are one set
        else:
            source_width, destination_width = self.in_channels
        edge_dim = base_kind_of(type(conv)).edge_width(conv, source_width)
        attr = None
        if "edge_attr" in takes and isinstance(edge_dim, int) and edge_dim > 0:
            attr = random(EDGES, edge_dim)
        x_src = random(NODES, source_width)
        x_dst = random(NODES, destination_width) if destination_width else x_src
        graph = Graph(edge_index, NODES, edge_weight=weight, edge_attr=attr, flow=conv.flow)
        return graph, x_src, x_dst

    @property
    def width(self) -> int | None:
        """Columns of the output; ``None`` if unknown."""
        # A conv that can be stacked is one that we know: nothing has to run.
        if hasattr(self.conv, "out_channels") and self.form is not None:
            has_wide_heads = getattr(self.conv, "concat", False)
            heads = self.conv.heads if has_wide_heads else 1
            return int(self.conv.out_channels * heads)
        return self.outcome.width

    def way(self, local: bool | None) -> Way:
        """How the conv is run on some destinations.

        Args:
            local: what the user said of it, see :class:`gmoe.MoEConv`.

        Raises:
            ValueError: ``local=True`` for a conv that is not local.
        """
        if local is False or (local is None and not kind_of(type(self.conv)).is_local):
            return "whole"
        if not local:
            return self.outcome.way or "whole"
        if self.outcome.way is None:  # what cannot run here is tried on its first call
            return "part"
        way = self._way_in_evaluation()
        if way == "whole":
            raise not_local(self.conv)
        return way

    def _way_in_evaluation(self) -> Way:
        """The same of a conv that is local but for what batch norms see in training."""
        with torch.no_grad(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
            conv = probe_copy(self.conv).eval()
            return way_on(conv, Call(*self._inputs(torch.Generator().manual_seed(0))))


def _num_trained(module: nn.Module) -> int:
    """The numbers that are trained."""
    return sum(parameter.numel() for parameter in module.parameters())


def _run_alike(conv: MessagePassing, experts: StackedExperts, call: Call) -> bool:
    """True if a conv, and an expert made from it, give the same rows in the conv's mode."""
    expected = run(conv, call.graph, call.x_src, call.x_dst)
    experts.train(conv.training)
    call = call.with_aggregate(experts.aggregate(call))
    return rows_are_equal(experts(call, to_one(call.x_dst)), expected)
