"""What a router returns. Shapes: T tokens, E experts, P (token, expert) pairs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class AuxLoss(NamedTuple):
    """An auxiliary loss: the bare scalar and the coefficient that it enters the training loss with."""

    value: Tensor
    coefficient: float


@dataclass(frozen=True, eq=False)
class Routing:
    """Which expert handles which token, sparse and ready for a grouped GEMM.

    The pairs are sorted by expert and, inside an expert, by token.

    Args:
        token: (P,) int64, the token of each pair.
        offsets: (E,) int32, cumulative ends: expert ``e`` owns the pairs ``offsets[e - 1]:offsets[e]``.
        weight: (P,) the factor of the expert's output in the token's sum; differentiable.
        scores: (T, E) what the router thinks of every pair: probabilities, or votes.
        num_tokens: T.
        losses: auxiliary losses by name, each with its coefficient.
        dropped: pairs that tokens chose and experts had no capacity for.
    """

    token: Tensor
    offsets: Tensor
    weight: Tensor
    scores: Tensor
    num_tokens: int
    losses: Mapping[str, AuxLoss] = field(default_factory=dict)
    dropped: int = 0

    @staticmethod
    def everyone(num_tokens: int, like: Tensor) -> Routing:
        """One expert that takes every token with weight 1; dtype and device are those of ``like``."""
        token = torch.arange(num_tokens, device=like.device)
        offsets = torch.full((1,), num_tokens, dtype=torch.int32, device=like.device)
        ones = like.new_ones(num_tokens)
        return Routing(token, offsets, ones, ones[:, None], num_tokens)

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
    def coverage(self) -> Tensor:
        """Share of the tokens that have at least one expert; 1 where there are no tokens."""
        if self.num_tokens == 0:
            return self.scores.new_ones(())
        covered = self.scores.new_zeros(self.num_tokens).index_fill(0, self.token, 1.0)
        return covered.mean()

    @property
    def entropy(self) -> Tensor:
        """Mean over tokens of the entropy, in nats, of the scores normalised to sum to 1 over the experts."""
        scores = self.scores.detach()
        prob = scores / scores.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
        return torch.special.entr(prob).sum(dim=-1).sum() / max(self.num_tokens, 1)

    @property
    def aux_loss(self) -> Tensor:
        """The sum of the auxiliary losses, each times its coefficient; 0 where there are none."""
        total = self.scores.new_zeros(())
        for loss in self.losses.values():
            total = total + loss.coefficient * loss.value
        return total

    def first(self, num_tokens: int) -> Routing:
        """The routing of the first ``num_tokens`` tokens, as decided among all of them; the losses stay.

        What was dropped stays as well, since it is not known whose it was.
        """
        if num_tokens == self.num_tokens:
            return self
        return self.select(torch.arange(num_tokens, device=self.token.device))

    def select(self, tokens: Tensor) -> Routing:
        """The routing of some tokens, renumbered, as decided among all of them; losses and what was dropped stay.

        Args:
            tokens: (t,) distinct tokens; ``tokens[i]`` becomes token ``i``.
        """
        place = torch.full((self.num_tokens,), -1, device=self.token.device)
        place[tokens] = torch.arange(len(tokens), device=self.token.device)
        token = place[self.token]
        kept = (token >= 0).nonzero().view(-1)
        # by expert, as they are, and then by their new number
        kept = kept[(self.expert[kept] * len(tokens) + token[kept]).argsort()]
        return self._of_pairs(kept, token[kept], self.scores[tokens])

    def between(self, start: int, end: int) -> Routing:
        """:meth:`select` of the tokens ``start:end``, at the cost of what they hold, once the pairs are sorted."""
        pairs, first = self._by_token
        kept = pairs[first[start] : first[end]].sort().values
        return self._of_pairs(kept, self.token[kept] - start, self.scores[start:end])

    @cached_property
    def _by_token(self) -> tuple[Tensor, Tensor]:
        """(P,) the pairs token by token, and (T + 1,) where each token's begin."""
        token, pairs = self.token.sort()
        return pairs, torch.searchsorted(token, torch.arange(self.num_tokens + 1, device=token.device))

    def _of_pairs(self, kept: Tensor, token: Tensor, scores: Tensor) -> Routing:
        """Some pairs, by expert and then by their new ``token``, among the tokens that have ``scores``."""
        return Routing(
            token=token,
            offsets=torch.searchsorted(kept, self.offsets.long()).to(torch.int32),
            weight=self.weight[kept],
            scores=scores,
            num_tokens=len(scores),
            losses=self.losses,
            dropped=self.dropped,
        )

    def padded(self, num_tokens: int) -> Routing:
        """The same pairs among more tokens, the last of which have no expert and scores of 0."""
        scores = self.scores.new_zeros(num_tokens, self.num_experts)
        scores[: self.num_tokens] = self.scores
        return replace(self, scores=scores, num_tokens=num_tokens)

    def of_experts(self, experts: Sequence[int]) -> Routing:
        """The pairs of some experts, renumbered in that order; the losses stay. One host sync.

        Args:
            experts: distinct experts; ``experts[i]`` becomes expert ``i``.
        """
        ends = self.offsets.tolist()
        slices = [slice(ends[e - 1] if e > 0 else 0, ends[e]) for e in experts]
        load = [part.stop - part.start for part in slices]
        return Routing(
            token=torch.cat([self.token[part] for part in slices]),
            offsets=torch.tensor(load, device=self.offsets.device).cumsum(0).to(torch.int32),
            weight=torch.cat([self.weight[part] for part in slices]),
            scores=self.scores[:, list(experts)],
            num_tokens=self.num_tokens,
            losses=self.losses,
        )

    def to_dense(self) -> Tensor:
        """(T, E) weights; 0 where the token does not go to the expert."""
        flat = self.token * self.num_experts + self.expert
        dense = self.weight.new_zeros(self.num_tokens * self.num_experts).index_add(0, flat, self.weight)
        return dense.view(self.num_tokens, self.num_experts)


def aux_loss(routings: Routing | Iterable[Routing]) -> Tensor:
    """Sum of the auxiliary losses of one or several layers, to be added to the task loss.

    Args:
        routings: what ``return_routing=True`` or :func:`gmoe.record` gave.

    Returns:
        A scalar; a plain 0 on the CPU where ``routings`` is empty (a model without MoE layers).

    Example:
        >>> loss = F.cross_entropy(logits, y) + gmoe.aux_loss(routings)
    """
    if isinstance(routings, Routing):
        return routings.aux_loss
    losses = [routing.aux_loss for routing in routings]
    return torch.stack(losses).sum() if losses else torch.zeros(())
