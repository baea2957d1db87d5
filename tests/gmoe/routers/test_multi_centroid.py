"""Multi-centroid routing. Shapes: T tokens, D width, E experts, M centroids an expert."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gmoe import MultiCentroid


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
