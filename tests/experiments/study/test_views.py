"""What a node can be told: no training node sees its own label, and places differ by community."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score

from experiments.study import views
from experiments.study.views import Walks

DRAW = np.random.default_rng(0)


def random_edges(nodes: int, edges: int) -> np.ndarray:
    return DRAW.integers(nodes, size=(2, edges))


def test_a_step_takes_the_mean_over_sources_of_edges() -> None:
    walks = Walks(np.array([[0, 1, 2], [2, 2, 1]]), 4)
    x = np.array([[1.0], [3.0], [5.0], [7.0]], np.float32)
    assert (walks.incoming @ x).ravel().tolist() == [0, 5, 2, 0]
    assert (walks.outgoing @ x).ravel().tolist() == [5, 5, 3, 0]
    assert walks.both[3].toarray().ravel().tolist() == [0, 0, 0, 1]
    assert walks.is_directed
    assert walks.has_edges


def test_edges_in_both_directions_have_no_direction_and_loops_are_no_edges() -> None:
    assert not Walks(np.array([[0, 1], [1, 0]]), 2).is_directed
    assert not Walks(np.array([[0, 0, 1], [1, 1, 0]]), 2).is_directed  # twice in one direction
    assert not Walks(np.array([[0, 1], [0, 1]]), 2).has_edges


@pytest.mark.parametrize("node", [0, 7, 20])
def test_a_training_node_never_sees_its_own_label(node: int) -> None:
    """Its row is the same whatever its label is; that of some other node is not."""
    walks = Walks(np.hstack([random_edges(60, 300), np.tile(np.arange(60), (2, 1))]), 60)
    train, y = np.arange(40), DRAW.integers(3, size=60)
    other = y.copy()
    other[node] = (y[node] + 1) % 3
    seen, again = (views.diffused_labels(walks, each, train, 3) for each in (y, other))
    assert np.array_equal(seen[node], again[node])
    assert not np.allclose(seen, again)


def test_labels_that_a_node_sees_are_those_of_its_neighbors() -> None:
    """Half of the graph has class 0, the other half 1, with edges inside a half only."""
    first = random_edges(100, 1_000)
    walks = Walks(np.hstack([first, first + 100]), 200)
    y = np.repeat([0, 1], 100)
    seen = views.diffused_labels(walks, y, np.arange(0, 200, 2), 2)[:, :2]
    assert (seen.argmax(axis=1) == y).mean() > 0.98


def test_no_label_near_leaves_the_mean_of_all() -> None:
    walks = Walks(np.array([[0], [1]]), 10)
    seen = views.diffused_labels(walks, np.array([0, 1] * 5), np.arange(4, 8), 2)
    assert seen[9] == pytest.approx(np.full(len(seen[9]), 0.5))


def test_reverse_edges_reach_the_nodes_with_a_common_target() -> None:
    walks = Walks(np.array([[0, 1], [2, 2]]), 3)
    x = np.array([[1.0], [3.0], [0.0]], np.float32)
    assert views.reverse(walks, x)[0].tolist() == [0, 0, 2, 0]
    assert views.walked(walks.incoming, x, (1, 2))[0].tolist() == [0, 0]


def test_positions_tell_communities_of_one_connected_graph() -> None:
    community = np.arange(800) % 4
    target = DRAW.integers(800, size=8_000)
    source = DRAW.integers(200, size=8_000) * 4 + community[target]
    is_other = DRAW.uniform(size=8_000) < 0.3
    source[is_other] = DRAW.integers(800, size=int(is_other.sum()))
    found = views.positions(Walks(np.stack([source, target]), 800))
    clusters = KMeans(4, n_init=3, random_state=0).fit_predict(found)
    assert normalized_mutual_info_score(community, clusters) > 0.9


def test_nodes_apart_have_no_position() -> None:
    edges = random_edges(500, 5_000)
    found = views.positions(Walks(edges, 700))
    assert not found[500:].any()
    assert np.linalg.norm(found[edges[0]], axis=1) == pytest.approx(np.ones(5_000), abs=1e-4)
    assert not views.positions(Walks(edges[:, :0], 700)).any()
