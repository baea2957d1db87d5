"""The graph object: order, parts, flow, loops, normalization, what it keeps; and the sums along its edges."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torch_geometric.nn import GCNConv

from gmoe import GNNMoE, Graph, MoEConv, count_flops
from gmoe.conv import graph as graph_module
from gmoe.conv.attention import Messages
from gmoe.conv.graph import Edges, _WeightedSum, blocks, dot, weighted_sum
from tests.gmoe.conv.masked import csr, features, mean_of_in_edges, random_graph, routing_of, simple_graph

HEADS, WIDTH = 2, 3


def edges_of(pairs: list[tuple[int, int]], num_senders: int, num_receivers: int) -> Edges:
    """Of (receiver, sender) pairs."""
    receiver, sender = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T
    return Edges.sorted(sender, receiver, num_senders, num_receivers)


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
        edges = Edges.sorted(sender, given, max(len(values), 1), 10)
    expected = receiver.sort(stable=True)
    assert torch.equal(edges.receiver, expected.values)
    assert torch.equal(edges.order, expected.indices)
    assert torch.equal(edges.sender, expected.indices)
    assert edges.degree.tolist() == receiver.bincount(minlength=10).tolist()
    assert receiver.tolist() == values


def test_edges_are_sorted_whatever_the_default_device_and_the_type_of_the_counts() -> None:
    edges = random_graph(6, 6, 15)
    with torch.device("meta"):
        degree = Graph(edges, numpy.int64(6)).edges.degree
    assert degree.tolist() == edges[1].bincount(minlength=6).tolist()
    assert torch.func.grad(lambda x: (x * Graph(edges, 6).edges.degree).sum())(features(6)).tolist() == degree.tolist()


@settings(max_examples=50, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("devices", [("cpu",), ()], ids=["sparse", "blocks"])
@pytest.mark.parametrize(("fast", "slow"), [(weighted_sum, slow_sum), (dot, slow_dot)])
def test_sums_equal_a_row_for_each_message(
    fast: Callable[..., Tensor], slow: Callable[..., Tensor], devices: Any, data: st.DataObject
) -> None:
    """Parallel and missing edges, and more edges than the matrix has cells."""
    senders, receivers = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    pair = st.tuples(st.integers(0, receivers - 1), st.integers(0, senders - 1))
    edges = edges_of(data.draw(st.lists(pair, max_size=12)), senders, receivers)
    first, second = (v.requires_grad_() for v in operands(fast, edges, data.draw(st.booleans())))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_module, "SPARSE_DEVICES", devices)
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


def test_messages_are_the_in_edges_of_the_pairs() -> None:
    """K messages an edge, and a row for each (expert, source) that has one."""
    edges, weight_TE = torch.tensor([[0, 2, 4, 2, 2, 1], [1, 3, 5, 5, 1, 0]]), torch.zeros(6, 3)
    weight_TE[1, 0] = weight_TE[3, 2] = weight_TE[5, 2] = 1.0
    found = Messages(Graph(edges, 6), routing_of(weight_TE))
    assert found.graph.edges.order[found.edge].tolist() == [0, 4, 1, 2, 3]
    assert found.pair.tolist() == [0, 0, 1, 2, 2]
    assert found.source.tolist() == [0, 2, 2, 4, 2]
    assert found.ptr.tolist() == [0, 2, 3, 5]
    assert found.offsets.tolist() == [2, 2, 5]
    assert (found.row_expert.tolist(), found.row_source.tolist()) == ([0, 0, 2, 2], [0, 2, 2, 4])
    assert found.row_offsets.tolist() == [2, 2, 4]
    assert found.from_rows.sender.tolist() == [0, 1, 2, 3, 2]


def test_the_edges_of_a_graph_and_of_some_of_its_nodes() -> None:
    edge_index, attr = torch.tensor([[3, 0, 1, 2, 0], [1, 2, 1, 0, 1]]), features(5, 2)
    for flow, given_edges in (("source_to_target", edge_index), ("target_to_source", edge_index.flip(0))):
        graph = Graph(given_edges, 4, edge_attr=attr, flow=flow)
        edges, back = graph.edges, graph.edges.transpose
        assert (edges.order.tolist(), edges.ptr.tolist()) == ([3, 0, 2, 4, 1], [0, 1, 4, 5, 5])  # stable
        assert torch.equal(graph.attr, attr[edges.order])  # type: ignore[arg-type]
        assert back.receiver.tolist() == [0, 0, 1, 2, 3]
        assert torch.equal(back.sender, edges.receiver[back.order])
        edge, position = edges.of(torch.tensor([3, 1, 0]))
        assert (edges.order[edge].tolist(), position.tolist()) == ([0, 2, 4, 3], [1, 1, 1, 2])
        nodes, part = graph.part(torch.tensor([2, 1]))
        assert nodes.tolist() == [2, 1, 0, 3]
        assert (part.num_src, part.num_rows, part.num_dst) == (4, 4, 2)
        assert part.edge_index.tolist() == [[2, 3, 1, 2], [0, 1, 1, 1]]
        assert torch.equal(part.edge_attr, attr[[1, 0, 2, 4]])  # type: ignore[arg-type]
        assert torch.equal(part.adj, part.edge_index if given_edges is edge_index else part.edge_index.flip(0))
        _, part = graph.part(torch.tensor([3]))  # never without an edge, where the graph has some
        assert (part.num_dst, part.num_edges, len(part.edges.sender)) == (1, 1, 0)


def test_the_other_flow() -> None:
    edges, x = random_graph(9, 9, 30), features(9, 4)
    turned = Graph(edges, 9, flow="target_to_source")
    assert torch.equal(turned.edge_index, edges.flip(0))
    assert torch.equal(turned.mean(x), Graph(edges.flip(0), 9).mean(x))
    layer = MoEConv("gcn", 4, 4, num_experts=2, flow="target_to_source").double()
    assert torch.equal(layer(x, turned), layer(x, edges))
    for flow, graph in (("source_to_target", turned), ("target_to_source", Graph(edges, 9))):
        with pytest.raises(ValueError, match=r"edge_index: got Graph.* of flow"):
            MoEConv("gcn", 4, 4, num_experts=2, flow=flow).double()(x, graph)
    with pytest.raises(ValueError, match=r"edge_index: got a sparse matrix .* for flow='target_to_source'"):
        Graph(csr(edges.unique(dim=1), (9, 9)), 9, flow="target_to_source")


# what is computed once


def watched(patch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """The arguments of each call of a static method, from now on."""
    calls, plain = list[Any](), getattr(owner, name)

    def call(*args: Any) -> Any:
        calls.append(args)
        return plain(*args)

    patch.setattr(owner, name, staticmethod(call))
    return calls


def test_what_is_kept_is_of_these_edge_arguments() -> None:
    edges, weight = random_graph(6, 6, 15), features(15).abs()
    graph = Graph(edges, 6)

    def entries(graph: Graph, improved: bool = False, dtype: torch.dtype = torch.float64) -> Tensor:
        return graph.normalized(improved=improved, loops=True, dtype=dtype).weight

    kept, other = entries(graph), graph.with_args(weight, None)
    assert other.edges is graph.edges  # the order is shared
    torch.testing.assert_close(entries(other), entries(Graph(edges, 6, edge_weight=weight)))
    assert not torch.equal(entries(other, improved=True), entries(other))
    assert entries(graph) is kept
    assert graph.with_args(None, None) is graph
    assert entries(graph, dtype=torch.float32).dtype == torch.float32
    learned = graph.with_args(weight.clone().requires_grad_(), None)
    for _ in range(2):  # a second backward pass needs a graph of its own
        entries(learned).sum().backward()


@pytest.mark.parametrize("kind", ["gcn", "sage", "graph", "gin", "filter"])
def test_sums_of_the_features_that_the_graph_was_given_are_computed_once(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the router and for the first layer, whose output is the same without it."""
    options: dict[str, Any] = {"shared_router": True, "router_input": ("node", "neighbors"), "num_layers": 3}
    x, edges = features(9, 9), random_graph(9, 9, 30)
    model, graph = GNNMoE(9, 4, 3, conv=kind, router="uniform", **options).double(), Graph(edges, 9, x=x)
    with torch.inference_mode():
        expected = model(x, edges)
        torch.testing.assert_close(model(x, graph), expected)
    calls = watched(monkeypatch, _WeightedSum, "forward")
    model(x, graph).sum().backward()  # trains on what was computed in inference mode
    wide = [value for _, _, value, _ in calls if value.size(2) == 9]
    assert not wide
    model(x.clone(), graph)  # another tensor
    assert [value for _, _, value, _ in calls if value.size(2) == 9]


