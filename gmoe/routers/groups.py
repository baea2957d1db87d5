"""Groups: which tokens compete with each other; and from scores to (token, expert) pairs.

Shapes: T tokens, E experts, K experts per token, B groups, S slots of the largest group, b groups
and s slots of a batch of groups of similar size, C capacity, P pairs. Pairs come as
``(token (P,) int64, offsets (E,) int32)``, sorted by expert and then by token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gmoe import portable
from gmoe._torch import is_tracing
from gmoe.blocks import expert_of_rows
from gmoe.portable import exported_as, refuse_in_export


class GroupBatch(NamedTuple):
    """Groups that are padded to one size: b groups of s slots.

    Args:
        group: (b,) the groups.
        shape: b and s.
        token: (b * s,) the token in each slot; ``None`` if all tokens are in order, group by group.
        mask: (b, s) True for slots that hold a token, the first ones of a group; ``None`` if all
            do.
    """

    group: Tensor
    shape: tuple[int, int]
    token: Tensor | None
    mask: Tensor | None

    def take(self, value_T: Tensor, padding: float | None = None) -> Tensor:
        """(b, s, ...) the values of the tokens in the slots.

        Args:
            value_T: (T, ...) a value for each token.
            padding: the value of empty slots; ``None`` leaves there what some token has.
        """
        value = value_T if self.token is None else value_T.index_select(0, self.token)
        value = value.unflatten(0, self.shape)
        if self.mask is None or padding is None:
            return value
        return value.masked_fill(~self.mask[..., None], padding)

    def add(self, total_T: Tensor, value_BS: Tensor) -> Tensor:
        """(T, ...) the total plus the values of the slots, which must be zero for padding."""
        value = value_BS.flatten(0, 1)
        if self.token is None:
            return total_T + value
        return total_T.index_add(0, self.token, value)


@dataclass(frozen=True)
class Groups:
    """The split of tokens into non-empty groups, processed as padded batches.

    Args:
        num_tokens: T.
        num_groups: B; 0 only if there are no tokens.
        size: S, the tokens of each group, if all groups are equal.
        index: (T,) group of each token, in 0..B-1; ``None`` if equal groups are contiguous.
        order: (T,) tokens listed group by group, in token order inside a group; ``None`` if they
            are in this order already.
        counts: (B,) tokens of each group, on the CPU; ``None`` if groups are equal.
    """

    num_tokens: int
    num_groups: int
    size: int = 0
    index: Tensor | None = None
    order: Tensor | None = None
    counts: Tensor | None = None

    @classmethod
    def of(cls, group: Tensor | int, num_tokens: int) -> Groups:
        """Read the groups that ``route`` is given.

        Args:
            group: (T,) group ids, unsorted and with gaps allowed; or the size of equal groups.
            num_tokens: T.
        """
        # torch.jit.trace makes a tensor without dimensions of the size.
        is_size = not isinstance(group, Tensor) or group.dim() == 0
        if not isinstance(group, int):
            refuse_in_export(
                "a batch vector" if isinstance(group, Tensor) else "groups of any size",
                "groups of a fixed size, x of shape (any number of groups, tokens, width): an "
                "expert that chooses takes a share of a group; or a router whose tokens choose",
            )
        if is_size or not num_tokens:
            size = int(group) if num_tokens else 0
            return cls(num_tokens, num_tokens // max(size, 1), size)
        if is_tracing():
            raise RuntimeError(
                "batch: torch.jit.trace would freeze the sizes of the groups; use torch.compile"
            )
        _, index, counts = torch.unique(group, return_inverse=True, return_counts=True)
        counts = counts.cpu()
        is_in_order = bool((index[1:] >= index[:-1]).all())
        order = None if is_in_order else index.argsort(stable=True)
        if (counts == counts[0]).all():
            size = int(counts[0])
            return cls(num_tokens, len(counts), size, None if is_in_order else index, order)
        return cls(num_tokens, len(counts), 0, index, order, counts)

    def of_tokens(self, token_P: Tensor) -> Tensor:
        """(P,) the group of each of the given tokens."""
        if self.index is None:
            return token_P // max(self.size, 1)
        return self.index.index_select(0, token_P)

    def capacity(self, share: float) -> int | Tensor:
        """``clamp(ceil(share * T_group), 1, T_group)``: how many tokens of a group an expert takes.

        Returns:
            A number for equal groups; (B,) on the CPU for groups of several sizes.
        """
        # 1.1 * 10 is 11.000000000000002 in floating point, and its ceil should not be 12.
        slack = 1e-9
        if self.counts is None:
            return min(max(math.ceil(share * self.size - slack), 1), self.size)
        capacity_B = (self.counts.double() * share - slack).ceil().long()
        return capacity_B.clamp(min=1).minimum(self.counts)

    def batches(self, device: torch.device) -> list[GroupBatch]:
        """Batches of padded groups that hold each token once.

        Equal groups make one batch without a mask. Groups of several sizes are bucketed by powers
        of two, so that padding at most doubles a group; padding slots repeat the group's first
        token.
        """
        if self.counts is None:
            group = torch.arange(self.num_groups, device=device)
            return [GroupBatch(group, (self.num_groups, self.size), self.order, None)]
        first_B = self.counts.cumsum(0) - self.counts
        bucket_B = self.counts.double().log2().ceil()
        batches = []
        for bucket in bucket_B.unique():
            group = (bucket_B == bucket).nonzero().view(-1)
            slot = torch.arange(int(self.counts[group].max()))
            mask = slot < self.counts[group, None]
            place = first_B[group, None] + torch.where(mask, slot, 0)  # in the list of tokens
            token = place.view(-1).to(device)
            if self.order is not None:
                token = self.order[token]
            shape = (group.size(0), slot.size(0))
            batches.append(GroupBatch(group.to(device), shape, token, mask.to(device)))
        return batches

    def logsumexp(self, logits_TE: Tensor) -> Tensor:
        """(T, E) for each token, the log-sum-exp over all tokens of its group."""
        lse_BE = logits_TE.new_zeros(self.num_groups, logits_TE.size(1))
        for batch in self.batches(logits_TE.device):
            part_BE = batch.take(logits_TE, padding=-torch.inf).logsumexp(dim=1)
            lse_BE = lse_BE.index_copy(0, batch.group, part_BE)
        tokens = torch.arange(self.num_tokens, device=logits_TE.device)
        return lse_BE.index_select(0, self.of_tokens(tokens))

    def top_tokens(self, scores_TE: Tensor, capacity: int | Tensor) -> Tensor:
        """(E, T) True for the ``capacity`` best tokens of each group for each expert.

        Ties go to the lowest token index; NaN counts as infinity. Every expert gets the same number
        of tokens.

        Args:
            scores_TE: the scores.
            capacity: C, for all groups or (B,).
        """
        scores_TE = torch.where(scores_TE.isnan(), torch.inf, scores_TE)
        # Marks that are added: ONNX's runtime cannot add bytes.
        chosen_TE = torch.zeros_like(scores_TE, dtype=torch.int32)
        for batch in self.batches(scores_TE.device):
            scores_BES = batch.take(scores_TE, padding=-torch.inf).transpose(1, 2).contiguous()

            # 1. The lowest score that is still taken. topk is ten times as fast as a stable sort.
            count: int | Tensor
            if isinstance(capacity, int):
                count = capacity
                last_BE1 = scores_BES.topk(capacity, dim=2).values[..., -1:]
            else:
                count = capacity.to(batch.group.device)[batch.group, None, None]
                best_BEC = scores_BES.topk(int(count.max()), dim=2).values
                last_BE1 = best_BEC.gather(2, (count - 1).expand(-1, scores_BES.size(1), -1))

            # 2. All tokens above it, and the first ones that tie with it, until the expert is full.
            above_BES = scores_BES > last_BE1
            tie_BES = scores_BES == last_BE1
            missing_BE1 = count - above_BES.sum(dim=2, keepdim=True)
            chosen_BES = above_BES | (tie_BES & (tie_BES.cumsum(dim=2) <= missing_BE1))
            chosen_TE = batch.add(chosen_TE, chosen_BES.transpose(1, 2).int())
        return chosen_TE.T.bool()

    def best_pairs(self, scores_TE: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """Choose for each expert its best tokens of each group.

        Args:
            scores_TE: the scores by which tokens are ranked.
            share: of a group's tokens, how many an expert takes.
        """
        capacity = self.capacity(share)
        chosen_ET = self.top_tokens(scores_TE.detach(), capacity)
        num_pairs = None
        if isinstance(capacity, int):
            num_pairs = chosen_ET.size(0) * self.num_groups * capacity
        return pairs_of_mask(chosen_ET, num_pairs)

    def means(self, value_P: Tensor, token_P: Tensor) -> Tensor:
        """(P,) for each pair, the mean over all pairs of its token's group."""
        group_P = self.of_tokens(token_P)
        # Not by scatter_reduce: ONNX has no mean by places.
        zero_B = value_P.new_zeros(self.num_groups)
        count_B = zero_B.index_add(0, group_P, torch.ones_like(value_P))
        mean_B = zero_B.index_add(0, group_P, value_P) / count_B
        return mean_B.index_select(0, group_P)


