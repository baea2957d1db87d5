"""The decision of a router, its auxiliary losses, and how to record it.

Shapes: T tokens, E experts, K experts per token, P pairs.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import InitVar, dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gmoe._autograd import untraced
from gmoe._checks import check

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
"""The dtypes of indices."""


class AuxLoss(NamedTuple):
    """An auxiliary loss: its value, and its coefficient in the training loss."""

    value: Tensor
    coefficient: float


@dataclass(frozen=True, eq=False, repr=False)
class Routing:
    """Which expert handles which token: sparse (token, expert) pairs, ready for a grouped GEMM.

    Pairs are sorted by expert and, within an expert, by token. Build one with :meth:`from_choices` in your own router.

    Args:
        token: (P,) int64, the token of each pair.
        offsets: (E,) int32, cumulative ends: expert ``e`` owns the pairs ``offsets[e - 1]:offsets[e]``.
        weight: (P,) the factor of the expert's output in the token's sum; differentiable.
        scores: (T, E) the router's score of every pair: probabilities, or votes.
        num_tokens: T.
        losses: auxiliary losses by name, each with its coefficient.
        dropped_T: (T,) int64, how many pairs of each token exceeded the capacity; ``None`` if nothing can be dropped.
        slot: (P,) int64, where each token has the same number K of pairs: ``token * K + j``, each once. It is for speed
            alone; ``None`` (default) elsewhere.
        detached: the losses were computed in training while gradients were off, so that they train nothing.
        checked: everything is right by construction: check nothing.

    Raises:
        ValueError: a tensor of another shape or dtype; on the CPU also offsets that are not cumulative, tokens out of
            range, and pairs out of order (elsewhere reading values would cost a host sync).
    """

    token: Tensor
    offsets: Tensor
    weight: Tensor
    scores: Tensor
    num_tokens: int
    losses: Mapping[str, AuxLoss] = field(default_factory=dict)
    dropped_T: Tensor | None = None
    detached: bool = False
    slot: Tensor | None = None
    checked: InitVar[bool] = False

    def __post_init__(self, checked: bool) -> None:
        if not checked:
            self._check()

    def _check(self) -> None:
        token, offsets, weight, slot = self.token, self.offsets, self.weight, self.slot
        for name, fits, expected in (
            ("token", token.dim() == 1 and token.dtype == torch.int64, "(P,) int64"),
            ("offsets", offsets.dim() == 1 and offsets.dtype == torch.int32 and offsets.numel(), "(E,) int32"),
            ("weight", weight.shape == token.shape and weight.is_floating_point(), "(P,) floats"),
            ("scores", self.scores.shape == (self.num_tokens, offsets.numel()), "(num_tokens, E)"),
            ("slot", slot is None or (slot.shape, slot.dtype) == (token.shape, torch.int64), "(P,) int64, or None"),
        ):
            if not fits:
                raise ValueError(f"{name}: got {described(getattr(self, name))}, expected {expected}")
        check_range("token", token, self.num_tokens)
        if readable(token):
            ends = [0, *offsets.tolist()]
            cumulative = ends == sorted(ends) and ends[-1] == len(token)
            legal = f"cumulative ends (load.cumsum(0), not the load), up to P={len(token)}"
            check(cumulative, "offsets", ends[1:], legal)
            ascending = (self.expert * self.num_tokens + token).diff() > 0
            check(ascending.all(), "token", "pairs out of order or twice", "each expert's tokens strictly ascending")
            if slot is not None and len(token):
                k = len(token) // max(self.num_tokens, 1)
                each = torch.equal(slot.sort().values, torch.arange(len(slot))) and torch.equal(
                    slot // max(k, 1), token
                )
                check(each, "slot", slot[:3].tolist(), f"token * {k} + j, each of 0..{len(slot) - 1} once")

    @staticmethod
    def from_choices(
        expert_TK: Tensor,
        weight_TK: Tensor,
        num_experts: int,
        scores: Tensor | None = None,
        losses: Mapping[str, AuxLoss] | None = None,
        checked: bool = False,
    ) -> Routing:
        """Build a routing from K experts per token. No host sync.

        Args:
            expert_TK: (T, K) integers in 0..E-1, the experts of each token, distinct in a row.
            weight_TK: (T, K) the weight of each choice; differentiable.
            num_experts: E.
            scores: (T, E) the router's score of every pair; by default the weights, 0 where not chosen.
            losses: auxiliary losses by name.
            checked: the experts are in range and distinct by construction: do not read them.

        Raises:
            ValueError: shapes or dtypes that do not fit; on the CPU also an expert out of range or twice in a row.

        Example:
            >>> probs = logits.softmax(dim=-1)
            >>> weight, expert = probs.topk(2)
            >>> routing = Routing.from_choices(expert, weight, num_experts=8, scores=probs)
        """
        if not checked:
            _check_choices(expert_TK, weight_TK, num_experts, scores)
        (num_tokens, k), expert_TK = expert_TK.shape, expert_TK.long()
        if scores is None:
            scores = weight_TK.new_zeros(num_tokens, num_experts).scatter(1, expert_TK, weight_TK.detach())
        expert_P, slot_P = expert_TK.reshape(-1).sort(stable=True)
        experts_E = torch.arange(num_experts, device=expert_P.device)
        offsets_E = torch.searchsorted(expert_P, experts_E, right=True, out_int32=True)
        weight_P = weight_TK.reshape(-1).index_select(0, slot_P)
        token_P = slot_P if k == 1 else slot_P // max(k, 1)
        rest = (weight_P, scores, num_tokens, losses or {})
        return Routing(token_P, offsets_E, *rest, slot=slot_P, checked=checked)

    def __repr__(self) -> str:
        text = f"{type(self).__name__}({self.num_tokens} tokens, {self.num_experts} experts"
        if type(self.offsets) is not Tensor or self.offsets.is_meta:  # no values to show
            return f"{text})"
        return f"{text}, load {int(self.load.min())}…{int(self.load.max())})"

    def summary(self) -> str:
        """Describe it in several lines: load per expert, coverage, entropy, weights, dropped pairs, losses."""
        pairs, weight = self.token.numel(), float(self.weight.detach().sum())
        lines = [f"{self.num_tokens} tokens, {self.num_experts} experts, {pairs} pairs"]
        for expert, load in enumerate(self.load.tolist()):
            lines.append(f"  expert {expert}: {load} tokens ({load / max(pairs, 1):.1%} of the pairs)")
        lines.append(f"coverage: {float(self.coverage):.1%} of the tokens have an expert")
        lines.append(f"experts per token: {pairs / max(self.num_tokens, 1):.3g}")
        lines.append(f"entropy of the scores: {float(self.entropy):.3g} nats")
        lines.append(f"mean weight: {weight / max(pairs, 1):.3g}")
        lines.append(f"dropped pairs: {int(self.dropped)}")
        for name, (value, coefficient) in self.losses.items():
            lines.append(f"loss {name}: {float(value):.3g} (coefficient {coefficient:g})")
        return "\n".join(lines)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.offsets.numel()

    @property
    def load(self) -> Tensor:
        """(E,) int64, the number of tokens of each expert."""
        return self.offsets.diff(prepend=self.offsets.new_zeros(1)).long()

    @property
    def expert(self) -> Tensor:
        """(P,) int64, the expert of each pair."""
        return owner(self.offsets, self.token)

    @property
    def top_expert(self) -> Tensor:
        """(T,) int64, the expert with the largest weight of each token; E of a token without an expert."""
        weight_TE = torch.full_like(self.scores, -torch.inf, dtype=self.weight.dtype)
        best_T, expert_T = weight_TE.index_put((self.token, self.expert), self.weight.detach()).max(dim=1)
        return torch.where(best_T > -torch.inf, expert_T, self.num_experts)

    @property
    def dropped(self) -> Tensor:
        """Number of pairs that tokens chose and experts had no capacity for, a scalar."""
        return self.token.new_zeros(()) if self.dropped_T is None else self.dropped_T.sum()

    @property
    def coverage(self) -> Tensor:
        """Share of the tokens that have at least one expert; 1 where there are no tokens."""
        covered = self.scores.new_zeros(self.num_tokens).index_fill(0, self.token, 1.0)
        return covered.mean() if self.num_tokens else self.scores.new_ones(())

    @property
    def entropy(self) -> Tensor:
        """Mean over tokens of the entropy, in nats, of the scores normalized to sum to 1 over the experts."""
        scores = self.scores.detach()
        prob = scores / scores.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
        return torch.special.entr(prob).sum() / max(self.num_tokens, 1)

    @property
    def aux_loss(self) -> Tensor:
        """The sum of the auxiliary losses, each times its coefficient; 0 where there are none."""
        return sum((loss.coefficient * loss.value for loss in self.losses.values()), self.scores.new_zeros(()))

    def to_dense(self) -> Tensor:
        """(T, E) weights; 0 where the token does not go to the expert."""
        none_TE = self.weight.new_zeros(self.num_tokens, self.num_experts)
        return none_TE.index_put((self.token, self.expert), self.weight)

    def select(self, tokens: slice | None = None, experts: Sequence[int] | None = None) -> Routing:
        """Restrict the routing to some tokens, some experts, or both, renumbered; the losses stay.

        One host sync for all calls of a routing, and one more for each slice.

        Args:
            tokens: a slice of step 1, whose cost is that of the pairs it holds; ``None`` for all.
            experts: distinct experts; ``experts[i]`` becomes expert ``i``. ``None`` for all.
        """
        rows = slice(None) if tokens is None else tokens
        start, stop, _ = rows.indices(self.num_tokens)
        whole = (start, stop) == (0, self.num_tokens)
        if whole and experts is None:
            return self
        load_E, spans = self.load, self._spans
        if not whole:  # an expert's pairs lie in the order of their tokens
            bounds = start + (stop - start) * torch.arange(2, device=self.token.device)
            found_E2 = torch.stack([torch.searchsorted(self.token[first:end], bounds) for first, end in spans])
            load_E = found_E2[:, 1] - found_E2[:, 0]
            spans = [
                (first + skipped, first + taken)
                for (first, _), (skipped, taken) in zip(spans, found_E2.tolist(), strict=True)
            ]
        scores = self.scores[rows]
        if experts is not None:
            # One by one: a list as an index would be copied to the device, for which the host waits.
            load_E = torch.stack([load_E[expert] for expert in experts])
            scores = torch.stack([scores[:, expert] for expert in experts], dim=1)
            spans = [spans[expert] for expert in experts]
        token, weight = (torch.cat([values[first:end] for first, end in spans]) for values in (self.token, self.weight))
        offsets = load_E.cumsum(0).to(torch.int32)
        dropped_T = None if self.dropped_T is None else self.dropped_T[rows]
        rest = (weight, scores, len(scores), self.losses, dropped_T, self.detached)
        return Routing(token - start, offsets, *rest, checked=True)

    @cached_property
    def _spans(self) -> list[tuple[int, int]]:
        """First and end of each expert's pairs, read from the device once."""
        ends = self.offsets.tolist()
        return [*zip([0, *ends[:-1]], ends, strict=True)]


