"""Attention vote. Shapes: T tokens, D width, E experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gmoe import AttentionVote

D, E = 6, 4
OPTIONS: list[dict[str, Any]] = [
    {"shared_queries": shared, "scope": scope} for shared in (False, True) for scope in ("group", "neighbors")
]
each = pytest.mark.parametrize("options", OPTIONS, ids=str)


@each
@pytest.mark.parametrize(
    "batch",
    [[0] * 12, [0] * 6 + [1] * 6, [0, 3] * 6, [5, 0, 0, 1, 5, 5, 5, 5, 5, 5, 0, 5]],
    ids=["one", "equal", "equal_unsorted", "ragged"],
)
def test_votes_and_selected_weights_average_one_in_each_group(options: dict[str, Any], batch: list[int]) -> None:
    group, edge_index = torch.tensor(batch), torch.randint(12, (2, 60))
    edge_index = edge_index[:, group[edge_index[0]] == group[edge_index[1]]]
    routing = AttentionVote(D, E, k=2, **options)(2 * torch.randn(12, D), group, edge_index)
    assert routing.weight.max() < 10
    for ids in group.unique():
        torch.testing.assert_close(routing.scores[group == ids].mean(0), torch.ones(E))
        assert routing.weight[group[routing.token] == ids].mean().item() == pytest.approx(1.0, abs=1e-5)


def test_neighbors_need_edges() -> None:
    with pytest.raises(ValueError, match="edge_index: got None"):
        AttentionVote(D, E, scope="neighbors")(torch.randn(3, D))
