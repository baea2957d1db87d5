"""Groups: which tokens compete with each other; and from scores to (token, expert) pairs.

Shapes: T tokens, E experts, K experts per token, B groups, S slots in each of some groups, C
capacity, P pairs. Pairs come as ``(token (P,) int64, offsets (E,) int32)``, sorted by expert and
then by token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gmoe.routing import owner


class GroupBatch(NamedTuple):
    """Groups that are padded to one size: b groups of s slots.

    Args:
        group: (b,) the groups.
        shape: b and s.
        token: (b * s,) the token in each slot; ``None`` where all tokens lie group by group.
        mask: (b, s) True for slots that hold a token, the first ones of a group; ``None`` for all.
    """

    group: Tensor
    shape: tuple[int, int]
    token: Tensor | None
    mask: Tensor | None

    def take(self, value_T: Tensor, padding: float | None = None) -> Tensor:
        """(b, s, ...) what the tokens have; padding repeats a token, or has the given value."""
        taken = value_T if self.token is None else value_T.index_select(0, self.token)
        taken = taken.unflatten(0, self.shape)
        return (
            taken
            if self.mask is None or padding is None
            else taken.masked_fill(~self.mask[..., None], padding)
        )

    def add(self, total_T: Tensor, value_BS: Tensor) -> Tensor:
        """(T, ...) ``total`` plus what the slots have, which is zero for padding."""
        value = value_BS.flatten(0, 1)
        return total_T + value if self.token is None else total_T.index_add(0, self.token, value)


@dataclass(frozen=True)
class Groups:
    """The split of ``num_tokens`` tokens into ``num_groups`` non-empty groups, processed as padded
    batches.

    Args:
        num_tokens: T.
        num_groups: B; 0 only where there are no tokens.
        size: S, the tokens of each group, where all groups are equal.
        index: (T,) group of each token, in 0..B-1; ``None`` where equal groups lie one behind the
            other.
        order: (T,) tokens listed group by group, in token order inside a group; ``None`` where they
            lie so already.
        counts: (B,) tokens of each group, on the CPU; ``None`` where groups are equal.
    """

    num_tokens: int
    num_groups: int
    size: int = 0
    index: Tensor | None = None
    order: Tensor | None = None
    counts: Tensor | None = None

    @classmethod
    def of(cls, group: Tensor | int, num_tokens: int) -> Groups:
        """Read what ``route`` is given: (T,) group ids, unsorted and with gaps allowed; or the size
        of equal groups.
        """
        if (
            not isinstance(group, Tensor) or group.dim() == 0 or not num_tokens
        ):  # jit.trace makes tensors of sizes
            size = int(group) if num_tokens else 0
            return cls(num_tokens, num_tokens // max(size, 1), size)
        if torch._C._get_tracing_state() is not None:
            raise RuntimeError(
                "batch: torch.jit.trace would freeze the sizes of the groups; use torch.compile"
            )
        _, index, counts = torch.unique(group, return_inverse=True, return_counts=True)
        counts, in_order = counts.cpu(), bool((index[1:] >= index[:-1]).all())
        order = None if in_order else index.argsort(stable=True)
        if (counts == counts[0]).all():
            return cls(num_tokens, len(counts), int(counts[0]), None if in_order else index, order)
        return cls(num_tokens, len(counts), 0, index, order, counts)

    def of_tokens(self, token_P: Tensor) -> Tensor:
        """(P,) the group of each of the given tokens."""
        return (
            token_P // max(self.size, 1)
            if self.index is None
            else self.index.index_select(0, token_P)
        )

    def capacity(self, share: float) -> int | Tensor:
        """``clamp(ceil(share * T_group), 1, T_group)``: an int for equal groups, (B,) on the CPU
        for ragged ones.
        """
        slack = 1e-9  # 1.1 * 10 is 11.000000000000002 in floating point, and its ceil is not meant to be 12
        if self.counts is None:
            return min(max(math.ceil(share * self.size - slack), 1), self.size)
        return (
            (self.counts.double() * share - slack).ceil().long().clamp(min=1).minimum(self.counts)
        )

    def batches(self, device: torch.device) -> list[GroupBatch]:
        """Batches of padded groups that hold each token once.

        Equal groups make one batch without a mask. Ragged groups are bucketed by size, so that a
        padded group is at most twice as long as the group itself; padding slots repeat the group's
        first token.
        """
        if self.counts is None:
            group = torch.arange(self.num_groups, device=device)
            return [GroupBatch(group, (self.num_groups, self.size), self.order, None)]
        first_B, bucket_B = self.counts.cumsum(0) - self.counts, self.counts.double().log2().ceil()
        batches = []
        for bucket in bucket_B.unique():
            group = (bucket_B == bucket).nonzero().view(-1)
            step = torch.arange(int(self.counts[group].max()))
            mask = step < self.counts[group, None]
            token = (first_B[group, None] + torch.where(mask, step, 0)).view(-1).to(device)
            token = token if self.order is None else self.order[token]
            batches.append(
                GroupBatch(group.to(device), (len(group), len(step)), token, mask.to(device))
            )
        return batches

    def logsumexp(self, logits_TE: Tensor) -> Tensor:
        """(T, E) for each token, the log-sum-exp over all tokens of its group."""
        lse_BE = logits_TE.new_zeros(self.num_groups, logits_TE.size(1))
        for part in self.batches(logits_TE.device):
            lse_BE = lse_BE.index_copy(
                0, part.group, part.take(logits_TE, padding=-torch.inf).logsumexp(dim=1)
            )
        return lse_BE.index_select(
            0, self.of_tokens(torch.arange(self.num_tokens, device=logits_TE.device))
        )

    def top_tokens(self, scores_TE: Tensor, capacity: int | Tensor) -> Tensor:
        """(E, T) True for the ``capacity`` best tokens of each group for each expert.

        Ties go to the lowest token index; NaN counts as infinity. Every expert gets the same number
        of tokens.

        Args:
            scores_TE: the scores.
            capacity: C, for all groups or (B,).
        """
        scores_TE = torch.where(scores_TE.isnan(), torch.inf, scores_TE)
        chosen_TE = torch.zeros_like(scores_TE, dtype=torch.uint8)
        for part in self.batches(scores_TE.device):
            scores_BES = part.take(scores_TE, padding=-torch.inf).transpose(1, 2).contiguous()
            take: int | Tensor
            if isinstance(capacity, int):  # topk takes a tenth of the time of a stable sort
                take, last_BE1 = capacity, scores_BES.topk(capacity, dim=2).values[..., -1:]
            else:
                take = capacity.to(part.group.device)[part.group, None, None]
                best_BEC = scores_BES.topk(int(take.max()), dim=2).values
                last_BE1 = best_BEC.gather(2, (take - 1).expand(-1, scores_BES.size(1), -1))
            above_BES, tie_BES = scores_BES > last_BE1, scores_BES == last_BE1
            missing_BE1 = take - above_BES.sum(dim=2, keepdim=True)
            chosen_BES = above_BES | (tie_BES & (tie_BES.cumsum(dim=2) <= missing_BE1))
            chosen_TE = part.add(chosen_TE, chosen_BES.transpose(1, 2).byte())
        return chosen_TE.T.bool()

    def best_pairs(
        self, scores_TE: Tensor, log_gate_TE: Tensor, share: float, along_tokens: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs of each expert's best share of a group's tokens, and (P,) the logarithms of
        their gates.

        Gates that run along tokens are divided by their mean over the pairs of the group, which has
        no gradient.
        """
        capacity = self.capacity(share)
        chosen_ET = self.top_tokens(scores_TE.detach(), capacity)
        num_pairs = (
            len(chosen_ET) * self.num_groups * capacity if isinstance(capacity, int) else None
        )
        token_P, offsets_E = pairs_of_mask(chosen_ET, num_pairs)
        log_gate_P = gather_pairs(log_gate_TE, token_P, offsets_E)
        if along_tokens:
            group_P, mean_B = self.of_tokens(token_P), log_gate_P.detach().new_ones(self.num_groups)
            mean_B = mean_B.scatter_reduce(
                0, group_P, log_gate_P.detach().exp(), "mean", include_self=False
            )
            mean_B = mean_B.clamp(min=torch.finfo(mean_B.dtype).tiny)
            log_gate_P = log_gate_P - mean_B.log().index_select(0, group_P)
        return token_P, offsets_E, log_gate_P