def owner(offsets_E: Tensor, token_P: Tensor) -> Tensor:
    """(P,) int64, the expert of each pair."""
    pairs = torch.arange(len(token_P), dtype=torch.int32, device=token_P.device)
    return torch.searchsorted(offsets_E, pairs, right=True)


def _check_choices(expert_TK: Tensor, weight_TK: Tensor, num_experts: int, scores: Tensor | None) -> None:
    integers = isinstance(expert_TK, Tensor) and expert_TK.dim() == 2 and expert_TK.dtype in INTEGERS
    check(integers, "expert_TK", described(expert_TK), "(T, K) integers")
    fits = isinstance(weight_TK, Tensor) and weight_TK.shape == expert_TK.shape
    check(fits, "weight_TK", described(weight_TK), f"a tensor of {tuple(expert_TK.shape)}")
    check_range("expert_TK", expert_TK, num_experts)
    legal = (len(expert_TK), num_experts)
    check(scores is None or scores.shape == legal, "scores", described(scores), f"a tensor of {legal}")


def described(value: object) -> str:
    """Describe an argument for an error."""
    return f"shape {tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def readable(value: Tensor) -> bool:
    """True for values that can be read without a host sync: not on a GPU, compiled or fake."""
    return type(value) is Tensor and value.device.type == "cpu" and not torch.compiler.is_compiling()


