"""From scores to (token, expert) pairs. Shapes: T tokens, E experts, K experts a token, P pairs.

Pairs come as ``(token (P,) int64, offsets (E,) int32)``, sorted by expert and then by token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gmoe.routing.pools import Pools


def top_experts(scores_TE: Tensor, k: int) -> Tensor:
    """(T, K) the best experts of each token, best first; ties go to the lowest expert index."""
    if k == 1:
        return scores_TE.max(dim=-1, keepdim=True).indices  # the first of equal maxima, unlike topk
    return scores_TE.argsort(dim=-1, descending=True, stable=True)[:, :k]


def pairs_of_choices(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The pairs of all choices. No host sync: P = T * K."""
    expert_P, slot_P = expert_TK.reshape(-1).sort(stable=True)
    return slot_P // expert_TK.size(1), _ends(expert_P, num_experts)


def drop_over_capacity(
    expert_TK: Tensor, probs_TE: Tensor, pools: Pools, capacity: int | Tensor
) -> tuple[Tensor, Tensor]:
    """The pairs that are left where an expert takes at most ``capacity`` tokens of a pool.

    V-MoE's batch-prioritised routing: all first choices before all second ones, and among those the tokens with the
    highest probability of their first choice first; ties go to the lowest token index.
    """
    num_tokens, k = expert_TK.shape
    num_experts = probs_TE.size(1)
    by_priority_T = probs_TE.gather(1, expert_TK[:, :1])[:, 0].argsort(descending=True, stable=True)
    token_P = by_priority_T.repeat(k)
    expert_P = expert_TK[by_priority_T].T.reshape(-1)
    pool_P = pools.of(token_P)
    group_P, queue_P = (pool_P * num_experts + expert_P).sort(stable=True)  # one queue a pool and expert
    place_P = torch.arange(num_tokens * k, device=token_P.device)
    place_P = place_P - torch.searchsorted(group_P, group_P)
    if isinstance(capacity, Tensor):
        capacity = capacity[pool_P[queue_P]]
    kept_P = queue_P[place_P < capacity]
    chosen = (expert_P[kept_P] * num_tokens + token_P[kept_P]).sort().values
    return chosen % max(num_tokens, 1), _ends(chosen // max(num_tokens, 1), num_experts)


def pairs_of_experts(token_EC: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs where every expert chose the same number of tokens, in ascending order."""
    num_experts, per_expert = token_EC.shape
    ends = torch.arange(1, num_experts + 1, device=token_EC.device, dtype=torch.int32) * per_expert
    return token_EC.reshape(-1), ends


def pairs_of_mask(mask_TE: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs at which ``mask`` is true."""
    token_P = mask_TE.T.nonzero()[:, 1]
    return token_P, mask_TE.sum(dim=0).cumsum(0).to(torch.int32)


def _ends(expert_P: Tensor, num_experts: int) -> Tensor:
    experts = torch.arange(num_experts, device=expert_P.device)
    return torch.searchsorted(expert_P, experts, right=True).to(torch.int32)
