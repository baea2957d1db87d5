"""The decision of a router, and its auxiliary losses.

Shapes: T tokens, E experts, K experts per token, P (token, expert) pairs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from gmoe._autograd import lazy
from gmoe._checks import INTEGERS, check, check_range, described, readable
from gmoe.blocks import (
    AtPlaces,
    Blocks,
    RowsByGroup,
    blocks_of,
    expert_of_rows,
    rows_by_group,
)
from gmoe.choices import LATE, Choices, check_choices, to_keep


class AuxLoss(NamedTuple):
    """An auxiliary loss: its value, and its coefficient in the training loss."""

    value: Tensor
    coefficient: float


@dataclass(frozen=True, eq=False)
class ByGroup:
    """A decision for groups of tokens, such as the graphs of a batch or images.

    Args:
        routing: of the groups.
        group_T: (T,) int64, the group of each token.
    """

    routing: Routing
    group_T: Tensor

    @lazy
    def rows(self) -> RowsByGroup:
        """Where the tokens stand when they are sorted by group."""
        num_groups = max(1, self.routing.num_tokens)  # of no tokens, one without any
        return rows_by_group(self.group_T, num_groups)


@dataclass(frozen=True, eq=False)
class Routing:
    """Which expert handles which token: sparse (token, expert) pairs, ready for a grouped GEMM.

    Pairs are sorted by expert and, within an expert, by token. In your own router, build one with
    :meth:`from_choices`.

    Args:
        token: (P,) int64, the token of each pair.
        offsets: (E,) int32, cumulative ends: expert ``e`` owns the pairs
            ``offsets[e - 1]:offsets[e]``.
        weight: (P,) the factor of the expert's output in the token's sum; differentiable.
        scores: (T, E) the router's score of every pair: probabilities, or votes.
        num_tokens: T.
        losses: auxiliary losses by name, each with its coefficient.
        dropped_T: (T,) int64, how many pairs of each token exceeded the capacity; ``None`` if
            nothing can be dropped.
        detached: the losses were computed in training while gradients were off: they train nothing
            (default ``False``).
        slot: (P,) int64, only if each token has the same number K of pairs: ``token * K + j``, each
            once. It makes a GPU faster, and changes no result (default ``None``). Set it to
            ``None`` where you drop or reorder the pairs of a routing.
        by_group: what :meth:`expand` was given, for :class:`gmoe.mixed.MixedWeights` (default
            ``None``: each token has a decision of its own).
        validate: check the tensors (default ``True``); pass ``False`` if they are right by
            construction.

    Raises:
        ValueError: a tensor of another shape or dtype; on the CPU also offsets that are not
            cumulative, tokens out of range, and pairs out of order (on other devices, reading
            values would cost a host sync).
    """

    token: Tensor
    offsets: Tensor
    weight: Tensor
    scores: Tensor
    num_tokens: int
    losses: Mapping[str, AuxLoss] = field(default_factory=dict)
    dropped_T: Tensor | None = None
    detached: bool = False
    slot: Tensor | None = field(default_factory=lambda: None)  # no attribute of the class
    by_group: ByGroup | None = None
    choices: Choices | None = field(init=False, repr=False, default=None)
    """What the pairs follow from, if they come from :meth:`from_choices`."""
    validate: InitVar[bool] = True

    mixes_tokens: ClassVar[bool] = False
    """Experts see mixtures of tokens, so that the pairs do not say what to compute."""

    def __post_init__(self, validate: bool) -> None:
        if not validate:
            return
        self._check_shapes()
        check_range("token", self.token, self.num_tokens)
        if readable(self.token):
            self._check_values()

    def __getattr__(self, name: str) -> Any:
        # Python asks here for what a routing of choices has not computed yet.
        choices: Choices | None = vars(self).get("choices")
        if choices is None or name not in LATE:
            raise AttributeError(f"{type(self).__name__}: got {name}, which it does not have")
        with to_keep():
            found = choices.scores() if name == "scores" else choices.pairs()
        for known, value in found.items():
            object.__setattr__(self, known, value)
        return found[name]

    def _check_shapes(self) -> None:
        """Refuse tensors of another shape or dtype."""
        token, offsets, weight, slot = self.token, self.offsets, self.weight, self.slot
        if token.dim() != 1 or token.dtype != torch.int64:
            raise ValueError(f"token: got {described(token)}, expected (P,) int64")
        if offsets.dim() != 1 or offsets.dtype != torch.int32 or not offsets.numel():
            raise ValueError(f"offsets: got {described(offsets)}, expected (E,) int32")
        if weight.shape != token.shape or not weight.is_floating_point():
            raise ValueError(f"weight: got {described(weight)}, expected (P,) floats")
        if self.scores.shape != (self.num_tokens, offsets.numel()):
            raise ValueError(f"scores: got {described(self.scores)}, expected (num_tokens, E)")
        if slot is not None and (slot.shape, slot.dtype) != (token.shape, torch.int64):
            raise ValueError(f"slot: got {described(slot)}, expected (P,) int64, or None")

    def _check_values(self) -> None:
        """Refuse offsets that are not cumulative, pairs out of order, and wrong slots."""
        token, slot = self.token, self.slot
        ends = [0, *self.offsets.tolist()]
        if ends != sorted(ends) or ends[-1] != len(token):
            raise ValueError(
                f"offsets: got {ends[1:]}, expected cumulative ends (load.cumsum(0), not the "
                f"load), up to P={len(token)}"
            )
        is_ascending = (self.expert * self.num_tokens + token).diff() > 0
        if not is_ascending.all():
            raise ValueError(
                "token: got pairs out of order or twice, expected each expert's tokens strictly "
                "ascending"
            )
        if slot is None or not len(token):
            return
        k = len(token) // self.num_tokens
        is_once_each = torch.equal(slot.sort().values, torch.arange(len(slot)))
        if not is_once_each or not torch.equal(slot // max(k, 1), token):
            raise ValueError(
                f"slot: got {slot[:3].tolist()}, expected token * {k} + j, each of "
                f"0..{len(slot) - 1} once"
            )

    @staticmethod
    def from_choices(
        expert_TK: Tensor,
        weight_TK: Tensor,
        *,
        num_experts: int,
        scores: Tensor | None = None,
        logits: Tensor | None = None,
        losses: Mapping[str, AuxLoss] | None = None,
        validate: bool = True,
    ) -> Routing:
        """Build a routing from K experts per token. No host sync.

        The pairs are sorted, and scores computed, when they are asked for.

        Args:
            expert_TK: (T, K) integers in 0..E-1, the experts of each token, distinct in a row.
            weight_TK: (T, K) the weight of each choice; differentiable.
            num_experts: E.
            scores: (T, E) the router's score of every pair; by default the weights, 0 where not
                chosen.
            logits: (T, E) whose softmax they are, instead.
            losses: auxiliary losses by name.
            validate: check the arguments (default ``True``); pass ``False`` if the experts are in
                range and distinct by construction.

        Raises:
            ValueError: shapes or dtypes that do not fit; on the CPU also an expert out of range or
                twice in a row.

        Example:
            >>> probs = logits.softmax(dim=-1)
            >>> weight, expert = probs.topk(2)
            >>> routing = Routing.from_choices(expert, weight, num_experts=8, scores=probs)
        """
        if validate:
            check_choices(expert_TK, weight_TK, num_experts, scores)
        choices = Choices(expert_TK.long(), weight_TK, num_experts, logits)
        known: dict[str, Any] = {} if scores is None else {"scores": scores}
        return _of_choices(choices, losses=losses or {}, **known)

    @staticmethod
    def to_all(weight_TE: Tensor, *, scores: Tensor | None = None) -> Routing:
        """Route each token to all experts: there is nothing to sort.

        Args:
            weight_TE: (T, E) the weight of each pair; differentiable.
            scores: (T, E) the router's score of every pair; by default the weights.
        """
        num_tokens, num_experts = weight_TE.shape
        token_T = torch.arange(num_tokens, device=weight_TE.device)
        last_E = torch.arange(1, num_experts + 1, dtype=torch.int32, device=weight_TE.device)
        expert_E1 = last_E.long()[:, None] - 1
        return Routing(
            token_T.repeat(num_experts),
            last_E * num_tokens,
            weight_TE.T.reshape(-1),
            weight_TE.detach() if scores is None else scores,
            num_tokens,
            slot=(token_T * num_experts + expert_E1).view(-1),
            validate=False,
        )

    def __repr__(self) -> str:
        text = f"{type(self).__name__}({self.num_tokens} tokens, {self.num_experts} experts"
        given = self.offsets if self.choices is None else self.choices.expert_TK
        if type(given) is not Tensor or given.is_meta:  # no values to show
            return f"{text})"
        return f"{text}, load {int(self.load.min())}…{int(self.load.max())})"

    def summary(self) -> str:
        """Describe the routing in several lines.

        They give the load per expert, coverage, entropy, weights, dropped pairs and losses.
        """
        num_pairs = self.token.numel()
        total_weight = float(self.weight.detach().sum())
        lines = [f"{self.num_tokens} tokens, {self.num_experts} experts, {num_pairs} pairs"]
        for expert, load in enumerate(self.load.tolist()):
            share = load / max(num_pairs, 1)
            lines.append(f"  expert {expert}: {load} tokens ({share:.1%} of the pairs)")
        lines.append(f"coverage: {float(self.coverage):.1%} of the tokens have an expert")
        lines.append(f"experts per token: {num_pairs / max(self.num_tokens, 1):.3g}")
        lines.append(f"entropy of the scores: {float(self.entropy):.3g} nats")
        lines.append(f"mean weight: {total_weight / max(num_pairs, 1):.3g}")
        if self.by_group is not None:
            weight_E = self.by_group.routing.to_dense().detach().mean(dim=0)
            shares = ", ".join(f"{weight:.3g}" for weight in weight_E.tolist())
            lines.append(f"mean weight of each expert in a group: {shares}")
        lines.append(f"dropped pairs: {int(self.dropped)}")
        for name, (value, coefficient) in self.losses.items():
            lines.append(f"loss {name}: {float(value):.3g} (coefficient {coefficient:g})")
        return "\n".join(lines)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.offsets.numel() if self.choices is None else self.choices.num_experts

    @lazy
    def load(self) -> Tensor:
        """(E,) int64, the number of tokens of each expert."""
        return self.offsets.diff(prepend=self.offsets.new_zeros(1)).long()

    @lazy
    def expert(self) -> Tensor:
        """(P,) int64, the expert of each pair."""
        return expert_of_rows(self.offsets, self.token.size(0))

    @property
    def top_expert(self) -> Tensor:
        """(T,) int64, the expert with the largest weight of each token; E if it has no expert."""
        none_TE = self.weight.new_full((self.num_tokens, self.num_experts), -torch.inf)
        weight_TE = none_TE.index_put((self.token, self.expert), self.weight.detach())
        best_T, expert_T = weight_TE.max(dim=1)
        return torch.where(best_T > -torch.inf, expert_T, self.num_experts)

    @property
    def dropped(self) -> Tensor:
        """Number of chosen pairs for which their expert had no capacity, a scalar."""
        return self.token.new_zeros(()) if self.dropped_T is None else self.dropped_T.sum()

    @property
    def coverage(self) -> Tensor:
        """Share of the tokens that have at least one expert; 1 if there are no tokens."""
        covered = self.scores.new_zeros(self.num_tokens).index_fill(0, self.token, 1.0)
        return covered.mean() if self.num_tokens else self.scores.new_ones(())

    @property
    def entropy(self) -> Tensor:
        """Mean entropy of a token's scores, in nats; they are normalized to sum to 1."""
        scores = self.scores.detach()
        total = scores.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
        return torch.special.entr(scores / total).sum() / max(self.num_tokens, 1)

    @property
    def aux_loss(self) -> Tensor:
        """The sum of the auxiliary losses, each times its coefficient; 0 if there are none."""
        weighted = (loss.coefficient * loss.value for loss in self.losses.values())
        known = self.weight if self.choices is None else self.choices.weight_TK
        return sum(weighted, known.new_zeros(()))

    def to_dense(self) -> Tensor:
        """(T, E) weights; 0 if the token does not go to the expert."""
        if self.choices is not None:
            expert_TK, weight_TK, *_ = self.choices
            zero_TE = weight_TK.new_zeros(self.num_tokens, self.num_experts)
            return zero_TE.scatter(1, expert_TK, weight_TK)
        zero_TE = self.weight.new_zeros(self.num_tokens, self.num_experts)
        return zero_TE.index_put((self.token, self.expert), self.weight)

    def select(self, tokens: slice | None = None, experts: Sequence[int] | None = None) -> Routing:
        """Restrict the routing to some tokens, some experts, or both, renumbered; the losses stay.

        A slice of tokens that have K experts each costs no host sync. Else the first call of a
        routing costs one, and each slice one more.

        Args:
            tokens: a slice of step 1; its cost is that of the pairs it holds. ``None`` for all.
            experts: distinct experts; ``experts[i]`` becomes expert ``i``. ``None`` for all.

        Raises:
            ValueError: no expert, one that is not there or that is given twice; a slice of another
                step than 1.
        """
        if experts is not None:
            numbers = {*experts} & {*range(self.num_experts)}
            if not numbers or len(numbers) != len(experts):
                raise ValueError(
                    f"experts: got {list(experts)}, expected distinct ones of "
                    f"0..{self.num_experts - 1}, at least one"
                )
        rows = slice(None) if tokens is None else tokens
        start, stop, step = rows.indices(self.num_tokens)
        check(step == 1, "tokens", tokens, "a slice of step 1")
        stop = max(start, stop)  # an empty slice, as Python has it
        is_whole = (start, stop) == (0, self.num_tokens)
        if is_whole and experts is None:
            return self
        if self.pairs_each is not None and experts is None:
            part = self.expand(torch.arange(start, stop, device=self.token.device))
            return replace(part, by_group=None, validate=False)

        # 1. The pairs of each expert: all of them, or those of the slice, which lie in a row since
        # an expert's tokens ascend.
        load_E = self.load
        spans = self._spans
        if not is_whole:
            # [start, stop], made on the device: torch.tensor would copy it there, and wait.
            bounds = start + (stop - start) * torch.arange(2, device=self.token.device)
            within_E2 = torch.stack(
                [torch.searchsorted(self.token[first:end], bounds) for first, end in spans]
            )
            load_E = within_E2[:, 1] - within_E2[:, 0]
            spans = [
                (first + skipped, first + taken)
                for (first, _), (skipped, taken) in zip(spans, within_E2.tolist(), strict=True)
            ]

        # 2. The experts, one by one: a list as an index would be copied to the device, for which
        # the host waits.
        scores = self.scores[rows]
        if experts is not None:
            load_E = torch.stack([load_E[expert] for expert in experts])
            scores = torch.stack([scores[:, expert] for expert in experts], dim=1)
            spans = [spans[expert] for expert in experts]

        # 3. Their pairs, with tokens counted from the start of the slice.
        token = torch.cat([self.token[first:end] for first, end in spans])
        weight = torch.cat([self.weight[first:end] for first, end in spans])
        return Routing(
            token - start,
            load_E.cumsum(0).to(torch.int32),
            weight,
            scores,
            scores.size(0),
            self.losses,
            None if self.dropped_T is None else self.dropped_T[rows],
            self.detached,
            validate=False,
        )

    def expand(self, group_T: Tensor) -> Routing:
        """Give each token the decision of its group: the nodes of a graph, the patches of an image.

        ``self`` decides for the groups. Losses remain those of the groups.

        Args:
            group_T: (T,) integers, the group of each token, as PyG's ``batch``.

        Raises:
            ValueError: no integers (T,); on the CPU also groups that are not there.

        Example:
            >>> graphs = router(global_mean_pool(x, batch))
            >>> out = layer(x, edge_index, routing=graphs.expand(batch))
        """
        if group_T.dim() != 1 or group_T.dtype not in INTEGERS:
            raise ValueError(f"group_T: got {described(group_T)}, expected (T,) integers")
        check_range("group_T", group_T, self.num_tokens)
        scores_TE = self.scores.index_select(0, group_T)
        dropped_T = self.dropped_T
        known: dict[str, Any] = {
            "losses": self.losses,
            "dropped_T": None if dropped_T is None else dropped_T.index_select(0, group_T),
            "detached": self.detached,
            "by_group": ByGroup(self, group_T),
        }
        if self.by_token is None:  # some groups have more experts than others
            chosen_GE = torch.zeros_like(self.scores, dtype=torch.bool)
            chosen_GE[self.token, self.expert] = True
            expert_P, token_P = chosen_GE.index_select(0, group_T).T.nonzero(as_tuple=True)
            weight_P = self.to_dense()[group_T[token_P], expert_P]
            offsets_E = expert_P.bincount(minlength=self.num_experts).cumsum(0).to(torch.int32)
            tokens = Routing(
                token_P, offsets_E, weight_P, scores_TE, group_T.size(0), validate=False
            )
        elif self.pairs_each == self.num_experts:
            tokens = Routing.to_all(self.to_dense().index_select(0, group_T), scores=scores_TE)
        else:
            expert_GK, weight_GK, *_ = self.by_token
            choices = Choices(
                expert_GK.index_select(0, group_T),
                weight_GK.index_select(0, group_T),
                self.num_experts,
            )
            return _of_choices(choices, scores=scores_TE, **known)
        return replace(tokens, **known, validate=False)

    @property
    def pairs_each(self) -> int | None:
        """K, if it is known without a look at values that each token has K pairs."""
        if self.choices is not None:
            return self.choices.expert_TK.size(1)
        return None if self.slot is None else self.slot.size(0) // max(self.num_tokens, 1)

    @lazy
    def by_token(self) -> Choices | None:
        """The experts and weights of each token's K pairs; ``None`` if K is not one number."""
        k = self.pairs_each
        if k is None or self.choices is not None:
            return self.choices
        with to_keep():
            expert_TK, weight_TK = (
                AtPlaces.apply(of_pairs, self.place).view(self.num_tokens, k)
                for of_pairs in (self.expert, self.weight)
            )
            return Choices(expert_TK, weight_TK, self.num_experts)

    @lazy
    def place(self) -> Any:
        """The pair in each slot, (P,) int64, the K pairs of a token in a row. ``None`` if there are
        no slots."""
        if self.slot is None:
            return None
        with to_keep():
            pair_P = torch.arange(self.slot.size(0), device=self.slot.device)
            return torch.empty_like(self.slot).scatter_(0, self.slot, pair_P)

    @lazy
    def blocks(self) -> Blocks:
        """The pairs in blocks of one expert each, placed by slots if there are any."""
        with to_keep():
            by_pair = blocks_of(self.offsets, self.expert)
            if self.slot is None:
                return by_pair
            place_P = torch.empty_like(self.slot).scatter_(0, self.slot, by_pair.place_P)
            return by_pair._replace(place_P=place_P)

    @lazy
    def _spans(self) -> list[tuple[int, int]]:
        """First and end of each expert's pairs, read from the device once."""
        ends = self.offsets.tolist()
        return [*zip([0, *ends[:-1]], ends, strict=True)]


