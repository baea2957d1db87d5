"""The graph object: order, parts, flows, loops, normalization, what it keeps; and the sums along its edges."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torch_geometric import EdgeIndex
from torch_geometric.nn import GCNConv
from torch_geometric.nn.conv.gcn_conv import gcn_norm
from torch_geometric.utils import add_self_loops, remove_self_loops

from gmoe import GNNMoE, Graph, MoEConv, count_flops
from gmoe.conv import graph as graph_module
from gmoe.conv.attention import Messages
from gmoe.conv.graph import Edges, Matrix, _WeightedSum, blocks, dot, weighted_sum
from tests.gmoe.conv.masked import GRAPHS, csr, features, mean_of_in_edges, random_graph, routing_of, simple_graph

HEADS, WIDTH = 2, 3


def edges_of(pairs: list[tuple[int, int]], num_senders: int, num_receivers: int) -> Edges:
    """Of (receiver, sender) pairs."""
    receiver, sender = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T
    return Edges.sorted(sender, receiver, num_senders, num_receivers)[0]


def slow_sum(weight_MH: Tensor, value_UGC: Tensor, edges: Edges) -> Tensor:
    row_MHC = weight_MH[:, :, None] * value_UGC[edges.sender]
    return row_MHC.new_zeros(edges.num_receivers, *row_MHC.shape[1:]).index_add(0, edges.receiver, row_MHC)


def slow_dot(query_RHC: Tensor, key_UGC: Tensor, edges: Edges) -> Tensor:
    return (query_RHC[edges.receiver] * key_UGC[edges.sender]).sum(dim=-1)


def operands(fast: Any, edges: Edges, shared: bool) -> tuple[Tensor, Tensor]:
    """Weights or queries, and values or keys that all heads share or that each has of its own."""
    shape = (len(edges.sender), HEADS) if fast is weighted_sum else (edges.num_receivers, HEADS, WIDTH)
    return features(*shape, seed=1), features(edges.num_senders, 1 if shared else HEADS, WIDTH, seed=2)


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.integers(0, 9), max_size=40), form=st.sampled_from(["plain", "strided", "counted"]))
def test_messages_of_a_receiver_keep_their_order(values: list[int], form: str) -> None:
    """Sorted by values packed with their positions, or by torch."""
    receiver, sender = torch.tensor(values, dtype=torch.long), torch.arange(len(values))
    given = torch.stack([receiver, receiver], dim=1)[:, 0] if form == "strided" else receiver
    with FlopCounterMode(display=False) if form == "counted" else nullcontext():
        edges, order = Edges.sorted(sender, given, max(len(values), 1), 10)
    expected = receiver.sort(stable=True)
    assert torch.equal(edges.receiver, expected.values)
    assert torch.equal(order, expected.indices)
    assert torch.equal(edges.sender, expected.indices)
    assert edges.degree.tolist() == receiver.bincount(minlength=10).tolist()
    assert receiver.tolist() == values


def test_edges_are_sorted_whatever_the_default_device_and_the_type_of_the_counts() -> None:
    edges = random_graph(6, 6, 15)
    with torch.device("meta"):
        degree = Graph(edges, numpy.int64(6)).in_degree
    assert degree.tolist() == edges[1].bincount(minlength=6).tolist()
    assert torch.func.grad(lambda x: (x * Graph(edges, 6).in_degree).sum())(features(6)).tolist() == degree.tolist()


@settings(max_examples=50, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize(
    ("devices", "narrow"), [(("cpu",), graph_module.NARROW), (("cpu",), 0), ((), 0)], ids=["by MKL", "sparse", "blocks"]
)
@pytest.mark.parametrize(("fast", "slow"), [(weighted_sum, slow_sum), (dot, slow_dot)])
def test_sums_equal_a_row_for_each_message(
    fast: Callable[..., Tensor], slow: Callable[..., Tensor], devices: Any, narrow: int, data: st.DataObject
) -> None:
    """Parallel and missing edges, and more edges than the matrix has cells."""
    senders, receivers = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    pair = st.tuples(st.integers(0, receivers - 1), st.integers(0, senders - 1))
    edges = edges_of(data.draw(st.lists(pair, max_size=12)), senders, receivers)
    first, second = (v.requires_grad_() for v in operands(fast, edges, data.draw(st.booleans())))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_module, "SPARSE_DEVICES", devices)
        patch.setattr(graph_module, "NARROW", narrow)
        patch.setattr(graph_module, "NUMBERS", 20)
        expected, actual = slow(first, second, edges), fast(first, second, edges)
        grad = features(*expected.shape, seed=3)
        ours, theirs = (torch.autograd.grad(y, [first, second], grad) for y in (actual, expected))
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("fast", [weighted_sum, dot])
def test_gradcheck(fast: Any, shared: bool) -> None:
    for pairs in ([(0, 0), (0, 1), (1, 1), (1, 1), (3, 0)], [(0, 0)] * 9, []):
        edges = edges_of(pairs, 2, 4)
        inputs = tuple(value.requires_grad_() for value in operands(fast, edges, shared))
        assert torch.autograd.gradcheck(lambda a, b, edges=edges: fast(a, b, edges), inputs)
        fast(*inputs, edges).sum().backward()  # an expanded gradient


def test_low_precision_is_summed_in_float32() -> None:
    edges = edges_of([(0, 0)] * 1000, 1, 1)
    weight, value = torch.ones(1000, 1, dtype=torch.bfloat16), torch.ones(1, 1, 1, dtype=torch.bfloat16)
    y = weighted_sum(weight, value, edges)
    assert y.dtype == torch.bfloat16
    assert float(y) == 1000.0  # a sum in bfloat16 stops at 256
    assert weighted_sum(weight.float(), value, edges).dtype == torch.float32


@pytest.mark.parametrize("fast", [weighted_sum, dot])
def test_second_derivatives_are_refused(fast: Any) -> None:
    edges = edges_of([(0, 0), (1, 1)], 2, 2)
    inputs = tuple(value.requires_grad_() for value in operands(fast, edges, False))
    with pytest.raises(RuntimeError, match="create_graph: got True"):
        torch.autograd.grad(fast(*inputs, edges).square().sum(), inputs, create_graph=True)


@given(start=st.integers(0, 20), length=st.integers(0, 40), width=st.integers(1, 300))
def test_blocks_cover_all_once(start: int, length: int, width: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_module, "NUMBERS", 100)
        found = list(blocks(start, start + length, width, torch.device("cpu")))
    assert [i for block in found for i in range(block.start, block.stop)] == list(range(start, start + length))
    assert all((block.stop - block.start) * width <= max(100, width) for block in found)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_messages_are_the_in_edges_of_the_pairs(data: st.DataObject) -> None:
    num_src, num_dst, num_experts = (data.draw(st.integers(1, 5), label=n) for n in ("sources", "tokens", "experts"))
    end = st.tuples(st.integers(0, num_src - 1), st.integers(0, num_dst - 1))
    edges = data.draw(st.lists(end, max_size=10), label="edges")
    row = st.lists(st.sampled_from([0.0, 1.0]), min_size=num_experts, max_size=num_experts)
    routing = routing_of(torch.tensor(data.draw(st.lists(row, min_size=num_dst, max_size=num_dst), label="weights")))
    attr = features(len(edges), 2)
    graph = Graph(torch.tensor(edges, dtype=torch.long).reshape(-1, 2).T, (num_src, num_dst), edge_attr=attr)
    found = Messages(graph, routing)

    ends = list(zip(routing.token.tolist(), routing.expert.tolist(), strict=True))
    expected = [
        (pair, expert, edge, source)
        for pair, (token, expert) in enumerate(ends)
        for edge, (source, destination) in enumerate(edges)
        if destination == token
    ]
    given_edge = graph.order[found.edge]
    parts = (found.pair, found.expert, given_edge, found.source)
    assert list(zip(*(part.tolist() for part in parts), strict=True)) == expected
    heard = sorted({(expert, source) for _, expert, _, source in expected})
    assert found.heard.tolist() == [source for _, source in heard]
    assert found.heard_offsets.tolist() == [sum(e <= expert for e, _ in heard) for expert in range(num_experts)]
    assert found.offsets.tolist() == [sum(e <= expert for _, e, *_ in expected) for expert in range(num_experts)]
    assert found.ptr.tolist() == [sum(p < pair for p, *_ in expected) for pair in range(len(ends) + 1)]
    senders = (found.from_heard, found.from_nodes, found.from_edges)
    assert senders[0].sender.tolist() == [heard.index((expert, source)) for _, expert, _, source in expected]
    assert senders[1].sender.tolist() == found.source.tolist()
    assert senders[2].sender.tolist() == list(range(len(expected)))
    assert all(part.receiver.tolist() == [pair for pair, *_ in expected] for part in senders)
    assert found.edge_attr is not None
    assert torch.equal(found.edge_attr, attr[[edge for _, _, edge, _ in expected]])


def test_edges_are_sorted_by_destination_and_remember_their_order() -> None:
    edge_index, weight = torch.tensor([[3, 0, 1, 2, 0], [1, 2, 1, 0, 1]]), features(5)
    graph = Graph(edge_index, 4, edge_weight=weight, edge_attr=features(5, 2))
    assert graph.order.tolist() == [3, 0, 2, 4, 1]  # stable
    assert graph.edges.sender.tolist() == [2, 3, 1, 0, 0]
    assert graph.edges.ptr.tolist() == [0, 1, 4, 5, 5]
    assert graph.in_degree.tolist() == [1, 3, 1, 0]
    assert graph.weight is not None
    assert graph.attr is not None
    assert torch.equal(graph.weight, weight[graph.order])
    assert torch.equal(graph.attr, features(5, 2)[graph.order])
    edge, position = graph.edges.of(torch.tensor([3, 1, 0]))
    assert graph.order[edge].tolist() == [0, 2, 4, 3]
    assert position.tolist() == [1, 1, 1, 2]
    back, order = graph.edges.transpose
    assert back.receiver.tolist() == [0, 0, 1, 2, 3]
    assert torch.equal(back.sender, graph.edges.receiver[order])


@pytest.mark.parametrize("sizes", [(9, 9), (9, 5), (5, 9)], ids=str)
def test_sum_and_mean(sizes: tuple[int, int]) -> None:
    edges, x = random_graph(*sizes, 30), features(sizes[0], WIDTH)
    weight = features(30, seed=1)
    graph = Graph(edges, sizes, edge_weight=weight)
    expected = x.new_zeros(sizes[1], WIDTH).index_add(0, edges[1], weight[:, None] * x[edges[0]])
    torch.testing.assert_close(graph.weighted("weight", False, x.dtype).times(x), expected)
    degree = edges[1].bincount(minlength=sizes[1]).clamp(min=1)[:, None]
    torch.testing.assert_close(graph.weighted("weight", True, x.dtype).times(x), expected / degree)
    if sizes[0] == sizes[1]:
        torch.testing.assert_close(graph.mean(x), mean_of_in_edges(x, edges))
    assert not graph.mean(x)[-1].any()  # isolated


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_parts_hold_the_in_edges_of_their_destinations(data: st.DataObject) -> None:
    num_src, num_dst = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    end = st.tuples(st.integers(0, num_src - 1), st.integers(0, num_dst - 1))
    ends = data.draw(st.lists(end, max_size=12))
    flow = data.draw(st.sampled_from(["source_to_target", "target_to_source"]))
    given_edges = torch.tensor(ends, dtype=torch.long).reshape(-1, 2).T
    given_edges = given_edges if flow == "source_to_target" else given_edges.flip(0)
    attr = torch.arange(len(ends))[:, None].float()
    graph = Graph(given_edges, (num_src, num_dst), edge_attr=attr, edge_weight=attr[:, 0], flow=flow)
    token = torch.tensor(data.draw(st.permutations(range(num_dst)))[: data.draw(st.integers(0, num_dst))]).long()
    nodes, part = graph.part(token)
    if ends and not any(d in token.tolist() for _, d in ends):  # never without an edge, where the graph has some
        assert torch.equal(part.destinations[:-1], token)
        assert part.num_edges > 0
        token = part.destinations
    assert torch.equal(part.destinations, token)
    among = [t for t in token.tolist() if t < num_src]
    assert nodes[: len(among)].tolist() == among
    assert len(set(nodes.tolist())) == len(nodes)
    assert part.flow == flow
    assert (part.num_src, part.num_dst) == (len(nodes), len(nodes) if num_src == num_dst else len(token))
    assert part.edge_attr is not None
    assert part.edge_weight is not None
    assert torch.equal(part.edge_attr[:, 0], part.edge_weight)
    rows = zip(*part.edge_index.tolist(), part.edge_attr[:, 0].tolist(), strict=True)
    found = sorted((int(nodes[source]), int(token[receiver]), int(edge)) for source, receiver, edge in rows)
    assert found == sorted((s, d, edge) for edge, (s, d) in enumerate(ends) if d in token.tolist())


@pytest.mark.parametrize("loops", [True, False])
@pytest.mark.parametrize("improved", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("form", ["plain", "csr"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_normalized_is_pygs(graph: str, form: str, weighted: bool, improved: bool, loops: bool) -> None:
    """As dense matrices; and each part has the weights of the whole."""
    nodes, ends = GRAPHS[graph]
    ends = ends if form == "plain" else ends.unique(dim=1)
    weight = features(ends.size(1), seed=1).abs() + 0.1 if weighted else None
    adj: Any = ends if form == "plain" else csr(ends, (nodes, nodes), weight)
    own = Graph(adj, nodes, edge_weight=weight if form == "plain" else None)
    if form == "plain":
        (src, dst), values = gcn_norm(ends, weight, nodes, improved, loops, dtype=torch.float64)
        expected = torch.zeros(nodes, nodes).double().index_put((dst, src), values, accumulate=True)
    else:
        expected = gcn_norm(adj, None, nodes, improved, loops, dtype=torch.float64)[0].to_dense()

    def dense(matrix: Matrix, rows: int) -> Tensor:
        place = (matrix.edges.receiver, matrix.edges.sender)
        empty = torch.zeros(rows, matrix.edges.num_senders).double()
        return empty.index_put(place, matrix.weight, accumulate=True)

    torch.testing.assert_close(dense(own.normalized(improved, loops, torch.float64), nodes), expected)
    for token in torch.arange(nodes).split(2):
        near, part = own.part(token)
        found = dense(part.normalized(improved, loops, torch.float64), part.num_dst)
        torch.testing.assert_close(found[: len(token)], expected[token][:, near])


@pytest.mark.parametrize("flow", ["source_to_target", "target_to_source"])
@pytest.mark.parametrize("fill_value", ["mean", "max", 0.5, torch.tensor([1.0, 2.0])])
@pytest.mark.parametrize("sizes", [(7, 7), (7, 4)], ids=str)
def test_loops_are_those_of_pyg(sizes: tuple[int, int], fill_value: Any, flow: str) -> None:
    if flow == "target_to_source" and sizes[0] != sizes[1]:
        sizes = (7, 7)
    edge_index, attr = random_graph(*sizes, 20), features(20, 2)
    graph = Graph(edge_index, sizes, edge_attr=attr, flow=flow).with_loops(fill_value)
    ends, filled = add_self_loops(*remove_self_loops(edge_index, attr), fill_value, min(sizes))
    assert filled is not None
    ends = ends if flow == "source_to_target" else ends.flip(0)
    found = torch.stack([graph.edges.sender, graph.edges.receiver])
    assert graph.attr is not None
    mine = sorted((*ends, *row) for ends, row in zip(found.T.tolist(), graph.attr.tolist(), strict=True))
    theirs = sorted((*ends, *row) for ends, row in zip(ends.T.tolist(), filled.tolist(), strict=True))
    torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs))
    origin = graph.order
    assert int((origin < 0).sum()) == min(sizes)
    given_ends = edge_index if flow == "source_to_target" else edge_index.flip(0)
    assert torch.equal(found[:, origin >= 0], given_ends[:, origin[origin >= 0]])
    assert Graph(edge_index, sizes, flow=flow).with_loops(fill_value).attr is None


def test_the_other_flow() -> None:
    edges = random_graph(6, 6, 15)
    graph = Graph(edges, 6, edge_weight=features(15))
    turned = graph.in_flow("target_to_source")
    assert torch.equal(turned.edge_index, edges.flip(0))
    assert turned is graph.in_flow("target_to_source")
    assert graph.in_flow("source_to_target") is graph
    assert torch.equal(turned.mean(features(6, 2)), Graph(edges.flip(0), 6).mean(features(6, 2)))
    with pytest.raises(ValueError, match=r"edge_index: got Tensor for a conv of flow='target_to_source'"):
        Graph(csr(edges.unique(dim=1), (6, 6)), 6).in_flow("target_to_source")


@pytest.mark.parametrize("conv", ["gcn", "sage", "gat", "transformer", "filter"])
def test_a_graph_sorts_once_for_all_calls(conv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = MoEConv(conv, 4, 4, num_experts=2, shared_expert=False).double()
    x, edges = features(9, 4).requires_grad_(), random_graph(9, 9, 30)
    calls, plain = list[Any](), Edges.sorted

    def watched(*args: Any) -> Any:
        calls.append(args)
        return plain(*args)

    monkeypatch.setattr(Edges, "sorted", staticmethod(watched))
    graph = Graph(edges, 9)
    layer(x, graph).sum().backward()
    first = len(calls)
    layer(x, graph).sum().backward()
    again = len(calls) - first
    per_call = {"gat": 1, "transformer": 1}.get(conv, 0)  # attention's messages follow the routing of the call
    assert again <= per_call
    layer(x, edges).sum().backward()
    assert len(calls) - first - again == first


def test_what_is_kept_does_not_outlive_its_weights() -> None:
    edges, weight = random_graph(6, 6, 15), features(15).abs()
    graph = Graph(edges, 6)
    kept = graph.normalized(False, True, torch.float64)
    assert graph.normalized(False, True, torch.float64).weight is kept.weight
    other = graph.with_args(weight, None)
    assert other.edges is graph.edges  # the order is shared
    assert not torch.equal(other.normalized(False, True, torch.float64).weight, kept.weight)
    assert graph.normalized(False, True, torch.float64).weight is kept.weight
    assert graph.with_args(None, None) is graph
    assert graph.normalized(True, False, torch.float64).weight is not kept.weight
    weighted = graph.with_args(weight, None)
    plain = weighted.normalized(False, True, torch.float64).weight
    assert not torch.equal(weighted.normalized(True, True, torch.float64).weight, plain)
    assert graph.normalized(False, True, torch.float32).weight.dtype == torch.float32
    learned = graph.with_args(weight.clone().requires_grad_(), None)
    for _ in range(2):  # a second backward pass needs a graph of its own
        learned.normalized(False, True, torch.float64).weight.sum().backward()


def summed(patch: pytest.MonkeyPatch) -> list[Tensor]:
    """What sums over messages are made of, from now on."""
    calls: list[Tensor] = []
    plain = Matrix.times

    def watched(matrix: Matrix, x: Tensor) -> Tensor:
        calls.append(x)
        return plain(matrix, x)

    patch.setattr(Matrix, "times", watched)
    return calls


def test_means_of_the_same_features_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    edges, x = random_graph(6, 6, 15), features(6, 2)
    graph, calls = Graph(edges, 6), summed(monkeypatch)
    first = graph.mean(x)
    with torch.no_grad():
        assert graph.mean(x) is first
        assert graph.with_args(features(15), None).mean(x) is first
    assert len(calls) == 1
    assert torch.equal(graph.mean(x.clone()), first)
    assert len(calls) == 2
    assert graph.mean(x.float()).dtype == torch.float32
    for changed in (x, first):
        changed.add_(1)
        torch.testing.assert_close(graph.mean(x), mean_of_in_edges(x, edges))


@pytest.mark.parametrize(("form", "sums"), [("edge_index", 1), ("Graph", 1), ("csr, by whose values SAGE weighs", 2)])
def test_the_first_layer_takes_the_sum_that_the_router_saw(
    form: str, sums: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gnn = GNNMoE(4, 4, 3, conv="sage", router_input=("node", "neighbors"), shared_router=True).double()
    edges, x, of_x = random_graph(9, 9, 30).unique(dim=1), features(9, 4), list[Tensor]()
    plain = _WeightedSum.forward

    def watched(ctx: Any, weight_MH: Tensor, value_UGC: Tensor, edges: Edges) -> Tensor:
        of_x.extend([value_UGC] if value_UGC.data_ptr() == x.data_ptr() else [])
        return plain(ctx, weight_MH, value_UGC, edges)

    monkeypatch.setattr(_WeightedSum, "forward", staticmethod(watched))
    gnn(x, Graph(edges, 9) if form == "Graph" else edges if form == "edge_index" else csr(edges, (9, 9)))
    assert len(of_x) == sums


def test_what_is_known_of_a_call_ends_with_its_first_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"num_layers": 3, "router_input": ("node", "neighbors"), "router_hops": 2}
    gnn, kept, plain = GNNMoE(4, 4, 3, conv="gat", shared_router=True, **options).double(), list[Any](), Matrix.kept

    def watched(matrix: Matrix, x: Tensor) -> Tensor:
        kept.append(weakref.ref(out := plain(matrix, x)))
        return out

    monkeypatch.setattr(Matrix, "kept", watched)
    gnn.convs[1].register_forward_pre_hook(lambda *_: kept.append([ref() is None for ref in kept]))
    with torch.no_grad():
        gnn(features(9, 4), random_graph(9, 9, 30))
    assert kept[-1] == [True]


def test_what_needs_gradients_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, x, calls = Graph(random_graph(6, 6, 15), 6), features(6, 2).requires_grad_(), summed(monkeypatch)
    for _ in range(2):
        graph.mean(x).sum().backward()
    learned = graph.with_args(features(15).requires_grad_(), None)
    for _ in range(2):
        learned.weighted("weight", False, x.dtype).kept(x.detach()).sum().backward()
    assert len(calls) == 4
    assert x.grad is not None
    assert learned.edge_weight.grad is not None  # type: ignore[union-attr]


def test_a_graph_does_not_keep_features_alive() -> None:
    graph, x = Graph(random_graph(6, 6, 15), 6), features(6, 2)
    seen, mean = weakref.ref(x), weakref.ref(graph.mean(x))
    assert mean() is not None
    del x
    assert seen() is None
    assert mean() is None


def test_means_seen_in_inference_mode_train() -> None:
    graph, x, layer = Graph(random_graph(6, 6, 15), 6), features(6, 2), nn.Linear(2, 1).double()
    with torch.inference_mode():
        graph.mean(x)
        inside = features(6, 2)
        inside.add_(1)  # counts no versions
        torch.testing.assert_close(graph.mean(inside), graph.mean(inside.clone()))
        inside.add_(1)
        torch.testing.assert_close(graph.mean(inside), graph.mean(inside.clone()))
    layer(graph.mean(x)).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda graph: pickle.loads(pickle.dumps(graph))])
def test_a_graph_that_keeps_means_can_be_copied(copied: Callable[[Graph], Graph]) -> None:
    graph, x = Graph(random_graph(6, 6, 15), 6), features(6, 2)
    assert torch.equal(copied(graph).mean(x), graph.mean(x))
    graph.normalized(False, True, torch.float64).kept(x)
    other = copied(graph)
    assert torch.equal(other.mean(x), graph.mean(x))
    assert torch.equal(other.mean(2 * x), graph.mean(2 * x))


def test_flops_are_those_of_a_first_call() -> None:
    model, x = GNNMoE(6, 4, 3, conv="sage", router_input=("node", "neighbors"), shared_router=True), torch.randn(9, 6)
    graph = Graph(random_graph(9, 9, 30), 9)
    first = count_flops(model, x, graph)
    model(x, graph)
    assert count_flops(model, x, graph) == first


@pytest.mark.parametrize("conv", ["gcn", "sage", "graph", "gin", "filter"])
def test_raw_features_are_summed_once_a_graph(conv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the router and for the first layer, whose output is the same with a graph of its own in each call."""
    options: dict[str, Any] = {"shared_router": True, "router_input": ("node", "neighbors"), "router_hops": 2}
    x, edges = features(9, 9), random_graph(9, 9, 30)
    model = GNNMoE(9, 4, 3, num_layers=3, conv=conv, **options).double()
    graph = Graph(edges, 9)
    expected = model(x, graph)
    calls = summed(monkeypatch)
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(x, graph), expected)
    assert not any(value.size(1) == 9 for value in calls)
    torch.testing.assert_close(model(x, edges), expected)


