"""Disjoint and temporal subgraphs are those of a slow reference, an edge at a time."""

from __future__ import annotations

import pickle
from collections import Counter
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch_geometric.data import Data, HeteroData
from torch_geometric.sampler import EdgeSamplerInput, NegativeSampling, NodeSamplerInput

from gmoe.data.sampler import NeighborSampler
from tests.helpers.sampled import draw, graph, within

RATES, LIKES = ("user", "rates", "item"), ("item", "liked by", "user")


def shop(num_edges: int, seed: int, of: str = "edges") -> HeteroData:
    """Users and items, with times of both, of the items only, or of the edges."""
    generator = torch.Generator().manual_seed(seed)
    data = HeteroData()
    data["user"].num_nodes, data["item"].num_nodes = 5, 4
    for kind in (RATES, LIKES):
        sizes = [data[end].num_nodes for end in (kind[0], kind[2])]
        ends = [torch.randint(size, (num_edges,), generator=generator) for size in sizes]
        data[kind].edge_index = torch.stack(ends)
    holders: dict[str, list[Any]] = {
        "edges": [RATES, LIKES],
        "nodes": ["user", "item"],
        "items": ["item"],
        "none": [],
    }
    for holder in holders[of]:
        size = num_edges if isinstance(holder, tuple) else data[holder].num_nodes
        data[holder].when = torch.randint(4, (size,), generator=generator)
    return data


def reference(
    data: HeteroData,
    seeds: dict[str, list[int]],
    times: list[float],
    fanout: int,
    hops: int,
    last: bool = False,
) -> dict[str, dict[Any, list[int]]]:
    """The definition, for draws that leave no choice: all that a seed may see, or the latest."""
    found: dict[str, list[tuple[int, int]]] = {kind: [] for kind in data.node_types}
    edges: dict[Any, list[tuple[int, int, int]]] = {kind: [] for kind in data.edge_types}
    numbers = iter(range(len(times)))
    for kind, nodes in seeds.items():
        found[kind] = [(next(numbers), node) for node in nodes]
    begin = dict.fromkeys(data.node_types, 0)
    for _ in range(hops):
        end = {kind: len(pairs) for kind, pairs in found.items()}
        for kind in data.edge_types:
            source, _, destination = kind
            for place in range(begin[destination], end[destination]):
                seed, node = found[destination][place]
                visible = []
                for edge, (start, stop) in enumerate(data[kind].edge_index.t().tolist()):
                    time = -1
                    if "when" in data[kind]:
                        time = data[kind].when[edge]
                    elif "when" in data[source]:
                        time = data[source].when[start]
                    if stop == node and time <= times[seed]:
                        visible.append((float(time), edge, start))
                visible.sort()
                if last and len(visible) > fanout >= 0 and "when" in {**data[kind], **data[source]}:
                    visible = visible[len(visible) - fanout :]
                for _, edge, start in visible:
                    if (seed, start) not in found[source]:
                        found[source].append((seed, start))
                    edges[kind].append((found[source].index((seed, start)), place, edge))
        begin = end
    return {
        "node": {kind: [node for _, node in pairs] for kind, pairs in found.items()},
        "batch": {kind: [seed for seed, _ in pairs] for kind, pairs in found.items()},
        "row": {kind: [row for row, _, _ in all_] for kind, all_ in edges.items()},
        "col": {kind: [col for _, col, _ in all_] for kind, all_ in edges.items()},
        "edge": {kind: [edge for _, _, edge in all_] for kind, all_ in edges.items()},
    }


def as_lists(out: Any) -> dict[str, dict[Any, list[int]]]:
    names = ("node", "batch", "row", "col", "edge")
    return {
        name: {kind: values.tolist() for kind, values in getattr(out, name).items()}
        for name in names
    }


