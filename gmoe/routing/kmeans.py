"""k-means of a router's own: the core imports torch only. Shapes: T tokens, D width, N clusters."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def kmeans(
    x_TD: Tensor, num_clusters: int, generator: torch.Generator, *, restarts: int = 8, steps: int = 50
) -> tuple[Tensor, Tensor]:
    """Lloyd's k-means with k-means++ starts (Arthur & Vassilvitskii, 2007): the best of ``restarts`` runs.

    Returns:
        Centres (N, D) and the cluster of each token (T,). A cluster may be empty where there are fewer than N
        distinct tokens.
    """
    best: tuple[float, Tensor, Tensor] | None = None
    for _ in range(restarts):
        center_ND = _plus_plus(x_TD, num_clusters, generator)
        owner_T = _nearest(x_TD, center_ND)[1]
        for _ in range(steps):
            count_N = torch.bincount(owner_T, minlength=num_clusters)
            total_ND = torch.zeros_like(center_ND).index_add_(0, owner_T, x_TD)
            # an emptied cluster keeps its centre
            center_ND = torch.where(count_N[:, None] > 0, total_ND / count_N.clamp(min=1)[:, None], center_ND)
            moved_T = _nearest(x_TD, center_ND)[1]
            if torch.equal(moved_T, owner_T):
                break
            owner_T = moved_T
        inertia = float(_nearest(x_TD, center_ND)[0].sum())
        if best is None or inertia < best[0]:
            best = (inertia, center_ND, owner_T)
    assert best is not None
    return best[1], best[2]


def _nearest(x_TD: Tensor, center_ND: Tensor) -> tuple[Tensor, Tensor]:
    distance_T, owner_T = torch.cdist(x_TD, center_ND).min(dim=1)
    return distance_T.square(), owner_T


def _plus_plus(x_TD: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Starts that lie far apart: each next one is drawn with probability proportional to the squared distance."""
    device = x_TD.device
    chosen = [torch.randint(len(x_TD), (1,), generator=generator, device=device)]
    far_T = torch.full((len(x_TD),), torch.inf, dtype=x_TD.dtype, device=device)
    for _ in range(num_clusters - 1):
        far_T = far_T.minimum((x_TD - x_TD[chosen[-1]]).square().sum(dim=1))
        # all tokens already chosen or repeated: any of them is as good
        odds_T = far_T if bool(far_T.sum() > 0) else torch.ones_like(far_T)
        cumulative_T = odds_T.double().cumsum(0)
        draw = torch.rand(1, generator=generator, device=device, dtype=torch.float64) * cumulative_T[-1]
        chosen.append(torch.searchsorted(cumulative_T, draw, right=True).clamp(max=len(x_TD) - 1))
    return x_TD[torch.cat(chosen)]
