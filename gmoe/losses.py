"""Auxiliary losses of routers.

Shapes: T tokens, E experts, K experts per token, M centroids per expert, N centroids of all
experts, D width.

All losses are computed over all tokens of the call, and are 0 if there are none. Under
``torch.distributed``, routers use the same formulas on sums over the tokens of all processes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cv_squared(value_E: Tensor) -> Tensor:
    """Squared coefficient of variation, ``var(v) / mean(v)^2``, with the population variance."""
    square_mean = value_E.mean().square().clamp(min=torch.finfo(value_E.dtype).tiny)
    return value_E.var(unbiased=False) / square_mean


def importance_loss(probs_TE: Tensor) -> Tensor:
    """``CV^2`` of the importance of the experts, ``sum_t p_te`` (V-MoE, 2021).

    The sum is over all probabilities, before selection.
    """
    return cv_squared(probs_TE.sum(dim=0))


def load_loss(clean_TE: Tensor, noisy_TE: Tensor, noise_std_TE: Tensor, k: int) -> Tensor:
    """``CV^2`` of the expected load under noisy top-K gating (Shazeer et al., 2017, appendix A).

    The load of expert ``e`` is ``sum_t Phi((clean_te - threshold_te) / std_te)``, where the
    threshold is the K-th best of the noisy logits of the *other* experts. If K = E every load is T,
    and the loss is 0.
    """
    return cv_squared(expected_load(clean_TE, noisy_TE, noise_std_TE, k))


def expected_load(clean_TE: Tensor, noisy_TE: Tensor, noise_std_TE: Tensor, k: int) -> Tensor:
    """(E,) the expected load of :func:`load_loss`."""
    if k >= clean_TE.size(1):
        return (clean_TE * 0.0 + 1.0).sum(dim=0)  # T each, with a gradient of zero
    # The K-th best of the other experts: one of the K best has the next one to beat.
    best_TK = noisy_TE.topk(k + 1, dim=-1).values
    kth_T1 = best_TK[:, k - 1 : k]
    next_T1 = best_TK[:, k:]
    threshold_TE = torch.where(noisy_TE >= kth_T1, next_T1, kth_T1)
    chance_TE = torch.special.ndtr((clean_TE - threshold_TE) / noise_std_TE)
    return chance_TE.sum(dim=0)


def switch_loss(probs_TE: Tensor, load_E: Tensor) -> Tensor:
    """``E * sum_e f_e P_e`` (Fedus et al., 2021).

    f is the share of the pairs (it sums to 1), P the mean probability. The loss is 1 if both are
    uniform, and E if one expert gets everything.
    """
    importance_E = probs_TE.sum(dim=0)
    return switch_of(importance_E, load_E, importance_E.new_full((), len(probs_TE)))


def switch_of(importance_E: Tensor, load_E: Tensor, tokens: Tensor) -> Tensor:
    """:func:`switch_loss` from sums over tokens and their number."""
    share_E = load_E.to(importance_E.dtype) / load_E.sum().clamp(min=1)
    return len(load_E) * (share_E * importance_E).sum() / tokens.clamp(min=1)


def z_loss(logits_TE: Tensor) -> Tensor:
    """Mean over tokens of ``logsumexp_e(logit_te)^2`` (ST-MoE, Zoph et al., 2022)."""
    return square_sum(logits_TE) / max(len(logits_TE), 1)


def square_sum(logits_TE: Tensor) -> Tensor:
    """The sum over tokens of :func:`z_loss`."""
    return logits_TE.logsumexp(dim=-1).square().sum()


def separation_loss(centroids_EMD: Tensor) -> Tensor:
    """Similarity of the centroids: the mean of ``max(0, cos)^2`` within experts, plus that across.

    It is 0 if no two centroids have a positive cosine, and 2 if all are the same. Either mean is 0
    if it has no pairs.
    """
    num_experts, num_centroids, _ = centroids_EMD.shape
    unit_ND = F.normalize(centroids_EMD.flatten(0, 1), dim=-1)
    overlap_NN = (unit_ND @ unit_ND.T).clamp(min=0).square()
    owner_N = torch.arange(num_experts, device=unit_ND.device).repeat_interleave(num_centroids)
    across_NN = owner_N[:, None] != owner_N
    within_NN = (~across_NN).fill_diagonal_(False)  # without a centroid's cosine with itself
    pairs_within = num_experts * num_centroids * (num_centroids - 1)
    pairs_across = num_experts * (num_experts - 1) * num_centroids**2
    within = (overlap_NN * within_NN).sum() / max(pairs_within, 1)
    across = (overlap_NN * across_NN).sum() / max(pairs_across, 1)
    return within + across
