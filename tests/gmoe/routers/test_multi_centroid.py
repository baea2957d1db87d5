"""Multi-centroid routing. Shapes: T tokens, D width, E experts, M centroids an expert."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gmoe import MultiCentroid
from gmoe.routers.multi_centroid import _plus_plus, kmeans


def directions(num_clusters: int, each: int) -> tuple[Tensor, Tensor]:
    """Clusters of directions about a common offset."""
    torch.manual_seed(0)
    owner = torch.arange(num_clusters).repeat(each)
    return 5.0 + 10.0 * torch.eye(num_clusters)[owner] + 0.3 * torch.randn(
        len(owner), num_clusters
    ), owner


@pytest.mark.parametrize("num_centroids", [1, 4])
def test_init_from_data_finds_planted_clusters(num_centroids: int) -> None:
    x, planted = directions(5, 40)
    router = MultiCentroid(5, num_experts=5, num_centroids=num_centroids)
    router.init_from_data(x.view(4, 50, 5), seed=1)
    assert (
        len(set(zip(planted.tolist(), router(x).to_dense().argmax(-1).tolist(), strict=True))) == 5
    )
    torch.testing.assert_close(router.center_D, x.mean(0))
    assert router.centroid.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_init_from_data_follows_its_seed_alone(dtype: torch.dtype) -> None:
    first, second = (
        MultiCentroid(4, num_experts=3).to(dtype),
        MultiCentroid(4, num_experts=3).to(dtype),
    )
    x, state = torch.randn(50, 4), torch.get_rng_state()
    first.init_from_data(x, seed=3)
    second.init_from_data(x, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    second(x)
    for found, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(found, other)
        assert found.isfinite().all()
    assert first.centroid.dtype == dtype


@pytest.mark.parametrize("distinct", [1, 3, 7])
def test_fewer_distinct_tokens_than_experts(distinct: int) -> None:
    """Minesweeper has 7 distinct rows; 8 experts are asked for."""
    torch.manual_seed(0)
    router, rows = MultiCentroid(5, num_experts=8), torch.randn(distinct, 5)
    router.init_from_data(rows.repeat(30, 1))
    routing = router(rows)
    assert router.centroid.isfinite().all()
    assert routing.scores.isfinite().all()
    assert (routing.load > 0).sum() == distinct


@pytest.mark.parametrize("shape", [(50, 3), (2, 4), (0, 4), (4,)], ids=str)
def test_init_from_bad_data(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="x: got shape"):
        MultiCentroid(4, num_experts=3).init_from_data(torch.randn(shape))
    with pytest.raises(ValueError, match="x: got values that are NaN or infinite"):
        MultiCentroid(4, num_experts=3).init_from_data(torch.full((9, 4), math.nan))


def test_centers_are_the_means_of_their_clusters_also_of_one_token() -> None:
    x, _ = directions(4, 20)
    x = torch.cat([x, torch.full((1, 4), -40.0)])
    center_ND, owner_T = kmeans(x, 5, torch.Generator().manual_seed(0))
    assert owner_T.bincount().min() == 1
    for cluster, center_D in enumerate(center_ND):
        torch.testing.assert_close(center_D, x[owner_T == cluster].mean(dim=0))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_k_means_starts_from_tokens_that_differ_however_close_they_are(scale: float) -> None:
    x = scale * torch.eye(3).repeat(20, 1)
    for seed in range(10):
        start_ND = _plus_plus(x, 3, torch.Generator().manual_seed(seed))
        assert len(start_ND.unique(dim=0)) == 3


def test_the_seed_of_the_clusters_is_zero_unless_it_is_given() -> None:
    x = torch.randn(50, 4)
    found = []
    for options in ({}, {"seed": 0}, {"seed": 1}):
        router = MultiCentroid(4, num_experts=3)
        router.init_from_data(x, **options)
        found.append(router.centroid)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