def drop_over_capacity(
    expert_TK: Tensor, probs_TE: Tensor, groups: Groups, share: float
) -> tuple[Tensor, Tensor]:
    """The pairs that remain if an expert takes at most that share of a group's tokens.

    This is V-MoE's batch-prioritized routing: all first choices before all second ones, and among
    those the tokens with the highest probability of their first choice first; ties go to the lowest
    token index.
    """
    # A token's place in that order, 0 for the first.
    first_prob_T = probs_TE.gather(1, expert_TK[:, :1])[:, 0]
    place_T = first_prob_T.argsort(descending=True, stable=True).argsort()
    # A pair's rank, negative since higher scores win: whole numbers, which float64 holds exactly.
    choice_K = torch.arange(expert_TK.size(1), device=place_T.device)
    rank_TK = -(place_T[:, None] + place_T.size(0) * choice_K).double()
    rank_TE = torch.full_like(probs_TE, -torch.inf, dtype=torch.float64)
    rank_TE = rank_TE.scatter(1, expert_TK, rank_TK)
    # An expert that has places left would take tokens that did not choose it: leave those out.
    best_ET = groups.top_tokens(rank_TE, groups.capacity(share))
    return pairs_of_mask(best_ET & rank_TE.T.isfinite())


def pairs_of_mask(mask_ET: Tensor, num_pairs: int | None = None) -> tuple[Tensor, Tensor]:
    """The pairs at which ``mask`` is true.

    Args:
        mask_ET: the tokens that each expert takes.
        num_pairs: P, where each expert takes as many: no host sync.
    """
    if num_pairs is None:  # a capacity dropped some: one host sync for the size of the result
        token_P = mask_ET.nonzero()[:, 1].contiguous()
    else:
        token_P = _true_columns(mask_ET, num_pairs)
    return token_P, mask_ET.sum(dim=1).cumsum(0).to(torch.int32)


@exported_as(portable.true_columns)
def _true_columns(mask_ET: Tensor, num_pairs: int) -> Tensor:
    """(P,) the columns of the true cells, row by row."""
    return torch.nonzero_static(mask_ET, size=num_pairs)[:, 1].contiguous()


def gather_pairs(value_TE: Tensor, token_P: Tensor, offsets_E: Tensor) -> Tensor:
    """(P,) the values of the pairs.

    One flat ``index_select``, whose backward is an ``index_add``.
    """
    place_P = token_P * value_TE.size(1) + expert_of_rows(offsets_E, token_P.size(0))
    return value_TE.reshape(-1).index_select(0, place_P)