def test_sums_of_features_are_kept_only_where_they_are_constant() -> None:
    edges, x = random_graph(6, 6, 15), features(6, 2)
    graph = Graph(edges, 6, x=x)
    first = graph.mean(x)
    assert graph.mean(x) is first
    assert graph.mean(x.clone()) is not first
    x.add_(1)  # in place
    torch.testing.assert_close(graph.mean(x), mean_of_in_edges(x, edges))
    x.requires_grad_()
    for _ in range(2):
        graph.mean(x).sum().backward()
    assert x.grad is not None
    learned = Graph(edges, 6, x=features(6, 2), edge_weight=features(15).requires_grad_())
    for _ in range(2):
        matrix = learned.summing(by="weight", mean=False, dtype=torch.float64)
        learned.product(matrix, learned.x).sum().backward()  # type: ignore[arg-type]
    assert learned.edge_weight.grad is not None  # type: ignore[union-attr]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda graph: pickle.loads(pickle.dumps(graph))])
def test_a_graph_that_keeps_sums_can_be_copied(copied: Callable[[Graph], Graph]) -> None:
    x = features(6, 2)
    graph = Graph(random_graph(6, 6, 15), 6, x=x)
    graph.mean(x)
    other = copied(graph)
    for given_x in (x, 2 * x):
        assert torch.equal(other.mean(given_x), graph.mean(given_x))