def check_range(name: str, index: Tensor, end: int) -> None:
    """Refuse indices outside 0..end-1, where they can be read without a host sync."""
    if readable(index):
        outside = index[(index.long() < 0) | (index.long() >= end)]
        check(not len(outside), name, outside[:3].tolist(), f"values in 0..{end - 1}")


def aux_loss(routings: Routing | Iterable[Routing]) -> Tensor:
    """Sum the auxiliary losses of one or several layers; add the result to the task loss.

    Warns if a layer in training computed its losses with gradients off: they train nothing.

    Args:
        routings: from ``return_routing=True`` (of a ``HeteroMoEConv`` its ``values()``) or :func:`record_routing`.

    Returns:
        A scalar; a plain 0 on the CPU where ``routings`` is empty (a model without MoE layers).

    Example:
        >>> loss = F.cross_entropy(logits, y) + gmoe.aux_loss(routings)
    """
    routings = [routings] if isinstance(routings, Routing) else list(routings)
    if torch.is_grad_enabled() and any(routing.detached for routing in routings):
        warnings.warn(
            "aux_loss: got losses without a gradient from a layer in training, which ran under no_grad or under "
            "reentrant checkpointing; use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)",
            stacklevel=2,
        )
    losses = [routing.aux_loss for routing in routings]
    return torch.stack(losses).sum() if losses else torch.zeros(())


@contextmanager
def record_routing(model: nn.Module) -> Iterator[list[Routing]]:
    """Record the :class:`Routing` of every router in ``model``, in order of execution, inside the block.

    For models that cannot pass routings on, such as torchvision's ViT. Records only the thread that entered the block,
    and not what activation checkpointing recomputes.

    Args:
        model: any model that holds routers.

    Raises:
        RuntimeError: nothing was recorded in the block (also of a model that ``torch.compile`` traced before it).

    Example:
        >>> with record_routing(vit) as routings:
        ...     loss = F.cross_entropy(vit(images), labels)
        >>> loss = loss + gmoe.aux_loss(routings)
    """
    routings: list[Routing] = []
    thread = threading.get_ident()

    @untraced
    def keep(_: nn.Module, __: Any, routing: Routing) -> None:
        # not what a user's own method of that name gives, nor in a backward pass
        if isinstance(routing, Routing) and threading.get_ident() == thread and torch._C._current_graph_task_id() == -1:
            routings.append(routing)

    with ExitStack() as stack:
        for module in model.modules():
            if hasattr(type(module), "route"):  # a router, or what stands in for one
                stack.callback(module.register_forward_hook(keep).remove)
        yield routings
        if not routings:
            raise RuntimeError(
                "record_routing: nothing was recorded; run a model that holds MoE layers inside the block (one that "
                "was compiled and called before the block does not see the hooks: enter the block first)"
            )