def test_other_edge_arguments_take_no_graph_along() -> None:
    edges, weight, attr = random_graph(6, 6, 15), features(15).abs(), features(15, 2)
    graph = Graph(edges, 6, edge_attr=attr)
    graph.in_flow("target_to_source"), graph.with_loops("mean")
    other, fresh = graph.with_args(weight, 7 * attr), Graph(edges, 6, edge_weight=weight, edge_attr=7 * attr)
    assert other.in_flow("target_to_source").edge_weight is weight
    torch.testing.assert_close(other.with_loops("mean").attr, fresh.with_loops("mean").attr)


@pytest.mark.parametrize("conv", ["gcn", "graph", "gat", "two_hop"])
def test_a_graph_seen_in_inference_mode_trains(conv: str) -> None:
    layer, graph = MoEConv([conv, conv], 4, 4, router="random").double(), Graph(random_graph(9, 9, 30), 9)
    x = features(9, 4)
    with torch.inference_mode():
        before = layer(x, graph)
    y = layer(x, graph)
    torch.testing.assert_close(y, before)
    y.sum().backward()


@pytest.mark.parametrize("nodes", [None, 9.0, "9", (9,), torch.tensor(9)], ids=str)
def test_numbers_of_nodes_and_flows_that_are_none(nodes: Any) -> None:
    edges = random_graph(9, 9, 30)
    with pytest.raises(ValueError, match="num_nodes: got"):
        Graph(edges, nodes)
    with pytest.raises(ValueError, match="flow: got 'x', expected 'source_to_target' or"):
        Graph(edges, 9, flow="x")
    assert Graph(edges, numpy.int64(9)).num_dst == 9