def _of_choices(choices: Choices, **known: Any) -> Routing:
    """A routing of which only the choices and some fields are known yet."""
    routing = object.__new__(Routing)
    fixed = {"dropped_T": None, "detached": False, "by_group": None}
    values = {"num_tokens": choices.expert_TK.size(0), "choices": choices, **fixed, **known}
    for name, value in values.items():
        object.__setattr__(routing, name, value)
    return routing


def checked_routing(routing: Routing | None, num_tokens: int, num_experts: int) -> Routing:
    """A decision made elsewhere, if it fits the layer.

    Raises:
        ValueError: no decision, or one of other tokens or experts.
    """
    if routing is None:
        raise ValueError(
            "routing: got None, expected a Routing, since the layer was built with router=None"
        )
    is_fitting = isinstance(routing, Routing) and routing.num_tokens == num_tokens
    if not is_fitting or routing.mixes_tokens or routing.num_experts != num_experts:
        raise ValueError(
            f"routing: got {routing!r}, expected a Routing of {num_tokens} tokens and "
            f"{num_experts} experts"
        )
    return routing


def as_list(routings: Routing | Iterable[Routing]) -> list[Routing]:
    """The routings of one or several layers.

    Raises:
        ValueError: a dictionary, or an item that is not a :class:`Routing`.
    """
    if isinstance(routings, Mapping):
        raise ValueError("routings: got a dictionary, expected its values()")
    found = list(routings) if isinstance(routings, Iterable) else [routings]
    for routing in found:
        if not isinstance(routing, Routing):
            name = type(routing).__name__
            raise ValueError(f"routings: got {name}, expected a Routing, or one of each layer")
    return found


def aux_loss(routings: Routing | Iterable[Routing]) -> Tensor:
    """Sum the auxiliary losses of one or several layers; add the result to the task loss.

    Warns if a layer in training computed its losses with gradients off: they train nothing.

    Args:
        routings: from ``return_routing=True`` or :func:`record_routing`.

    Returns:
        A scalar; a plain 0 on the CPU if ``routings`` is empty (a model without MoE layers).

    Example:
        >>> loss = F.cross_entropy(logits, y) + gmoe.aux_loss(routings)
    """
    routings = as_list(routings)
    if torch.is_grad_enabled() and any(routing.detached for routing in routings):
        warnings.warn(
            "aux_loss: got losses without a gradient from a layer in training, which ran under "
            "no_grad or under reentrant checkpointing; use "
            "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)",
            stacklevel=2,
        )
    losses = [routing.aux_loss for routing in routings]
    return torch.stack(losses).sum() if losses else torch.zeros(())