def drop_over_capacity(
    expert_TK: Tensor, probs_TE: Tensor, groups: Groups, share: float
) -> tuple[Tensor, Tensor]:
    """The pairs that are left where an expert takes at most that share of a group's tokens.

    V-MoE's batch-prioritized routing: all first choices before all second ones, and among those the
    tokens with the highest probability of their first choice first; ties go to the lowest token
    index.
    """
    place_T = (
        probs_TE.gather(1, expert_TK[:, :1])[:, 0].argsort(descending=True, stable=True).argsort()
    )
    # whole numbers, which float64 holds
    rank_TK = -(
        place_T[:, None] + len(place_T) * torch.arange(expert_TK.size(1), device=place_T.device)
    ).double()
    rank_TE = torch.full_like(probs_TE, -torch.inf, dtype=torch.float64).scatter(
        1, expert_TK, rank_TK
    )
    return pairs_of_mask(groups.top_tokens(rank_TE, groups.capacity(share)) & rank_TE.T.isfinite())


def pairs_of_mask(mask_ET: Tensor, num_pairs: int | None = None) -> tuple[Tensor, Tensor]:
    """The pairs at which ``mask`` is true; no host sync where their number is known."""
    pair_P2 = (
        mask_ET.nonzero() if num_pairs is None else torch.nonzero_static(mask_ET, size=num_pairs)
    )
    return pair_P2[:, 1].contiguous(), mask_ET.sum(dim=1).cumsum(0).to(torch.int32)


def gather_pairs(value_TE: Tensor, token_P: Tensor, offsets_E: Tensor) -> Tensor:
    """(P,) the entries of ``value`` at the pairs. One flat ``index_select``, whose backward is an
    ``index_add``.
    """
    return value_TE.reshape(-1).index_select(
        0, token_P * value_TE.size(1) + owner(offsets_E, token_P)
    )
