"""Sets of edges that the sampler may draw are equally likely. A node that is n times a seed draws n times."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations

import pytest
import torch
from torch import Tensor
from torch_geometric.data import Data

from gmoe.data.sampler import NeighborSampler
from tests.gmoe.data.sampled import draw, graph, hetero_graph, hetero_sample, sample, star


def within(count: Tensor | int, trials: int, share: float) -> Tensor:
    """True where a binomial count is within 5 standard deviations of its mean."""
    return (torch.as_tensor(count) - trials * share).abs() <= 5 * math.sqrt(trials * share * (1 - share)) + 1e-9


@pytest.mark.parametrize(("degree", "k"), [(5, 1), (5, 4), (6, 3)])
def test_subsets_are_equally_likely(degree: int, k: int) -> None:
    trials = 20_000
    torch.manual_seed(0)
    out = sample(star(degree), [k], [0] * trials)
    assert out.edge is not None
    subsets = Counter(tuple(sorted(edges)) for edges in out.edge.view(trials, k).tolist())
    assert set(subsets) == set(combinations(range(degree), k))
    assert within(torch.tensor(list(subsets.values())), trials, 1 / math.comb(degree, k)).all()


@pytest.mark.parametrize("k", [1, 10])
def test_each_edge_is_included_with_probability_k_over_degree(k: int) -> None:
    """On a graph with nodes of many degrees, in both hops."""
    data = graph(10, 120)
    degree = data.edge_index[1].bincount(minlength=10)
    trials = 2_000
    torch.manual_seed(1)
    out = sample(data, [k], list(range(10)) * trials)
    assert out.edge is not None
    included = out.edge.bincount(minlength=120)
    share = (k / degree[data.edge_index[1]]).clamp(max=1)
    for edge in range(120):
        assert within(included[edge], trials, float(share[edge]))
    assert torch.equal(out.col.bincount(minlength=10 * trials), degree.clamp(max=k).repeat(trials))


def test_edges_of_a_second_hop_are_drawn_uniformly() -> None:
    """A path 2 -> 1 -> 0, where node 1 has 8 more in-edges."""
    source = torch.tensor([1, *range(2, 11)])
    data = Data(edge_index=torch.stack([source, torch.tensor([0] + [1] * 9)]), num_nodes=11)
    sampler, trials = NeighborSampler(data, [1, 3]), 1_500
    included = torch.zeros(10, dtype=torch.long)
    torch.manual_seed(2)
    for _ in range(trials):
        included[draw(sampler, [0]).edge] += 1
    assert included[0] == trials
    assert within(included[1:], trials, 3 / 9).all()


def test_hub() -> None:
    """Each tenth of its edges is drawn alike, and so are odd and even ones and those that Floyd's algorithm adds."""
    degree, k, trials = 50_000, 10, 4_000
    torch.manual_seed(0)
    out = sample(star(degree), [k], [0] * trials)
    assert out.edge is not None
    edges = out.edge.view(trials, k)
    assert (edges.sort(dim=1).values.diff(dim=1) > 0).all()
    stretch = (out.edge // (degree // 10)).bincount(minlength=10)
    assert within(stretch, trials * k, 0.1).all()  # without replacement it spreads less than a binomial
    assert within((out.edge % 2).sum(), trials * k, 0.5)
    last = torch.tensor([0] * 10 + list(range(degree - 10, degree)))
    assert out.edge.bincount(minlength=degree)[last].max() <= 8  # Poisson(0.8): above it once in 10^6


def test_replacement_draws_independently() -> None:
    degree, k, trials = 4, 3, 20_000
    torch.manual_seed(0)
    out = sample(star(degree), [k], [0] * trials, replace=True)
    assert out.edge is not None
    drawn = Counter(tuple(edges) for edges in out.edge.view(trials, k).tolist())
    assert len(drawn) == degree**k
    assert within(torch.tensor(list(drawn.values())), trials, degree**-k).all()


def test_hetero_inclusion_is_uniform() -> None:
    data, trials = hetero_graph(), 2_000
    kind = ("paper", "cites", "paper")
    torch.manual_seed(0)
    out = hetero_sample(data, [2], "paper", list(range(30)) * trials, replace=False)
    edge_index = data[kind].edge_index
    share = (2 / edge_index[1].bincount(minlength=30)[edge_index[1]]).clamp(max=1)
    included = out.edge[kind].bincount(minlength=120)
    assert all(bool(within(included[edge], trials, float(share[edge]))) for edge in range(120))