def test_flops_are_those_of_a_first_call() -> None:
    model, x = GNNMoE(6, 4, 3, conv="sage", router_input=("node", "neighbors"), shared_router=True), torch.randn(9, 6)
    graph = Graph(random_graph(9, 9, 30), 9, x=x)
    first = count_flops(model, x, graph)
    model(x, graph)
    assert count_flops(model, x, graph) == first


@pytest.mark.parametrize(("conv", "name", "width"), [("gcn", "edge_weight", ()), ("gat", "edge_attr", (2,))])
def test_edge_arguments_may_be_learned_later(conv: str, name: str, width: tuple[int, ...]) -> None:
    edges, x, frozen = random_graph(9, 9, 30), features(9, 4), features(30, *width, seed=1).abs()
    options: dict[str, Any] = {"edge_dim": 2} if width else {}
    layer = MoEConv(conv, 4, 4, num_experts=2, **options).double().eval()
    fresh, graph = frozen.clone().requires_grad_(), Graph(edges, 9, **{name: frozen})  # type: ignore[arg-type]
    layer(x, graph)
    frozen.requires_grad_()
    for given_edges in (graph, Graph(edges, 9, **{name: fresh})):  # type: ignore[arg-type]
        layer(x, given_edges).square().sum().backward()
    torch.testing.assert_close(frozen.grad, fresh.grad, rtol=0, atol=1e-12)


def test_nothing_is_kept_by_where_a_tensor_lies() -> None:
    """Edges changed in place are another graph, as they are for PyG."""
    layer = MoEConv("gcn", 4, 4, num_experts=1, router=None, shared_expert=False).double()
    plain = GCNConv(4, 4).double()
    plain.load_state_dict(layer.expert(0).state_dict())
    x, edges, routing = features(9, 4), random_graph(9, 9, 30), routing_of(torch.ones(9, 1).double())
    for _ in range(2):
        torch.testing.assert_close(layer(x, edges, routing=routing), plain(x, edges))
        edges.copy_(edges.flip(0).roll(1, dims=1))