def from_users(sampler: NeighborSampler, users: list[int], times: Tensor | None) -> Any:
    index = NodeSamplerInput(None, torch.tensor(users, dtype=torch.long), times, "user")
    return sampler.sample_from_nodes(index)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    of=st.sampled_from(["edges", "nodes", "items"]),
    num_edges=st.integers(0, 25),
    seed=st.integers(0, 2**31),
    users=st.lists(st.integers(0, 4), max_size=4),
    hops=st.integers(0, 3),
    last=st.sampled_from([None, 0, 1, 2]),
)
def test_what_a_seed_sees_is_the_reference(
    of: str, num_edges: int, seed: int, users: list[int], hops: int, last: int | None
) -> None:
    """All of it, or the latest of it: of types with times, to the order of nodes and edges."""
    data = shop(num_edges, seed, of)
    times = torch.randint(-1, 5, (len(users),), generator=torch.Generator().manual_seed(seed))
    fanout = -1 if last is None or of == "items" else last
    strategy: Any = "uniform" if last is None else "last"
    sampler = NeighborSampler(data, [fanout] * hops, time_attr="when", temporal_strategy=strategy)
    for _ in range(2):  # the second batch meets no trace of the first
        out = as_lists(from_users(sampler, users, times))
        wanted = reference(data, {"user": users}, times.tolist(), fanout, hops, last is not None)
        assert out == wanted


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    num_edges=st.integers(0, 40),
    seed=st.integers(0, 2**31),
    users=st.lists(st.integers(0, 4), max_size=4),
    fanout=st.integers(-1, 3),
    replace=st.booleans(),
    of=st.sampled_from(["edges", "nodes", "items", "none"]),
)
def test_draws_are_of_what_a_seed_sees(
    num_edges: int, seed: int, users: list[int], fanout: int, replace: bool, of: str
) -> None:
    """Each node draws min(k, visible) of its edges, or k with replacement. Pairs occur once."""
    data = shop(num_edges, seed, of)
    times = torch.randint(-1, 5, (len(users),), generator=torch.Generator().manual_seed(seed))
    given_times = None if of == "none" else times
    sampler = NeighborSampler(
        data, [fanout, fanout], replace, disjoint=True, time_attr=None if of == "none" else "when"
    )
    torch.manual_seed(seed)
    out = from_users(sampler, users, given_times)
    assert out.batch["user"][: len(users)].tolist() == list(range(len(users)))
    num_expanded = {}
    for kind in data.node_types:
        pairs = list(zip(out.batch[kind].tolist(), out.node[kind].tolist(), strict=True))
        assert len(set(pairs)) == len(pairs)
        num_expanded[kind] = sum(out.num_sampled_nodes[kind][:2])
    for kind in data.edge_types:
        source, _, destination = kind
        row, col, edge = out.row[kind], out.col[kind], out.edge[kind]
        assert torch.equal(out.batch[source][row], out.batch[destination][col])
        assert torch.equal(out.node[source][row], data[kind].edge_index[0, edge])
        assert torch.equal(out.node[destination][col], data[kind].edge_index[1, edge])
        for place in range(num_expanded[destination]):
            number = int(out.batch[destination][place])
            ends = {destination: [int(out.node[destination][place])]}
            visible = visible_edges(data, kind, ends[destination][0], int(times[number]))
            drawn = edge[col == place].tolist()
            assert set(drawn) <= set(visible)
            wanted = len(visible) if fanout < 0 else min(fanout, len(visible))
            if replace and fanout >= 0:
                wanted = fanout * bool(visible)
            else:
                assert len(set(drawn)) == len(drawn)
            assert len(drawn) == wanted


def visible_edges(data: HeteroData, kind: Any, node: int, time: int) -> list[int]:
    """The in-edges of a node that are not later than a time, nor come from a later node."""
    source, destination = data[kind].edge_index
    is_visible = destination == node
    if "when" in data[kind]:
        is_visible = is_visible & (data[kind].when <= time)
    if "when" in data[kind[0]]:
        is_visible = is_visible & (data[kind[0]].when[source] <= time)
    return is_visible.nonzero().view(-1).tolist()


def test_visible_edges_are_equally_likely() -> None:
    """Of six edges into one node, the four that are not later than the seed."""
    trials, k = 6_000, 2
    data = Data(num_nodes=7, edge_index=torch.tensor([[1, 2, 3, 4, 5, 6], [0] * 6]))
    data.when = torch.tensor([3, 1, 9, 2, 3, 4])
    sampler = NeighborSampler(data, [k], time_attr="when")
    torch.manual_seed(0)
    index = NodeSamplerInput(None, torch.zeros(trials, dtype=torch.long), torch.full((trials,), 3))
    out: Any = sampler.sample_from_nodes(index)
    subsets = Counter(tuple(sorted(drawn)) for drawn in out.edge.view(trials, k).tolist())
    assert set(subsets) == set(combinations([0, 1, 3, 4], k))
    assert within(torch.tensor(list(subsets.values())), trials, 1 / len(subsets)).all()


def test_a_disjoint_sample_is_that_of_each_seed_alone() -> None:
    data = graph(30, 90)
    together: Any = draw(NeighborSampler(data, [-1, -1], disjoint=True), [4, 7, 4])
    for number, seed in enumerate([4, 7, 4]):
        alone = draw(NeighborSampler(data, [-1, -1]), [seed])
        assert together.node[together.batch == number].tolist() == alone.node.tolist()
        is_own = together.batch[together.row] == number
        assert alone.edge is not None
        assert sorted(together.edge[is_own].tolist()) == sorted(alone.edge.tolist())


