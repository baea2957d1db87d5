"""The sampler: what it returns is a sampled subgraph, whatever form the graph has."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.data import Data, HeteroData
from torch_geometric.loader import LinkLoader
from torch_geometric.nn import GraphSAGE
from torch_geometric.sampler import EdgeSamplerInput, NodeSamplerInput, SamplerOutput
from torch_geometric.utils import k_hop_subgraph

import gmoe.data.sampler
from gmoe import GNNMoE
from gmoe.data.sampler import NeighborSampler
from tests.gmoe.data.sampled import check, draw, graph, hetero_graph, hetero_sample, sample


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    num_nodes=st.integers(1, 12),
    num_edges=st.integers(0, 40),
    fanouts=st.lists(st.integers(-1, 4), max_size=3),
    num_seeds=st.integers(0, 6),
    replace=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_output_is_a_sampled_subgraph(
    num_nodes: int, num_edges: int, fanouts: list[int], num_seeds: int, replace: bool, seed: int
) -> None:
    data = graph(num_nodes, num_edges, seed)
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(num_nodes, (num_seeds,), generator=generator).tolist()  # some of them twice
    torch.manual_seed(seed)
    sampler = NeighborSampler(data, fanouts, replace)
    for _ in range(2):  # the second batch meets no trace of the first
        check(data, draw(sampler, seeds), fanouts, seeds, replace)


def test_all_neighbors_are_the_k_hop_subgraph() -> None:
    data = graph(200, 500)
    for num_hops in (1, 2, 3):
        seeds = torch.tensor([3, 50, 120])
        out = sample(data, [-1] * num_hops, seeds)
        nodes, _, _, mask = k_hop_subgraph(seeds, num_hops, data.edge_index, num_nodes=200, directed=True)
        assert out.edge is not None
        assert torch.equal(out.node.sort().values, nodes)
        assert torch.equal(out.edge.sort().values, mask.nonzero().view(-1))


# what models make of it


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("model", ["sage", "moe"])
def test_trimming_leaves_the_logits_of_the_seeds(model: str, replace: bool) -> None:
    data = graph(60, 400)
    torch.manual_seed(0)
    build = {
        "sage": lambda: GraphSAGE(4, 8, num_layers=3, out_channels=5),
        "moe": lambda: GNNMoE(4, 8, 5, num_layers=3, conv="sage", num_experts=3, router_input="node"),
    }
    net = build[model]().double().eval()
    out = sample(data, [4, 3, 2], [7, 1, 30], replace)
    x, edge_index = data.x[out.node].double(), torch.stack([out.row, out.col])
    trimmed = net(
        x,
        edge_index,
        num_sampled_nodes_per_hop=out.num_sampled_nodes,
        num_sampled_edges_per_hop=out.num_sampled_edges,
    )
    assert len(trimmed) < len(x)
    torch.testing.assert_close(trimmed[:3], net(x, edge_index)[:3])


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize(
    "fanouts",
    [
        [3, 2, 2],
        [-1, -1],
        {
            ("author", "writes", "paper"): [4, 1],
            ("paper", "cites", "paper"): [0, 2],
            ("paper", "by", "author"): [-1, 3],
            ("author", "at", "place"): [1, 1],
        },
    ],
)
def test_hetero_output_is_a_sampled_subgraph(fanouts: Any, replace: bool) -> None:
    data = hetero_graph()
    torch.manual_seed(0)
    out = hetero_sample(data, fanouts, "paper", [4, 9, 0], replace)
    check(data, out, fanouts, {"paper": [4, 9, 0]}, replace)


# forms of graphs, and what is refused


def same(a: SamplerOutput, b: SamplerOutput) -> bool:
    assert a.edge is not None
    assert b.edge is not None
    pairs = [(a.node, b.node), (a.row, b.row), (a.col, b.col), (a.edge, b.edge)]
    return all(torch.equal(x, y) for x, y in pairs) and a.num_sampled_nodes == b.num_sampled_nodes


def test_draws_are_repeated_by_the_seed_of_torch() -> None:
    """Also in int64, where ids are beyond int32, and by a copy as spawned workers get it, which shares no map."""
    data = graph(100, 3_000)
    sampler = NeighborSampler(data, [5, 5])
    first, again, other = (draw(sampler, range(20), seed) for seed in (0, 0, 1))
    assert same(first, again)
    assert not same(first, other)
    copied = pickle.loads(pickle.dumps(sampler))
    assert len(sampler._maps) == 1
    assert copied._maps == []
    assert same(first, draw(copied, range(20), 0))
    iinfo = torch.iinfo
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "iinfo", lambda dtype: iinfo(torch.int8 if dtype == torch.int32 else dtype))
        wide = NeighborSampler(data, [5, 5])
        assert wide._dtype == torch.int64
        assert same(first, draw(wide, range(20), 0))


def test_error_and_inference_mode_leave_no_trace() -> None:
    data = graph(20, 60)
    sampler = NeighborSampler(data, [3, 3])
    with torch.inference_mode():
        draw(sampler, range(4))
    check(data, draw(sampler, range(4)), [3, 3], [0, 1, 2, 3], replace=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gmoe.data.sampler, "_draw", interrupt)
        with pytest.raises(KeyboardInterrupt):
            draw(sampler, range(4))
    check(data, draw(sampler, range(4)), [3, 3], [0, 1, 2, 3], replace=False)


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("form", ["EdgeIndex", "EdgeIndex by col", "is_sorted", "int32", "not contiguous"])
def test_forms_of_edges(form: str) -> None:
    data = graph(30, 200)
    by_destination = data.edge_index[:, data.edge_index[1].argsort(stable=True)]
    edges = {
        "EdgeIndex": lambda: EdgeIndex(data.edge_index, sparse_size=(30, 30)),
        "EdgeIndex by col": lambda: EdgeIndex(by_destination, sparse_size=(30, 30), sort_order="col"),
        "is_sorted": lambda: by_destination,
        "int32": lambda: data.edge_index.int(),
        "not contiguous": lambda: data.edge_index.T.contiguous().T,
    }[form]()
    other = Data(x=data.x, edge_index=edges)
    torch.manual_seed(0)
    out = sample(other, [4, 3], [5, 2, 8], is_sorted=form == "is_sorted")
    assert {type(value) for value in (out.node, out.row, out.col, out.edge)} == {torch.Tensor}
    check(Data(edge_index=torch.as_tensor(edges), num_nodes=30), out, [4, 3], [5, 2, 8], replace=False)


def test_transposed_adjacency(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch-sparse's SparseTensor holds it, of which PyG reads ``csr()``: ids are positions in it."""
    data = graph(30, 200)
    by_destination = data.edge_index[:, data.edge_index[1].argsort(stable=True)]
    start = torch.cat([torch.zeros(1, dtype=torch.long), data.edge_index[1].bincount(minlength=30).cumsum(0)])

    class Adjacency:
        def csr(self) -> tuple[Tensor, Tensor, None]:
            return start, by_destination[0], None

    monkeypatch.setattr(gmoe.data.sampler, "SparseTensor", Adjacency)
    out = sample(Data(num_nodes=30, adj_t=Adjacency()), [4, 3], [5, 2, 8])
    check(Data(num_nodes=30, edge_index=by_destination), out, [4, 3], [5, 2, 8], replace=False)


