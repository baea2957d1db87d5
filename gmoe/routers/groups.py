"""Groups: which tokens compete with each other; and from scores to (token, expert) pairs.

Shapes: T tokens, E experts, K experts per token, B groups, S tokens in each of B equal groups, C capacity, P pairs.
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
        mask: (b, s) which slots hold a token; ``None`` for all.
    """

    group: Tensor | None
    shape: tuple[int, int]
    token: Tensor | None
    mask: Tensor | None

    def take(self, value_T: Tensor) -> Tensor:
        """(b, s, ...) what the tokens have; padding repeats a token."""
        taken = value_T if self.token is None else value_T.index_select(0, self.token)
        return taken.unflatten(0, self.shape)

    def take_shares(self, share_TN: Tensor) -> Tensor:
        """(b, s, N) the same, but zero for padding."""
        shares_BSN = self.take(share_TN)
        return shares_BSN if self.mask is None else shares_BSN * self.mask[..., None]

    def add(self, total_T: Tensor, value_BS: Tensor) -> Tensor:
        """(T, ...) ``total`` plus what the slots have, which is zero for padding."""
        value = value_BS.flatten(0, 1)
        return total_T + value if self.token is None else total_T.index_add(0, self.token, value)


@dataclass(frozen=True)
class Groups:
    """The split of ``num_tokens`` tokens into ``num_groups`` non-empty groups.

    Groups of equal size are kept as ``size`` and processed as one dense ``(B, S, E)`` batch; ragged groups are kept as
    ``counts`` and processed by segments.

    Args:
        num_tokens: T.
        num_groups: B; 0 only where there are no tokens.
        size: S, the tokens of each group, where all groups are equal; else ``None``.
        index: (T,) group of each token, in 0..B-1; ``None`` where tokens lie group by group in equal groups.
        order: (T,) tokens listed group by group, in token order inside a group; ``None`` where they lie so already.
        counts: (B,) tokens of each group, for ragged groups; else ``None``.
    """

    num_tokens: int
    num_groups: int
    size: int | None = None
    index: Tensor | None = None
    order: Tensor | None = None
    counts: Tensor | None = None

    @classmethod
    def of(cls, group: Tensor | int, num_tokens: int) -> Groups:
        """What a router's ``route`` is given: (T,) group ids, or the number of tokens in each of equal groups."""
        if isinstance(group, Tensor) and group.dim() > 0:
            return cls.from_segments(group)
        size = int(group)  # torch.jit.trace makes tensors of sizes
        return cls.equal(num_tokens // max(size, 1), size)

    @classmethod
    def equal(cls, num_groups: int, size: int) -> Groups:
        """``num_groups`` groups of ``size`` tokens each, one behind the other."""
        num_tokens = num_groups * size
        return cls(num_tokens, num_groups if size else 0, size=size)

    @classmethod
    def from_segments(cls, segment: Tensor) -> Groups:
        """Groups from a segment-id vector (PyG's ``batch``), which may be unsorted and have gaps."""
        num_tokens = segment.numel()
        if num_tokens == 0:
            return cls.equal(0, 0)
        _, index, counts = torch.unique(segment, return_inverse=True, return_counts=True)
        in_order = bool((index[1:] >= index[:-1]).all())
        order = None if in_order else index.argsort(stable=True)
        size = int(counts[0])
        if bool((counts == size).all()):
            return cls(num_tokens, counts.numel(), size=size, index=None if in_order else index, order=order)
        return cls(num_tokens, counts.numel(), index=index, order=order, counts=counts)

    def of_tokens(self, token_P: Tensor) -> Tensor:
        """(P,) the group of each of the given tokens."""
        if self.index is not None:
            return self.index.index_select(0, token_P)
        assert self.size is not None
        return token_P // max(self.size, 1)

    def capacity(self, k: int, num_experts: int, capacity_factor: float) -> int | Tensor:
        """``clamp(ceil(capacity_factor * k * T_group / E), 1, T_group)``: an int for equal groups, (B,) for ragged."""
        share = capacity_factor * k / num_experts
        slack = 1e-9  # 1.1 * 10 is 11.000000000000002 in floating point, and its ceil is not meant to be 12
        if self.size is not None:
            return min(max(math.ceil(share * self.size - slack), 1), self.size)
        assert self.counts is not None
        capacity = (self.counts.cpu().double() * share - slack).ceil().long()  # not every device has float64
        return capacity.to(self.counts.device).clamp(min=1).minimum(self.counts)

    def logsumexp(self, logits_TE: Tensor) -> Tensor:
        """(T, E) for each token, the log-sum-exp over all tokens of its group."""
        if self.size is None:
            assert self.index is not None
            return segment_logsumexp(logits_TE, self.index, self.num_groups).index_select(0, self.index)
        lse_BE = self._dense(logits_TE).logsumexp(dim=1)
        if self.index is not None:
            return lse_BE.index_select(0, self.index)
        return lse_BE.repeat_interleave(self.size, dim=0, output_size=self.num_tokens)

    def log_mean_of_pairs(self, log_gate_P: Tensor, token_P: Tensor) -> Tensor:
        """(P,) for each pair, the logarithm of the mean gate over the pairs of its group; has no gradient."""
        gate_P = log_gate_P.detach().exp()
        group_P = self.of_tokens(token_P)
        total_B = gate_P.new_zeros(self.num_groups).index_add(0, group_P, gate_P)
        pairs_B = gate_P.new_zeros(self.num_groups).index_add(0, group_P, torch.ones_like(gate_P))
        mean_B = (total_B / pairs_B.clamp(min=1)).clamp(min=torch.finfo(gate_P.dtype).tiny)
        return mean_B.log().index_select(0, group_P)

    def top_tokens(self, scores_TE: Tensor, capacity: int | Tensor, tolerance: float = 0.0) -> Tensor:
        """(E, sum of C) the ``capacity`` best tokens of each group for each expert, ascending in token index.

        Ties go to the lowest token index. Every expert gets the same number of tokens.

        Args:
            scores_TE: the scores.
            capacity: C, for all groups or (B,).
            tolerance: runs of the ranking whose scores differ relatively by at most this are ties (default 0).
        """
        if self.size is not None:
            assert isinstance(capacity, int)
            scores_BSE = self._dense(scores_TE)
            if tolerance == 0 and scores_TE.device.type == "cpu" and self.num_groups:
                return self._tokens_of_slots(_largest(scores_BSE, capacity))
            best_BSE = scores_BSE.argsort(dim=1, descending=True, stable=True)
            if tolerance > 0:
                best_BSE = _order_ties(best_BSE, scores_BSE.gather(1, best_BSE), tolerance)
            return self._tokens_of_slots(best_BSE[:, :capacity].transpose(1, 2)).sort(dim=1).values
        assert self.index is not None
        assert self.counts is not None
        assert isinstance(capacity, Tensor)
        by_score_TE = scores_TE.argsort(dim=0, descending=True, stable=True)
        by_group_TE = self.index[by_score_TE].argsort(dim=0, stable=True)
        token_TE = by_score_TE.gather(0, by_group_TE)  # group by group, and inside a group the best first
        first_B = self.counts.cumsum(0) - self.counts
        group_T = torch.arange(self.num_groups, device=scores_TE.device).repeat_interleave(self.counts)
        if tolerance > 0:
            new_group_T = group_T.diff(prepend=group_T[:1]) > 0
            token_TE = _order_ties(token_TE[None], scores_TE.gather(0, token_TE)[None], tolerance, new_group_T)[0]
        rank_T = torch.arange(self.num_tokens, device=scores_TE.device) - first_B[group_T]
        return token_TE[rank_T < capacity[group_T]].T.sort(dim=1).values

    def _tokens_of_slots(self, slot_BEC: Tensor) -> Tensor:
        """(E, B * C) the tokens at slots of equal groups; those of a group ascend with its slots."""
        assert self.size is not None
        first_B = torch.arange(self.num_groups, device=slot_BEC.device) * self.size
        slot_EP = (slot_BEC + first_B[:, None, None]).transpose(0, 1).flatten(1)
        return slot_EP if self.order is None else self.order[slot_EP].sort(dim=1).values

    def _dense(self, value_TE: Tensor) -> Tensor:
        assert self.size is not None
        if self.order is not None:
            value_TE = value_TE.index_select(0, self.order)
        return value_TE.view(self.num_groups, self.size, value_TE.size(1))

    def batches(self, most_padding: int = 2) -> list[GroupBatch]:
        """Batches of padded groups that hold each token once.

        Equal groups make one batch without a mask. Ragged groups are bucketed by size, so that a padded group is at
        most ``most_padding`` times as long as the group itself; padding slots repeat the group's first token.
        """
        if self.size is not None:
            return [GroupBatch(None, (self.num_groups, self.size), self.order, None)]
        assert self.counts is not None
        order = self.order
        if order is None:
            order = torch.arange(self.num_tokens, device=self.counts.device)
        first_B = self.counts.cumsum(0) - self.counts
        bucket_B = (self.counts.cpu().double().log2() / math.log2(most_padding)).ceil().long().to(self.counts.device)
        batches = []
        for bucket in bucket_B.unique().tolist():
            chosen = (bucket_B == bucket).nonzero().view(-1)
            counts = self.counts[chosen]
            step = torch.arange(int(counts.max()), device=counts.device)
            mask = step < counts[:, None]
            slot = first_B[chosen][:, None] + torch.where(mask, step, 0)
            batches.append(GroupBatch(chosen, (len(chosen), len(step)), order[slot].view(-1), mask))
        return batches


def _largest(scores_BSE: Tensor, capacity: int) -> Tensor:
    """(B, E, C) the slots of the C largest scores of each group and expert, ascending; ties go to the lowest slot.

    By the C-th largest score, without sorting: a tenth of the time, but on a GPU one host sync. NaN counts as infinity.
    """
    scores_BES = scores_BSE.transpose(1, 2).contiguous()
    scores_BES = torch.where(scores_BES.isnan(), torch.inf, scores_BES)
    cut_BE1 = scores_BES.kthvalue(scores_BES.size(2) - capacity + 1, dim=2, keepdim=True).values
    above_BES, tie_BES = scores_BES > cut_BE1, scores_BES == cut_BE1
    missing_BE1 = capacity - above_BES.sum(dim=2, keepdim=True)
    chosen_BES = above_BES | (tie_BES & (tie_BES.cumsum(dim=2) <= missing_BE1))
    return chosen_BES.nonzero()[:, 2].view(*scores_BES.shape[:2], capacity)


def _order_ties(token_BSE: Tensor, score_BSE: Tensor, tolerance: float, cut_S: Tensor | None = None) -> Tensor:
    """Tokens that are sorted by score, best first, with runs of nearly equal scores sorted by token index.

    Args:
        token_BSE: the tokens.
        score_BSE: their scores.
        tolerance: relative difference up to which neighbors belong to one run, and a run as a whole is a tie.
        cut_S: where a run ends in any case, since another group begins.
    """
    before, after = score_BSE[:, :-1], score_BSE[:, 1:]
    cut_BSE = (before - after) > tolerance * before.abs()
    if cut_S is not None:
        cut_BSE = cut_BSE | cut_S[1:, None]
    run_BSE = torch.zeros_like(token_BSE)
    run_BSE[:, 1:] = cut_BSE.cumsum(dim=1)
    # a run is a tie only as a whole: where scores lie densely, neighbors are near each other but the ends are not
    worst_BSE = torch.full_like(score_BSE, torch.inf).scatter_reduce(1, run_BSE, score_BSE, "amin").gather(1, run_BSE)
    best_BSE = torch.full_like(score_BSE, -torch.inf).scatter_reduce(1, run_BSE, score_BSE, "amax").gather(1, run_BSE)
    tie_BSE = best_BSE - worst_BSE <= tolerance * best_BSE.abs()
    place_S = torch.arange(token_BSE.size(1), device=token_BSE.device)[:, None]
    within_BSE = torch.where(tie_BSE, token_BSE, place_S)
    key_BSE = run_BSE * (token_BSE.amax() + 1 + len(place_S) if token_BSE.numel() else 1) + within_BSE
    return token_BSE.gather(1, key_BSE.argsort(dim=1))


def segment_logsumexp(value_NE: Tensor, index_N: Tensor, num_segments: int) -> Tensor:
    """(S, E) log-sum-exp of the rows of each segment; minus infinity for an empty one."""
    index_NE = index_N[:, None].expand_as(value_NE)
    shape = (num_segments, value_NE.size(1))
    peak_SE = value_NE.detach().new_full(shape, -torch.inf).scatter_reduce(0, index_NE, value_NE.detach(), "amax")
    peak_SE = torch.where(peak_SE.isfinite(), peak_SE, 0.0)
    total_SE = value_NE.new_zeros(shape).index_add(0, index_N, (value_NE - peak_SE[index_N]).exp())
    used_SE = total_SE > 0  # the logarithm of 0 would have a gradient that is not a number
    return torch.where(used_SE, torch.where(used_SE, total_SE, 1.0).log() + peak_SE, -torch.inf)


def drop_over_capacity(
    expert_TK: Tensor, probs_TE: Tensor, groups: Groups, capacity: int | Tensor
) -> tuple[Tensor, Tensor]:
    """The pairs that are left where an expert takes at most ``capacity`` tokens of a group.

    V-MoE's batch-prioritized routing: all first choices before all second ones, and among those the tokens with the
    highest probability of their first choice first; ties go to the lowest token index.
    """
    num_tokens, k = expert_TK.shape
    num_experts = probs_TE.size(1)
    by_priority_T = probs_TE.gather(1, expert_TK[:, :1])[:, 0].argsort(descending=True, stable=True)
    token_P = by_priority_T.repeat(k)
    expert_P = expert_TK[by_priority_T].T.reshape(-1)
    group_P = groups.of_tokens(token_P)
    line_P, queue_P = (group_P * num_experts + expert_P).sort(stable=True)  # one line a group and expert
    place_P = torch.arange(num_tokens * k, device=token_P.device)
    place_P = place_P - torch.searchsorted(line_P, line_P)
    if isinstance(capacity, Tensor):
        capacity = capacity[group_P[queue_P]]
    kept_P = queue_P[place_P < capacity]
    chosen = (expert_P[kept_P] * num_tokens + token_P[kept_P]).sort().values
    experts_E = torch.arange(num_experts, device=token_P.device)
    offsets_E = torch.searchsorted(chosen // max(num_tokens, 1), experts_E, right=True)
    return chosen % max(num_tokens, 1), offsets_E.to(torch.int32)


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