def test_to_another_device_and_repr() -> None:
    graph = Graph(random_graph(6, 4, 15), (6, 4), edge_weight=features(15), edge_attr=features(15, 2))
    moved = graph.to("meta")
    assert repr(moved) == repr(graph) == "Graph(6 sources, 4 destinations, 15 edges)"
    assert moved.edge_weight is not None
    assert moved.edge_weight.device.type == moved.adj.device.type == moved.edges.order.device.type == "meta"


# refusals

PLAIN = torch.tensor([[0, 1], [1, 0]])


@pytest.mark.parametrize(
    ("edges", "sizes", "kwargs", "message"),
    [
        (torch.tensor([[0, 1], [1, 12]]), 9, {}, r"edge_index: got nodes 1\.\.12, expected values in 0\.\.8"),
        (torch.tensor([[0, -1], [1, 0]]), 9, {}, "edge_index: got nodes -1"),
        (torch.tensor([[8], [3]]), (9, 3), {}, r"edge_index: got nodes 3\.\.3, expected values in 0\.\.2"),
        (torch.tensor([[8], [2]]), (9, 3), {"flow": "target_to_source"}, "edge_index: got nodes 8"),
        (torch.tensor([[0, 1, 2]]), 9, {}, r"edge_index: got shape \(1, 3\)"),
        (torch.tensor([[0.0, 1.0], [1.0, 0.0]]), 9, {}, r"edge_index: got .* of torch.float32"),
        (torch.tensor([[True], [False]]), 9, {}, r"edge_index: got .* of torch.bool"),
        (PLAIN, 9, {"edge_weight": torch.ones(3)}, r"edge_weight: got shape \(3,\)"),
        (PLAIN, 9, {"edge_weight": torch.ones(2, 2)}, r"edge_weight: got shape \(2, 2\)"),
        (PLAIN, 9, {"edge_weight": [1.0, 1.0]}, "edge_weight: got list"),
        (PLAIN, 9, {"edge_attr": torch.ones(1, 2)}, r"edge_attr: got shape \(1, 2\)"),
        (PLAIN, 9, {"flow": "x"}, "flow: got 'x'"),
        *((PLAIN, nodes, {}, "num_nodes: got") for nodes in (None, 9.0, "9", (9,), torch.tensor(9))),
        *((wrong, 3, {}, "edge_index: got") for wrong in (None, [[0], [1]], "edges")),
        (csr(PLAIN, (9, 9)), (9, 8), {}, r"edge_index: got a sparse matrix of shape \(9, 9\)"),
        (csr(PLAIN, (9, 9)), 9, {"edge_weight": torch.ones(2)}, r"edge_weight: got a tensor, .* a sparse matrix"),
    ],
)
def test_refusals(edges: Any, sizes: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Graph(edges, sizes, **kwargs)


def test_refusals_of_what_does_not_fit_a_graph() -> None:
    graph = Graph(simple_graph(9, 9), 9)
    with pytest.raises(ValueError, match="edge_attr: got shape"):
        graph.with_args(None, torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"edge_index: got Graph.* expected 8 sources, 8 destinations"):
        MoEConv("gcn", 4, 4, num_experts=2).double()(features(8, 4), graph)


def test_a_sum_that_a_caller_changed_is_computed_anew() -> None:
    x, edges = features(9, 4), random_graph(9, 9, 30)
    graph = Graph(edges, 9, x=x)
    expected = graph.mean(x).clone()
    graph.mean(x).add_(1.0)
    torch.testing.assert_close(graph.mean(x), expected)


def test_features_made_in_inference_mode_are_summed_anew() -> None:
    with torch.inference_mode():
        x = features(9, 4)
    edges = random_graph(9, 9, 30)
    torch.testing.assert_close(Graph(edges, 9, x=x).mean(x), Graph(edges, 9).mean(x))
