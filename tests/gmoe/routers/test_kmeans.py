"""k-means. Shapes: T tokens, D width, N clusters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gmoe.routers.multi_centroid import kmeans


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blobs(num_clusters: int, each: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Well-separated clusters in a random order, and who belongs where."""
    center = 20.0 * torch.eye(num_clusters)
    owner = torch.arange(num_clusters).repeat(each)[torch.randperm(num_clusters * each, generator=generator(seed))]
    return center[owner] + torch.randn(len(owner), num_clusters, generator=generator(seed)), owner


@pytest.mark.parametrize("seed", range(5))
def test_planted_clusters_are_found(seed: int) -> None:
    x, planted = blobs(6, 30, seed)
    center, owner = kmeans(x, 6, generator(seed))
    assert len(set(zip(planted.tolist(), owner.tolist(), strict=True))) == 6  # the same up to names
    for cluster in range(6):
        torch.testing.assert_close(center[cluster], x[owner == cluster].mean(0))


def test_each_token_is_nearest_to_its_own_center_and_the_seed_decides() -> None:
    x = torch.randn(60, 3, generator=generator())
    state = torch.get_rng_state()
    center, owner = kmeans(x, 5, generator(1))
    assert torch.equal(torch.get_rng_state(), state)  # no draw from the global generator
    assert torch.equal(kmeans(x, 5, generator(1))[0], center)
    distance = (x[:, None] - center).square().sum(-1)
    torch.testing.assert_close(distance.gather(1, owner[:, None])[:, 0], distance.min(1).values)
    assert owner.bincount(minlength=5).min() > 0


@pytest.mark.parametrize("copies", [[0, 1, 2], [0, 0, 0, 1, 2, 2, 0, 0]], ids=["once", "often"])
@pytest.mark.parametrize("seed", range(5))
def test_as_many_clusters_as_distinct_tokens(copies: list[int], seed: int) -> None:
    x = torch.tensor([[0.0], [1.0], [5.0]])[copies]
    center, owner = kmeans(x, 3, generator(seed))
    assert torch.equal(center[owner], x)
    assert sorted(center[:, 0].tolist()) == [0.0, 1.0, 5.0]