def test_a_seed_without_a_time_has_that_of_its_node() -> None:
    data = graph(20, 200)
    data.when = torch.arange(20.0)
    sampler = NeighborSampler(data, [-1], time_attr="when")
    outs: list[Any] = [
        pickle.loads(pickle.dumps(sampler)).sample_from_nodes(
            NodeSamplerInput(None, torch.tensor([3, 12]), time)
        )
        for time in (None, torch.tensor([3.0, 12.0]))
    ]
    assert torch.equal(outs[0].node, outs[1].node)
    seeds = torch.tensor([3, 12])
    assert (outs[0].node <= seeds[outs[0].batch]).all()
    assert len(outs[0].node) > 2


@pytest.mark.parametrize("mode", ["binary", "triplet"])
def test_links_see_no_later_than_their_time(mode: Any) -> None:
    """Neither end does, nor negative ones, which are nodes that were there at the time."""
    data = graph(40, 400)
    data.when = torch.arange(40) % 10
    index = EdgeSamplerInput(
        torch.arange(3), torch.tensor([0, 11, 2]), torch.tensor([1, 2, 0]), None,
        torch.tensor([4, 7, 2]),
    )  # fmt: skip
    torch.manual_seed(0)
    out: Any = NeighborSampler(data, [3, 3], time_attr="when").sample_from_edges(
        index, NegativeSampling(mode, 2)
    )
    assert out.batch.max() == 2
    num_seeds = {"binary": 2 * 3 * 3, "triplet": 3 + 3 * 3}[mode]
    assert out.num_sampled_nodes[0] == num_seeds
    assert (data.when[out.node] <= torch.tensor([4, 7, 2])[out.batch]).all()
    assert torch.equal(out.batch[out.row], out.batch[out.col])


def test_times_that_do_not_fit_the_graph() -> None:
    """No such attribute, of another size, NaN, of nodes and edges, of integers and floats."""
    data, both, mixed = graph(5, 9), shop(9, 0, "nodes"), shop(9, 0, "nodes")
    data.when, data.short, data.nan = torch.arange(5), torch.zeros(3), torch.full((5,), torch.nan)
    both[RATES].when = torch.zeros(9)
    mixed["user"].when = torch.zeros(5)
    cases: list[tuple[Any, str]] = [
        *((data, name) for name in ("nobody", "short", "nan")),
        *((hetero, "when") for hetero in (both, mixed)),
    ]
    for given_graph, name in cases:
        with pytest.raises(ValueError, match=r"^time_attr: got"):
            NeighborSampler(given_graph, [2], time_attr=name)


def test_strategies_that_do_not_fit() -> None:
    data = graph(5, 9)
    data.when = torch.arange(5)
    first: Any = "first"
    for strategy, time_attr in [(first, "when"), ("last", None)]:
        with pytest.raises(ValueError, match=r"^temporal_strategy: got"):
            NeighborSampler(data, [2], time_attr=time_attr, temporal_strategy=strategy)


def test_times_of_seeds_that_do_not_fit() -> None:
    """Of a graph without times, of another kind or number, or none where the node has none."""
    data, zero = graph(5, 9), torch.tensor([0])
    data.when = torch.arange(5)
    plain, timed = NeighborSampler(data, [2]), NeighborSampler(data, [2], time_attr="when")
    for sampler, time in [(plain, zero), (timed, zero.float()), (timed, torch.tensor([0, 1]))]:
        with pytest.raises(ValueError, match=r"^time: got"):
            sampler.sample_from_nodes(NodeSamplerInput(None, zero, time))
    with pytest.raises(ValueError, match=r"^time: got None"):
        from_users(NeighborSampler(shop(9, 0, "items"), [2], time_attr="when"), [0], None)
    for sampler, links in [
        (plain, EdgeSamplerInput(None, zero, zero, None, zero)),
        (timed, EdgeSamplerInput(None, zero, zero)),
    ]:
        with pytest.raises(ValueError, match=r"^time: got"):
            sampler.sample_from_edges(links)


def test_a_fraction_of_negative_links_is_refused_where_links_are_numbered() -> None:
    """PyG would number their ends differently, in silence."""
    sampler, zero = NeighborSampler(graph(5, 9), [2], disjoint=True), torch.tensor([0])
    with pytest.raises(ValueError, match=r"^neg_sampling: got amount 0\.5"):
        sampler.sample_from_edges(
            EdgeSamplerInput(None, zero, zero), NegativeSampling("binary", 0.5)
        )
