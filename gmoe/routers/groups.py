"""Groups: which tokens compete with each other; and from scores to (token, expert) pairs.

Shapes: T tokens, E experts, K experts per token, B groups, S slots in each of some groups, C capacity, P pairs.
Pairs come as ``(token (P,) int64, offsets (E,) int32)``, sorted by expert and then by token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class GroupBatch(NamedTuple):
    """Groups that are padded to one size: b groups of s slots.

    Args:
        group: (b,) the groups; ``None`` for all of them.
        shape: b and s.
        token: (b * s,) the token in each slot; ``None`` where all tokens lie group by group.
        mask: (b, s) which slots hold a token, the first ones of a group; ``None`` for all.
    """

    group: Tensor | None
    shape: tuple[int, int]
    token: Tensor | None
    mask: Tensor | None

    def take(self, value_T: Tensor, padding: float | None = None) -> Tensor:
        """(b, s, ...) what the tokens have; padding repeats a token, or has the given value."""
        taken = value_T if self.token is None else value_T.index_select(0, self.token)
        taken = taken.unflatten(0, self.shape)
        return taken if self.mask is None or padding is None else taken.masked_fill(~self.mask[..., None], padding)

    def add(self, total_T: Tensor, value_BS: Tensor) -> Tensor:
        """(T, ...) ``total`` plus what the slots have, which is zero for padding."""
        value = value_BS.flatten(0, 1)
        return total_T + value if self.token is None else total_T.index_add(0, self.token, value)


@dataclass(frozen=True)
class Groups:
    """The split of ``num_tokens`` tokens into ``num_groups`` non-empty groups, processed as padded batches.

    Args:
        num_tokens: T.
        num_groups: B; 0 only where there are no tokens.
        size: S, the tokens of each group, where all groups are equal.
        index: (T,) group of each token, in 0..B-1; ``None`` where equal groups lie one behind the other.
        order: (T,) tokens listed group by group, in token order inside a group; ``None`` where they lie so already.
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
        """Read what ``route`` is given: (T,) group ids, unsorted and with gaps allowed; or the size of equal groups."""
        if not isinstance(group, Tensor) or group.dim() == 0 or num_tokens == 0:  # jit.trace makes tensors of sizes
            size = int(group) if num_tokens else 0
            return cls(num_tokens, num_tokens // max(size, 1), size)
        if torch._C._get_tracing_state() is not None:
            raise RuntimeError("batch: torch.jit.trace would freeze the sizes of the groups; use torch.compile")
        _, index, counts = torch.unique(group, return_inverse=True, return_counts=True)
        counts, in_order = counts.cpu(), bool((index[1:] >= index[:-1]).all())
        order = None if in_order else index.argsort(stable=True)
        if bool((counts == counts[0]).all()):
            return cls(num_tokens, len(counts), int(counts[0]), None if in_order else index, order)
        return cls(num_tokens, len(counts), 0, index, order, counts)

    def of_tokens(self, token_P: Tensor) -> Tensor:
        """(P,) the group of each of the given tokens."""
        return token_P // max(self.size, 1) if self.index is None else self.index.index_select(0, token_P)

    def capacity(self, k: int, num_experts: int, capacity_factor: float) -> int | Tensor:
        """``clamp(ceil(capacity_factor * k * T_group / E), 1, T_group)``: an int for equal groups, (B,) for ragged."""
        share = capacity_factor * k / num_experts
        slack = 1e-9  # 1.1 * 10 is 11.000000000000002 in floating point, and its ceil is not meant to be 12
        if self.index is None or self.counts is None:
            return min(max(math.ceil(share * self.size - slack), 1), self.size)
        capacity_B = (self.counts.double() * share - slack).ceil().long().clamp(min=1).minimum(self.counts)
        return capacity_B.to(self.index.device)

    def batches(self) -> list[GroupBatch]:
        """Batches of padded groups that hold each token once.

        Equal groups make one batch without a mask. Ragged groups are bucketed by size, so that a padded group is at
        most twice as long as the group itself; padding slots repeat the group's first token.
        """
        if self.counts is None:
            return [GroupBatch(None, (self.num_groups, self.size), self.order, None)]
        assert self.index is not None
        device, first_B = self.index.device, self.counts.cumsum(0) - self.counts
        bucket_B = self.counts.double().log2().ceil()
        batches = []
        for bucket in bucket_B.unique():
            group = (bucket_B == bucket).nonzero().view(-1)
            step = torch.arange(int(self.counts[group].max()))
            mask = step < self.counts[group, None]
            token = (first_B[group, None] + torch.where(mask, step, 0)).view(-1).to(device)
            token = token if self.order is None else self.order[token]
            batches.append(GroupBatch(group.to(device), (len(group), len(step)), token, mask.to(device)))
        return batches

    def logsumexp(self, logits_TE: Tensor) -> Tensor:
        """(T, E) for each token, the log-sum-exp over all tokens of its group."""
        lse_BE = logits_TE.new_zeros(self.num_groups, logits_TE.size(1))
        for part in self.batches():
            part_BE = part.take(logits_TE, padding=-torch.inf).logsumexp(dim=1)
            lse_BE = part_BE if part.group is None else lse_BE.index_copy(0, part.group, part_BE)
        if self.index is None:
            return lse_BE.repeat_interleave(self.size, dim=0, output_size=self.num_tokens)
        return lse_BE.index_select(0, self.index)

    def top_tokens(self, scores_TE: Tensor, capacity: int | Tensor) -> Tensor:
        """(E, sum of C) the ``capacity`` best tokens of each group for each expert, ascending in token index.

        Ties go to the lowest token index. Every expert gets the same number of tokens.

        Args:
            scores_TE: the scores.
            capacity: C, for all groups or (B,).
        """
        token_T = torch.arange(self.num_tokens, device=scores_TE.device)
        chosen = []
        for part in self.batches():
            scores_BSE = part.take(scores_TE, padding=-torch.inf)
            if isinstance(capacity, int) and scores_TE.device.type == "cpu" and self.num_tokens:
                chosen_ET = _largest(scores_BSE, capacity).transpose(0, 1).flatten(1)
                if part.token is not None:
                    chosen_ET = torch.zeros_like(chosen_ET).index_copy(1, part.token, chosen_ET)
                return chosen_ET.nonzero()[:, 1].view(len(chosen_ET), -1)
            slot_BSE = scores_BSE.argsort(dim=1, descending=True, stable=True)
            if isinstance(capacity, int):
                slot_BSE = slot_BSE[:, :capacity]
            token_EBS = part.take(token_T)[..., None].expand_as(scores_BSE).gather(1, slot_BSE).permute(2, 0, 1)
            if isinstance(capacity, Tensor):
                place_S = torch.arange(part.shape[1], device=capacity.device)
                token_EBS = token_EBS[:, place_S < capacity[part.group, None]]
            chosen.append(token_EBS.flatten(1))
        return torch.cat(chosen, dim=1).sort(dim=1).values

    def best_pairs(
        self, scores_TE: Tensor, log_gate_TE: Tensor, capacity: int | Tensor, along_tokens: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs of each expert's :meth:`top_tokens`, and (P,) the logarithms of their gates.

        Gates that run along tokens are divided by their mean over the pairs of the group, which has no gradient.
        """
        token_P, offsets_E = pairs_of_experts(self.top_tokens(scores_TE.detach(), capacity))
        log_gate_P = gather_pairs(log_gate_TE, token_P, offsets_E)
        if not along_tokens:
            return token_P, offsets_E, log_gate_P
        gate_P, group_P = log_gate_P.detach().exp(), self.of_tokens(token_P)
        total_B = gate_P.new_zeros(self.num_groups).index_add(0, group_P, gate_P)
        pairs_B = gate_P.new_zeros(self.num_groups).index_add(0, group_P, torch.ones_like(gate_P))
        mean_B = (total_B / pairs_B).clamp(min=torch.finfo(gate_P.dtype).tiny)
        return token_P, offsets_E, log_gate_P - mean_B.log().index_select(0, group_P)


def _largest(scores_BSE: Tensor, capacity: int) -> Tensor:
    """(B, E, S) whether a slot has one of the C largest scores of its group and expert; ties go to the lowest slot.

    By the C-th largest score, without sorting: a tenth of the time, but on a GPU one host sync. NaN counts as infinity.
    """
    scores_BES = scores_BSE.transpose(1, 2).contiguous()
    scores_BES = torch.where(scores_BES.isnan(), torch.inf, scores_BES)
    cut_BE1 = scores_BES.kthvalue(scores_BES.size(2) - capacity + 1, dim=2, keepdim=True).values
    above_BES, tie_BES = scores_BES > cut_BE1, scores_BES == cut_BE1
    missing_BE1 = capacity - above_BES.sum(dim=2, keepdim=True)
    return above_BES | (tie_BES & (tie_BES.cumsum(dim=2) <= missing_BE1))


def drop_over_capacity(
    expert_TK: Tensor, probs_TE: Tensor, groups: Groups, capacity: int | Tensor
) -> tuple[Tensor, Tensor]:
    """The pairs that are left where an expert takes at most ``capacity`` tokens of a group.

    V-MoE's batch-prioritized routing: all first choices before all second ones, and among those the tokens with the
    highest probability of their first choice first; ties go to the lowest token index.
    """
    (num_tokens, k), num_experts = expert_TK.shape, probs_TE.size(1)
    by_priority_T = probs_TE.gather(1, expert_TK[:, :1])[:, 0].argsort(descending=True, stable=True)
    token_P, expert_P = by_priority_T.repeat(k), expert_TK[by_priority_T].T.reshape(-1)
    group_P = groups.of_tokens(token_P)
    line_P, queue_P = (group_P * num_experts + expert_P).sort(stable=True)  # one line a group and expert
    place_P = torch.arange(num_tokens * k, device=token_P.device) - torch.searchsorted(line_P, line_P)
    if isinstance(capacity, Tensor):
        capacity = capacity[group_P[queue_P]]
    kept_P = queue_P[place_P < capacity]
    mask_ET = torch.zeros(num_experts, num_tokens, dtype=torch.bool, device=token_P.device)
    mask_ET[expert_P[kept_P], token_P[kept_P]] = True
    return pairs_of_mask(mask_ET.T)


def pairs_of_experts(token_EC: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs where every expert chose the same number of tokens, in ascending order."""
    num_experts, per_expert = token_EC.shape
    ends = torch.arange(1, num_experts + 1, device=token_EC.device, dtype=torch.int32) * per_expert
    return token_EC.reshape(-1), ends


def pairs_of_mask(mask_TE: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs at which ``mask`` is true."""
    token_P = mask_TE.T.nonzero()[:, 1]
    return token_P, mask_TE.sum(dim=0).cumsum(0).to(torch.int32)


def gather_pairs(value_TE: Tensor, token_P: Tensor, offsets_E: Tensor) -> Tensor:
    """(P,) the entries of ``value`` at the pairs. One flat ``index_select``, whose backward is an ``index_add``."""
    num_experts = value_TE.size(1)
    load_E = offsets_E.diff(prepend=offsets_E.new_zeros(1)).long()
    expert_P = torch.arange(num_experts, device=token_P.device).repeat_interleave(load_E, output_size=token_P.numel())
    return value_TE.reshape(-1).index_select(0, token_P * num_experts + expert_P)
