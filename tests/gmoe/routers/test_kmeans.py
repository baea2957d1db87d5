"""k-means. Shapes: T tokens, D width, N clusters."""

from __future__ import annotations

import pytest
import torch

from gmoe.routers.multi_centroid import kmeans


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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