def test_graph_without_edges() -> None:
    for data in (Data(x=torch.zeros(3, 1)), Data(num_nodes=3, edge_index=torch.empty(2, 0, dtype=torch.long))):
        out = sample(data, [2, -1], [2, 0])
        assert out.node.tolist() == [2, 0]
        assert (out.num_sampled_nodes, out.num_sampled_edges) == ([2, 0, 0], [0, 0])
        assert out.row.shape == out.col.shape == (0,)


def test_metadata_and_new_fanouts() -> None:
    data = graph(40, 400)
    sampler = NeighborSampler(data, [2])
    input_id = torch.tensor([5, 3])
    out = sampler.sample_from_nodes(NodeSamplerInput(input_id, torch.tensor([1, 2])))
    assert out.metadata[0] is input_id
    assert out.metadata[1] is None
    assert repr(sampler) == "NeighborSampler(num_neighbors=[2], replace=False)"
    sampler.num_neighbors = [3, 1]
    check(data, draw(sampler, [1, 2]), [3, 1], [1, 2], replace=False)


@pytest.mark.parametrize("kind", [None, ("author", "writes", "paper"), ("paper", "cites", "paper")])
def test_link_loader(kind: tuple[str, str, str] | None) -> None:
    """Seed edges, with negative ones: the labeled ends are nodes of the batch."""
    data: Any = graph(30, 200) if kind is None else hetero_graph()
    edge_index = data.edge_index if kind is None else data[kind].edge_index
    label_index = edge_index[:, :6]
    loader = LinkLoader(
        data,
        NeighborSampler(data, [3, 2]),
        edge_label_index=label_index if kind is None else (kind, label_index),
        neg_sampling="binary",
        batch_size=6,
    )
    batch = next(iter(loader))
    store = batch if kind is None else batch[kind]
    source, destination = (batch, batch) if kind is None else (batch[kind[0]], batch[kind[2]])
    found = torch.stack([source.n_id[store.edge_label_index[0]], destination.n_id[store.edge_label_index[1]]])
    assert torch.equal(found[:, :6], label_index)
    assert store.edge_label.tolist() == [1.0] * 6 + [0.0] * 6


