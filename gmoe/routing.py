"""The decision of a router, its auxiliary losses, and how to record it.

Shapes: T tokens, E experts, K experts per token, P pairs.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import InitVar, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gmoe._autograd import untraced

GAIN_SCALE = 0.1
"""Factor of the gains of convs with a dense start. Adam moves a number by the learning rate a step, however small its
gradient: the factor keeps the routed experts small where steps and labels are few."""


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
        detached: whether the losses were computed in training while gradients were off, so that they train nothing.
        contiguous: whether ``token`` is 0, 1, ..., T - 1, so that every expert owns a slice of the tokens and nothing
            has to be gathered or scattered.
        checked: the values of ``token`` and ``offsets`` are right by construction: do not read them.

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
    contiguous: bool = False
    checked: InitVar[bool] = False

    def __post_init__(self, checked: bool) -> None:
        token, offsets, weight, pairs = self.token, self.offsets, self.weight, self.token.numel()
        of_scores = (self.num_tokens, offsets.numel())
        for name, value, fits, expected in (
            ("token", token, token.dim() == 1 and token.dtype == torch.int64, "(P,) int64"),
            ("offsets", offsets, offsets.dim() == 1 and offsets.dtype == torch.int32 and offsets.numel(), "(E,) int32"),
            ("weight", weight, weight.shape == token.shape and weight.is_floating_point(), "(P,) floats"),
            ("scores", self.scores, self.scores.shape == of_scores, f"(num_tokens={of_scores[0]}, E={of_scores[1]})"),
        ):
            if not fits:
                raise ValueError(f"{name}: got shape {tuple(value.shape)} of {value.dtype}, expected {expected}")
        # reading values would cost a host sync on a GPU, and what is compiled or fake has none
        on_cpu = token.device.type == offsets.device.type == "cpu"
        if checked or torch.compiler.is_compiling() or type(token) is not Tensor or not on_cpu:
            return
        ends = offsets.tolist()
        if ends != sorted(ends) or ends[0] < 0 or ends[-1] != pairs:
            raise ValueError(
                f"offsets: got {ends}, expected the experts' cumulative ends (load.cumsum(0), not the load itself), "
                f"never falling, the last one the number of pairs {pairs}"
            )
        if pairs and not 0 <= int(token.min()) <= int(token.max()) < self.num_tokens:
            got = f"values in {int(token.min())}..{int(token.max())}"
            raise ValueError(f"token: got {got}, expected 0..num_tokens-1={self.num_tokens - 1}")
        falls = torch.zeros(pairs + 1, dtype=torch.bool)
        falls[1:pairs] = token[1:] <= token[:-1]
        falls[offsets.long()] = False  # where the next expert begins
        if bool(falls.any()):
            raise ValueError("token: got pairs out of order or twice, expected each expert's tokens strictly ascending")
        if self.contiguous and not torch.equal(token, torch.arange(self.num_tokens)):
            raise ValueError("token: got other values, expected 0, 1, ..., num_tokens - 1 with contiguous=True")

    @staticmethod
    def from_choices(
        expert_TK: Tensor,
        weight_TK: Tensor,
        num_experts: int,
        scores: Tensor | None = None,
        losses: Mapping[str, AuxLoss] | None = None,
    ) -> Routing:
        """Build a routing from K experts per token. No host sync.

        Args:
            expert_TK: (T, K) integers in 0..E-1, the experts of each token, distinct in a row.
            weight_TK: (T, K) the weight of each choice; differentiable.
            num_experts: E.
            scores: (T, E) the router's score of every pair; by default the weights, 0 where not chosen.
            losses: auxiliary losses by name.

        Raises:
            ValueError: shapes or dtypes that do not fit; on the CPU also an expert out of range or twice in a row.

        Example:
            >>> probs = logits.softmax(dim=-1)
            >>> weight, expert = probs.topk(2)
            >>> routing = Routing.from_choices(expert, weight, num_experts=8, scores=probs)
        """
        if not isinstance(expert_TK, Tensor) or not isinstance(weight_TK, Tensor):
            got = f"{type(expert_TK).__name__} and {type(weight_TK).__name__}"
            raise ValueError(f"expert_TK, weight_TK: got {got}, expected (T, K) tensors")
        if expert_TK.dim() != 2 or expert_TK.is_floating_point() or expert_TK.dtype == torch.bool:
            got = f"shape {tuple(expert_TK.shape)} of {expert_TK.dtype}"
            raise ValueError(f"expert_TK: got {got}, expected (T, K) integers")
        num_tokens, k = expert_TK.shape
        if weight_TK.shape != (num_tokens, k):
            got = f"shape {tuple(weight_TK.shape)}"
            raise ValueError(f"weight_TK: got {got}, expected that of expert_TK, {(num_tokens, k)}")
        expert_P, slot_P = expert_TK.long().reshape(-1).sort(stable=True)
        on_cpu = type(expert_P) is Tensor and expert_P.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_cpu and expert_P.numel() and not 0 <= int(expert_P[0]) <= int(expert_P[-1]) < num_experts:
            got = f"values in {int(expert_P[0])}..{int(expert_P[-1])}"
            raise ValueError(f"expert_TK: got {got}, expected 0..num_experts-1={num_experts - 1}")
        if scores is None:
            none_TE = weight_TK.detach().new_zeros(num_tokens, num_experts)
            scores = none_TE.scatter(1, expert_TK.long(), weight_TK.detach())
        experts_E = torch.arange(num_experts, device=expert_P.device)
        offsets_E = torch.searchsorted(expert_P, experts_E, right=True, out_int32=True)
        weight_P = weight_TK.reshape(-1).index_select(0, slot_P)
        token_P = slot_P if k == 1 else slot_P // max(k, 1)
        return Routing(token_P, offsets_E, weight_P, scores, num_tokens, losses or {}, checked=k == 1)

    @staticmethod
    def everyone(num_tokens: int, like: Tensor) -> Routing:
        """One expert that takes every token with weight 1; dtype and device are those of ``like``."""
        token = torch.arange(num_tokens, device=like.device)
        offsets = torch.full((1,), num_tokens, dtype=torch.int32, device=like.device)
        ones = like.new_ones(num_tokens)
        return Routing(token, offsets, ones, ones[:, None], num_tokens, contiguous=True, checked=True)

    def __repr__(self) -> str:
        text = f"{type(self).__name__}({self.num_tokens} tokens, {self.num_experts} experts"
        if type(self.offsets) is not Tensor or self.offsets.is_meta:  # no values to show
            return f"{text})"
        load = self.load
        return f"{text}, load {int(load.min())}…{int(load.max())})"

    def summary(self) -> str:
        """Describe it in several lines: load per expert, coverage, entropy, weights, dropped pairs, losses."""
        pairs, load = self.token.numel(), self.load.tolist()
        lines = [f"{self.num_tokens} tokens, {self.num_experts} experts, {pairs} pairs"]
        lines += [f"  expert {e}: {n} tokens ({n / max(pairs, 1):.1%} of the pairs)" for e, n in enumerate(load)]
        lines += [
            f"coverage: {float(self.coverage):.1%} of the tokens have an expert",
            f"experts per token: {pairs / max(self.num_tokens, 1):.3g}",
            f"entropy of the scores: {float(self.entropy):.3g} nats",
            f"mean weight: {float(self.weight.detach().mean()) if pairs else 0.0:.3g}",
            f"dropped pairs: {int(self.dropped)}",
        ]
        lines += [
            f"loss {name}: {float(loss.value.detach()):.3g} (coefficient {loss.coefficient:g})"
            for name, loss in self.losses.items()
        ]
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
        experts = torch.arange(self.num_experts, device=self.token.device)
        return experts.repeat_interleave(self.load, output_size=self.token.numel())

    @property
    def top_expert(self) -> Tensor:
        """(T,) int64, the expert with the largest weight of each token; E of a token without an expert."""
        flat = self.token * self.num_experts + self.expert
        weight = torch.full_like(self.scores, -torch.inf, dtype=self.weight.dtype).flatten()
        best_T, expert_T = weight.index_copy(0, flat, self.weight.detach()).view_as(self.scores).max(dim=1)
        return torch.where(best_T > -torch.inf, expert_T, self.num_experts)

    @property
    def dropped(self) -> Tensor:
        """Number of pairs that tokens chose and experts had no capacity for, a scalar."""
        return self.token.new_zeros(()) if self.dropped_T is None else self.dropped_T.sum()

    @property
    def coverage(self) -> Tensor:
        """Share of the tokens that have at least one expert; 1 where there are no tokens."""
        if self.num_tokens == 0:
            return self.scores.new_ones(())
        covered = self.scores.new_zeros(self.num_tokens).index_fill(0, self.token, 1.0)
        return covered.mean()

    @property
    def entropy(self) -> Tensor:
        """Mean over tokens of the entropy, in nats, of the scores normalized to sum to 1 over the experts."""
        scores = self.scores.detach()
        prob = scores / scores.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
        return torch.special.entr(prob).sum(dim=-1).sum() / max(self.num_tokens, 1)

    @property
    def aux_loss(self) -> Tensor:
        """The sum of the auxiliary losses, each times its coefficient; 0 where there are none."""
        return sum((loss.coefficient * loss.value for loss in self.losses.values()), self.scores.new_zeros(()))

    def to_dense(self) -> Tensor:
        """(T, E) weights; 0 where the token does not go to the expert."""
        flat = self.token * self.num_experts + self.expert
        dense = self.weight.new_zeros(self.num_tokens * self.num_experts).index_add(0, flat, self.weight)
        return dense.view(self.num_tokens, self.num_experts)

    def scaled(self, gain: Tensor) -> Routing:
        """Scale the weights by ``GAIN_SCALE`` and a learned gain (1,)."""
        return replace(self, weight=self.weight * (GAIN_SCALE * gain).to(self.weight.dtype), checked=True)

    def select(self, tokens: Tensor) -> Routing:
        """Restrict the routing to some tokens, renumbered; the losses stay.

        Args:
            tokens: (t,) distinct tokens; ``tokens[i]`` becomes token ``i``.
        """
        place = torch.full((self.num_tokens,), -1, device=self.token.device)
        place[tokens] = torch.arange(len(tokens), device=self.token.device)
        token_P = place[self.token]
        kept = (token_P >= 0).nonzero().view(-1)
        # by expert, as they are, and then by their new number
        kept = kept[(self.expert[kept] * len(tokens) + token_P[kept]).argsort()]
        offsets = torch.searchsorted(kept, self.offsets.long(), out_int32=True)
        scores, dropped_T = self.scores[tokens], None if self.dropped_T is None else self.dropped_T[tokens]
        weight = self.weight[kept]
        return Routing(token_P[kept], offsets, weight, scores, len(tokens), self.losses, dropped_T, self.detached)

    def first(self, num_tokens: int) -> Routing:
        """:meth:`between` of the first ``num_tokens`` tokens."""
        return self if num_tokens == self.num_tokens else self.between(0, num_tokens)

    def between(self, start: int, end: int) -> Routing:
        """:meth:`select` of the tokens ``start:end``, at the cost of what they hold. Host syncs."""
        bounds = torch.tensor([start, end], device=self.token.device)
        spans = []
        for low, high in self._spans():  # each in the order of its tokens
            before, until = torch.searchsorted(self.token[low:high], bounds).tolist()
            spans.append((low + before, low + until))
        dropped_T = None if self.dropped_T is None else self.dropped_T[start:end]
        return self._of_spans(spans, self.scores[start:end], dropped_T, start)

    def of_experts(self, experts: Sequence[int]) -> Routing:
        """Restrict the routing to some experts, renumbered; the losses stay. One host sync.

        Args:
            experts: distinct experts; ``experts[i]`` becomes expert ``i``.
        """
        spans = self._spans()
        return self._of_spans([spans[expert] for expert in experts], self.scores[:, list(experts)])

    def _spans(self) -> list[tuple[int, int]]:
        """Where each expert's pairs begin and end."""
        ends = self.offsets.tolist()
        return list(zip([0, *ends], ends, strict=False))

    def _of_spans(
        self, spans: list[tuple[int, int]], scores: Tensor, dropped_T: Tensor | None = None, start: int = 0
    ) -> Routing:
        """The pairs in some spans, one per expert, of tokens that are numbered from ``start``."""
        token, weight = (torch.cat([value[low:high] for low, high in spans]) for value in (self.token, self.weight))
        offsets = torch.tensor([high - low for low, high in spans], device=token.device).cumsum(0).to(torch.int32)
        return Routing(token - start, offsets, weight, scores, len(scores), self.losses, dropped_T, self.detached)


def aux_loss(routings: Routing | Iterable[Routing]) -> Tensor:
    """Sum the auxiliary losses of one or several layers; add the result to the task loss.

    Warns if a layer in training computed its losses with gradients off: they train nothing.

    Args:
        routings: from ``return_routing=True`` or :func:`record_routing`.

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
    from gmoe.routers.base import Router  # which imports this module

    routings: list[Routing] = []
    thread = threading.get_ident()

    @untraced
    def keep(_: nn.Module, __: Any, routing: Routing) -> None:
        if threading.get_ident() == thread and not in_backward():
            routings.append(routing)

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, Router):
                stack.callback(module.register_forward_hook(keep).remove)
        yield routings
        if not routings:
            raise RuntimeError(
                "record_routing: nothing was recorded; run a model that holds MoE layers inside the block (one that "
                "was compiled and called before the block does not see the hooks: enter the block first)"
            )


def in_backward() -> bool:
    """Whether autograd is running a backward pass, as when activation checkpointing recomputes a forward."""
    # what torch.utils.checkpoint itself asks; a compiled checkpoint recomputes without Python
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