def test_nothing_is_kept_by_where_a_tensor_lies() -> None:
    """Edges changed in place are another graph, as they are for PyG."""
    layer, plain = (
        MoEConv("gcn", 4, 4, num_experts=1, router=None, shared_expert=False).double(),
        GCNConv(4, 4).double(),
    )
    plain.load_state_dict(layer.expert(0).state_dict())
    x, edges, routing = features(9, 4), random_graph(9, 9, 30), routing_of(torch.ones(9, 1).double())
    for _ in range(2):
        torch.testing.assert_close(layer(x, edges, routing=routing), plain(x, edges))
        edges.copy_(edges.flip(0).roll(1, dims=1))


def test_to_another_device_and_repr() -> None:
    graph = Graph(random_graph(6, 4, 15), (6, 4), edge_weight=features(15), edge_attr=features(15, 2))
    moved = graph.to("meta")
    assert (moved.num_src, moved.num_dst, moved.num_edges) == (6, 4, 15)
    assert moved.edge_weight is not None
    assert moved.edge_weight.device.type == moved.adj.device.type == "meta"
    assert repr(graph) == "Graph(6 sources, 4 destinations, 15 edges)"


PLAIN = [[0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("edges", "sizes", "kwargs", "message"),
    [
        ([[0, 9], [1, 0]], 9, {}, r"edge_index: got node 9, expected values in 0\.\.8"),
        ([[0, 1], [1, 12]], 9, {}, r"edge_index: got node 12, expected values in 0\.\.8"),
        ([[0, -1], [1, 0]], 9, {}, r"edge_index: got node -1, expected values in 0\.\.8"),
        ([[8], [3]], (9, 3), {}, r"edge_index: got node 3, expected values in 0\.\.2"),
        ([[8], [2]], (9, 3), {"flow": "target_to_source"}, r"edge_index: got node 8, expected values in 0\.\.2"),
        ([[0, 1, 2]], 9, {}, r"edge_index: got shape \(1, 3\), expected \(2, number of edges\)"),
        ([[0.0, 1.0], [1.0, 0.0]], 9, {}, "edge_index: got torch.float32, expected integers"),
        ([[True], [False]], 9, {}, "edge_index: got torch.bool, expected integers"),
        (
            PLAIN,
            9,
            {"edge_weight": torch.ones(3)},
            r"edge_weight: got shape \(3,\), expected a row for each of 2 edges",
        ),
        (
            PLAIN,
            9,
            {"edge_attr": torch.ones(1, 2)},
            r"edge_attr: got shape \(1, 2\), expected a row for each of 2 edges",
        ),
    ],
)
def test_refusals(edges: Any, sizes: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Graph(torch.tensor(edges), sizes, **kwargs)


def test_refusals_of_other_forms() -> None:
    for wrong in (None, [[0], [1]], "edges"):
        with pytest.raises(ValueError, match=f"edge_index: got {type(wrong).__name__}, expected"):
            Graph(wrong, 3)
    edges = simple_graph(9, 9)
    with pytest.raises(ValueError, match=r"edge_index: got a sparse matrix of shape \(9, 9\), expected .* \(8, 9\)"):
        Graph(csr(edges, (9, 9)), (9, 8))
    with pytest.raises(ValueError, match="edge_index: got an EdgeIndex of 9 first nodes, expected 10"):
        Graph(EdgeIndex(edges, sparse_size=(9, 9)), 10)
    graph = Graph(edges, 9)
    with pytest.raises(ValueError, match="edge_attr: got shape"):
        graph.with_args(None, torch.ones(2, 1))
    x = features(8, 4)
    with pytest.raises(ValueError, match=r"edge_index: got Graph.* expected 8 sources and 8 destinations"):
        MoEConv("gcn", 4, 4, num_experts=2, shared_expert=False).double()(x, graph)
    with pytest.raises(ValueError, match="edge_weight: got a tensor beside a sparse matrix"):
        MoEConv("gcn", 4, 4, num_experts=2, shared_expert=False).double()(
            features(9, 4), csr(edges, (9, 9)), edge_weight=torch.ones(edges.size(1))
        )


@pytest.mark.parametrize("before", [torch.no_grad, torch.inference_mode, None], ids=["no_grad", "inference", "frozen"])
@pytest.mark.parametrize(
    ("conv", "name", "kwargs"),
    [
        ("gcn", "edge_weight", {}),
        ("graph", "edge_weight", {}),
        ("filter", "edge_weight", {}),
        ("two_hop", "edge_weight", {}),
        ("gat", "edge_attr", {"edge_dim": 1}),
        ("gatv2", "edge_attr", {"edge_dim": 1}),
        ("transformer", "edge_attr", {"edge_dim": 1}),
        ("gine", "edge_attr", {}),
    ],
)
@pytest.mark.parametrize("form", ["edges", "csr"])
def test_learned_edge_arguments_keep_their_gradient(
    conv: str, name: str, kwargs: dict[str, Any], form: str, before: Any
) -> None:
    """Also after an evaluation without gradients, and where they are learned only from then on."""
    edges, x = random_graph(9, 9, 30).unique(dim=1), features(9, 4)
    value = features(edges.size(1), seed=1).abs()
    value = value if name == "edge_weight" else value[:, None].expand(-1, 4 if conv == "gine" else 1).clone()
    if form == "csr" and (name == "edge_attr" or conv in ("filter", "two_hop")):
        pytest.skip("a matrix of torch has no rows of features")
    layer = MoEConv(conv, 4, 4, num_experts=2, shared_expert=False, **kwargs).double().eval()

    def graph_of(value: Tensor) -> Graph:
        if form == "edges":
            return Graph(edges, 9, edge_weight=value) if name == "edge_weight" else Graph(edges, 9, edge_attr=value)
        return Graph(torch.sparse_coo_tensor(edges.flip(0), value, (9, 9)), 9)

    fresh = value.clone().requires_grad_()
    layer(x, graph_of(fresh)).square().sum().backward()
    learned = value.clone()
    if before is None:
        graph = graph_of(learned)
        layer(x, graph)
        if form == "csr":
            pytest.skip("the values are a copy")
        learned.requires_grad_()
    else:
        graph = graph_of(learned.requires_grad_())
        with before():
            layer(x, graph)
    layer(x, graph).square().sum().backward()
    torch.testing.assert_close(learned.grad, fresh.grad, rtol=0, atol=1e-12)


def test_a_graph_turned_in_inference_mode_trains() -> None:
    layer = MoEConv("gin", 4, 4, num_experts=2, aggr="max", flow="target_to_source").double()
    graph, x = Graph(random_graph(9, 9, 30), 9), features(9, 4)
    with torch.inference_mode():
        layer(x, graph)
    layer(x, graph).sum().backward()