def test_bad_input() -> None:
    data, hetero = graph(5, 9), hetero_graph()
    stranger = HeteroData()
    stranger["paper"].num_nodes = 3
    stranger["author", "writes", "paper"].edge_index = torch.zeros(2, 1, dtype=torch.long)
    no_size = HeteroData()
    no_size["paper"].y = "unknown"
    no_size["author", "writes", "paper"].edge_attr = torch.zeros(2, 1)
    dense = Data(num_nodes=3, adj_t=torch.eye(3).to_sparse_csr())
    outside = Data(num_nodes=3, edge_index=torch.tensor([[0, 1], [1, 3]]))
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        ((data, data), [2], {}, "data: got tuple, expected Data, HeteroData or StoredGraph"),
        (data, [2, -2], {}, r"num_neighbors: got \[2, -2\], expected whole numbers of at least -1"),
        (data, [2, 0.5], {}, r"num_neighbors: got \[2, 0.5\], expected whole numbers"),
        (data, {("a", "to", "b"): [2]}, {}, "num_neighbors: got .*, expected a list for homogeneous Data"),
        (hetero, {("a", "to", "b"): [2]}, {}, "Not all edge types"),
        (hetero, {("paper", "cites", "paper"): [2]}, {}, "Missing number of neighbors"),
        (stranger, [2], {}, "data: got edges .*writes.* and nodes 'paper', expected the nodes of both ends"),
        (dense, [2], {}, "data: got adj_t of type Tensor, expected a SparseTensor, or edge_index alone"),
        (outside, [2], {}, r"edge_index: got destination node 3, expected values in 0\.\.2"),
        (data, [2], {"is_sorted": True}, "is_sorted: got True with edges in another order"),
    ]
    for graph_like, fanouts, kwargs, message in cases:
        with pytest.raises(ValueError, match=message):
            NeighborSampler(graph_like, fanouts, **kwargs)
    with pytest.warns(UserWarning, match="Unable to accurately infer"), pytest.raises(ValueError, match="num_nodes"):
        NeighborSampler(Data(), [2])


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (NodeSamplerInput(None, torch.tensor([0, 5])), r"node: got 5, expected values in 0\.\.4"),
        (NodeSamplerInput(None, torch.tensor([-1, 2])), r"node: got -1, expected values in 0\.\.4"),
        (NodeSamplerInput(None, torch.tensor([True, False])), "node: got shape .* of torch.bool"),
        (NodeSamplerInput(None, torch.zeros(2)), "node: got shape .* of torch.float32, expected a vector of node ids"),
        (NodeSamplerInput(None, torch.zeros(2, 2, dtype=torch.long)), r"node: got shape \(2, 2\)"),
        (NodeSamplerInput(None, torch.tensor([0]), torch.tensor([3])), "time: got times of the seeds, expected None"),
        (
            NodeSamplerInput(None, torch.tensor([0]), input_type="paper"),
            "input_type: got 'paper', expected one of None",
        ),
    ],
)
def test_bad_seeds(index: NodeSamplerInput, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeighborSampler(graph(5, 9), [2]).sample_from_nodes(index)


def test_bad_seeds_of_hetero_graphs() -> None:
    sampler = NeighborSampler(hetero_graph(), [2])
    for kind in (None, "field"):
        with pytest.raises(ValueError, match=f"input_type: got {kind!r}, expected one of 'paper', 'author', 'place'"):
            sampler.sample_from_nodes(NodeSamplerInput(None, torch.tensor([0]), input_type=kind))
    index = EdgeSamplerInput(None, torch.tensor([0]), torch.tensor([0]), time=torch.tensor([1]))
    with pytest.raises(ValueError, match="time: got times"):
        sampler.sample_from_edges(index)
