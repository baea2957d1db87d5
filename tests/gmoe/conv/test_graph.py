"""The graph object: forms, flow, what it computes once and for which call, and what it refuses.

Its order, loops, norms, parts and sums are compared in ``tests/compose``.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch_geometric.nn import GCNConv

from gmoe import GNNMoE, Graph, MoEConv, count_flops
from gmoe.conv import matrix
from gmoe.edges import Edges
from gmoe.sums import _WeightedSum
from tests.helpers.masked import features, mean_of_in_edges, random_graph
from tests.helpers.one_process import one_process

EDGES = random_graph(9, 9, 30)


def test_to_another_device_and_repr() -> None:
    graph = Graph(
        random_graph(6, 4, 15), (6, 4), edge_weight=features(15), edge_attr=features(15, 2)
    )
    moved: Any = graph.to("meta")
    assert repr(moved) == repr(graph) == "Graph(6 sources, 4 destinations, 15 edges)"
    assert (
        moved.edge_weight.device.type
        == moved.adj.device.type
        == moved.edges.order.device.type
        == "meta"
    )


def watched(patch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """The arguments of each call of a static method, from now on."""
    calls, plain = list[Any](), getattr(owner, name)

    def call(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return plain(*args, **options)

    patch.setattr(owner, name, staticmethod(call))
    return calls


@pytest.mark.parametrize("shared_router", [False, True])
def test_a_forward_sorts_edges_once_a_graph_never_again(
    shared_router: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, graph = features(9, 4), Graph(EDGES, 9)
    gnn = GNNMoE(4, 6, 3, 6, shared_router=shared_router).double()
    calls = watched(monkeypatch, Edges, "sorted")
    gnn(x, EDGES)
    assert not calls  # they are few
    monkeypatch.setattr(matrix, "FEW_NUMBERS", 0)
    gnn(x, EDGES)
    assert len(calls) == 1
    for _ in range(2):  # with loops, and the transpose, each once
        gnn(x, graph).sum().backward()
    assert len(calls) == 3


@pytest.mark.parametrize("kind", ["gcn", "sage", "graph", "gin"])
def test_sums_of_the_features_of_the_graph_are_computed_once(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the router and the first layer, whose output is the same without it."""
    x = features(9, 9)
    options: dict[str, Any] = {"shared_router": True, "router_input": ("node", "neighbors")}
    model, graph = (
        GNNMoE(9, 4, 3, conv=kind, router="uniform", **options).double(),
        Graph(EDGES, 9, x=x),
    )
    with torch.inference_mode():
        torch.testing.assert_close(model(x, graph), model(x, EDGES))
    calls = watched(monkeypatch, _WeightedSum, "forward")
    model(x, graph).sum().backward()  # trains on what was computed in inference mode
    assert not [value for _, _, value, _ in calls if value.size(2) == 9]
    model(x.clone(), graph)  # another tensor
    assert [value for _, _, value, _ in calls if value.size(2) == 9]


def test_flops_are_those_of_a_first_call() -> None:
    model, x = GNNMoE(4, 4, 3, conv="sage", router_input="neighbors"), torch.randn(9, 4)
    graph = Graph(EDGES, 9, x=x)
    first = count_flops(model, x, graph)
    model(x, graph)
    assert count_flops(model, x, graph) == first


def test_sums_of_the_features_are_those_of_the_graph_that_has_them() -> None:
    x = features(9, 2)
    graph = Graph(EDGES, 9, x=x)
    found = graph.mean(x)
    assert graph.mean(x) is found
    other = graph.with_x(2 * x)
    assert other.x is not None
    torch.testing.assert_close(other.mean(other.x), 2 * found)
    assert other.edges is graph.edges
    assert graph.mean(x) is found
    bare = graph.with_x(None)
    assert bare.mean(x) is not bare.mean(x)


def test_sums_of_features_made_in_inference_mode_are_for_training_too() -> None:
    with torch.inference_mode():
        x = features(9, 4)
        graph = Graph(EDGES, 9, x=x)
        found = graph.mean(x)
    assert graph.mean(x) is found
    assert not found.is_inference()
    torch.testing.assert_close(found, mean_of_in_edges(x, EDGES))


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda graph: pickle.loads(pickle.dumps(graph))]
)
def test_a_graph_that_keeps_sums_can_be_copied(copied: Callable[[Graph], Graph]) -> None:
    x = features(9, 2)
    graph = Graph(EDGES, 9, x=x, edge_weight=features(30).abs())
    layer = MoEConv("gcn", 2, 4, num_experts=2).double().eval()
    layer(x, graph)
    twin = copied(graph)
    assert twin.x is not None
    assert twin.edge_weight is not None
    for given in (x, twin.x, 2 * x):
        assert torch.equal(layer(given, twin), layer(given, graph))
    turned = twin.with_weights(twin.edge_weight.flip(0))
    expected = layer(x, EDGES, features(30).abs().flip(0))
    torch.testing.assert_close(layer(twin.x, turned), expected)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_a_fully_sharded_layer_takes_a_graph_as_it_is(tmp_path: Path) -> None:
    """FSDP casts the tensors among the arguments; those of a graph it leaves alone."""
    x = features(9, 4).float()
    graph = Graph(EDGES, 9, x=x, edge_weight=features(30).abs().float())
    layer = MoEConv("gcn", 4, 4, num_experts=2)
    layer(x, graph)
    with one_process(tmp_path):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        mesh = init_device_mesh("cpu", (1,))
        sharded: Any = fully_shard(copy.deepcopy(layer), mesh=mesh, mp_policy=policy)
        found = sharded(x, graph)
    torch.testing.assert_close(found, layer.bfloat16()(x.bfloat16(), graph))
    assert graph.x is x


def test_fake_tensors_leave_nothing_in_a_graph() -> None:
    """A graph that a shape was asked of computes what a new one does."""
    layer = MoEConv("gcn", 4, 4, num_experts=2)
    x = features(9, 4).float()
    graph = Graph(EDGES, 9, x=x)
    with FakeTensorMode(allow_non_fake_inputs=True):
        graph.mean(x)
        graph.normalized(improved=False, loops=True, dtype=x.dtype)
    torch.testing.assert_close(layer(x, graph), layer(x, EDGES))


@pytest.mark.parametrize(
    ("conv", "name", "width"), [("gcn", "edge_weight", ()), ("gat", "edge_attr", (2,))]
)
def test_edge_arguments_may_be_others_or_learned_later(
    conv: str, name: str, width: tuple[int, ...]
) -> None:
    x, frozen, options = (
        features(9, 4),
        features(30, *width, seed=1).abs(),
        {"edge_dim": 2} if width else {},
    )
    layer: Any = MoEConv(conv, 4, 4, num_experts=2, **options).double().eval()  # type: ignore[arg-type]
    fresh, graph = frozen.clone().requires_grad_(), Graph(EDGES, 9, **{name: frozen})  # type: ignore[arg-type]
    layer(x, graph)
    doubled: Any = {name: 2 * frozen}
    torch.testing.assert_close(layer(x, graph, **doubled), layer(x, EDGES, **doubled))
    frozen.requires_grad_()
    layer(x, graph).square().sum().backward()
    layer(x, EDGES, **{name: fresh}).square().sum().backward()
    torch.testing.assert_close(frozen.grad, fresh.grad, rtol=0, atol=1e-12)


def test_plain_edges_may_be_changed_in_place() -> None:
    layer, x, edges = MoEConv("gcn", 4, 4).double().eval(), features(9, 4), EDGES.clone()
    layer(x, edges)
    edges.copy_(edges.flip(0).roll(1, dims=1))
    assert torch.equal(layer(x, edges), layer(x, edges.clone()))


PLAIN = torch.tensor([[0, 1], [1, 0]])


@pytest.mark.parametrize("nodes", [None, 9.0, (9,)])
def test_a_number_of_nodes_has_to_be_whole(nodes: Any) -> None:
    with pytest.raises(ValueError, match=r"^num_nodes: got .*, expected a whole number"):
        Graph(PLAIN, nodes)


def test_an_unknown_flow_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^flow: got 'x', expected one of 'source_to_target'"):
        Graph(PLAIN, 9, flow="x")


def derived_graphs() -> list[Graph]:
    """One graph, and all that are made of it."""
    graph = Graph(EDGES, 9, x=features(9, 4), edge_weight=features(30).abs())
    conv: Any = GCNConv(2, 2)
    conv._edge_mask = features(30)
    return [
        graph,
        graph.with_weights(features(30, seed=1).abs()),
        graph.with_x(None),
        graph.with_loops(fill_value="mean"),
        graph.part(torch.tensor([3, 0]))[1],
        graph.explained(conv),
        graph.to("meta"),
        graph.first(9, 12),
        pickle.loads(pickle.dumps(graph)),
    ]


def test_a_graph_is_frozen_and_so_is_what_is_made_of_it() -> None:
    for graph in derived_graphs():
        before = dict(vars(graph))
        for name in (*before, "another"):
            with pytest.raises(AttributeError, match=rf"^{name}: got an assignment.* with_x and"):
                setattr(graph, name, None)
        assert vars(graph).keys() == before.keys()
        assert all(value is before[name] for name, value in vars(graph).items())


def test_graphs_do_not_share_what_follows_from_their_values() -> None:
    """An explainer's mask, other weights, loops of other features: each graph keeps its own."""
    attr = features(30, 2)
    graph = Graph(EDGES, 9, x=features(9, 4), edge_weight=features(30).abs(), edge_attr=attr)
    conv: Any = GCNConv(2, 2)
    conv._edge_mask = features(30, seed=3)
    norm: dict[str, Any] = {"improved": False, "loops": True, "dtype": torch.double}
    looped = graph.with_loops(fill_value="mean")
    assert graph.with_loops(fill_value="mean") is looped
    assert graph.normalized(**norm) is graph.normalized(**norm)
    explained = graph.explained(conv).with_loops(fill_value="mean")
    assert explained.mask is not None
    assert looped.mask is None
    assert graph.with_loops(fill_value="mean") is looped
    weight = features(30, seed=1).abs()
    expected = Graph(EDGES, 9, edge_weight=weight).normalized(**norm)
    found = graph.with_weights(weight).normalized(**norm)
    assert torch.equal(found.entries[1], expected.entries[1])
    other = graph.with_weights(edge_attr=2 * attr).with_loops(fill_value="mean")
    assert torch.equal(other.edge_attr, 2 * looped.edge_attr)  # type: ignore[operator, arg-type]


def test_graphs_share_the_order_the_transpose_and_the_loops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = features(9, 4).requires_grad_()
    graph = Graph(EDGES, 9)
    layer = MoEConv("gat", 4, 4, num_experts=2, edge_dim=2).double()
    calls = watched(monkeypatch, Edges, "sorted")
    for seed in range(3):
        layer(x, graph, edge_attr=features(30, 2, seed=seed)).sum().backward()
    assert len(calls) == 2  # with loops, and the transpose: all experts run on all nodes
    assert graph.with_weights(features(30)).adjacency.looped is graph.adjacency.looped


def test_a_graph_that_does_not_fit_the_layer_is_refused() -> None:
    flow: Any = "target_to_source"
    layer, turned, x = (
        MoEConv("gcn", 4, 4).double(),
        MoEConv("gcn", 4, 4, flow=flow).double(),
        features(8, 4),
    )
    given: list[tuple[MoEConv, Graph, Tensor | None, str]] = [
        (
            layer,
            Graph(PLAIN, 9),
            None,
            r"edge_index: got Graph.* expected 8 sources, 8 destinations",
        ),
        (layer, Graph(PLAIN, 8), features(3), "edge_weight: got shape"),
        (
            layer,
            Graph(PLAIN, 8, flow=flow),
            None,
            r"edge_index: got Graph.* of flow 'target_to_source'",
        ),
        (turned, Graph(PLAIN, 8), None, r"edge_index: got Graph.* of flow 'source_to_target'"),
    ]
    for one, graph, weight, message in given:
        with pytest.raises(ValueError, match=message):
            one(x, graph, edge_weight=weight)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["x", "edge_weight", "edge_attr"])
def test_nothing_is_kept_that_follows_from_what_learns(name: str, mode: Any) -> None:
    """Whatever the mode of the first call; a fused optimizer leaves no trace in a tensor."""
    conv: Any = "gat" if name == "edge_attr" else "gcn"
    options: Any = {"edge_dim": 2} if name == "edge_attr" else {}
    layer = MoEConv(conv, 4, 4, num_experts=2, **options)
    x, args = torch.randn(6, 4), {"edge_weight": torch.rand(20) + 1, "edge_attr": torch.rand(20, 2)}
    args = {one: value for one, value in args.items() if one == name}
    value = {"x": x, **args}[name].requires_grad_()
    edge_index = random_graph(6, 6, 20)
    graph = Graph(edge_index, 6, x=x, **args)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam([value], lr=0.1, fused=True)
    with mode():
        layer(x, graph)
    layer(x, graph).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(layer(x, graph), layer(x, edge_index, **args))


@pytest.mark.parametrize("name", ["x", "edge_weight"])
def test_sums_of_what_learned_for_a_while_are_forgotten(name: str) -> None:
    layer = MoEConv("gcn", 4, 4, num_experts=2)
    edge_index = random_graph(6, 6, 20)
    given: dict[str, Any] = {"x": torch.randn(6, 4), "edge_weight": torch.rand(20) + 1}
    if name == "x":
        del given["edge_weight"]
    graph = Graph(edge_index, 6, **given)
    x = given.pop("x")
    layer(x, graph)  # keeps what follows from them as they are
    value = given.get(name, x).requires_grad_()
    optimizer = torch.optim.Adam([value], lr=0.1, fused=True)
    layer(x, graph).square().sum().backward()
    optimizer.step()
    value.requires_grad_(False)
    torch.testing.assert_close(layer(x, graph), layer(x, edge_index, **given))


@pytest.mark.parametrize("name", ["edge_weight", "edge_attr"])
def test_other_edge_arguments_have_to_fit(name: str) -> None:
    graph: Any = Graph(random_graph(6, 6, 20), 6)
    with pytest.raises(ValueError, match=rf"^{name}: got shape \(21,\)"):
        graph.with_weights(**{name: torch.rand(21)})
    matrix = torch.sparse_csr_tensor(torch.tensor([0, 1, 2]), torch.tensor([1, 0]), torch.ones(2))
    with pytest.raises(ValueError, match=r"^edge_weight: got a tensor, expected None"):
        Graph(matrix, 2).with_weights(torch.rand(2))


def test_the_values_of_a_matrix_are_features_only_if_they_are_rows() -> None:
    ptr, column = torch.tensor([0, 1, 3]), torch.tensor([1, 0, 1])
    for values in (features(3), features(3, 2)):
        attr = Graph(torch.sparse_csr_tensor(ptr, column, values, size=(2, 2)), 2).attr
        assert (attr is not None) == (values.dim() > 1)
        assert attr is None or torch.equal(attr, values)


def test_a_part_without_in_edges_has_the_loops_of_its_nodes() -> None:
    """Its one edge, of a destination that is not asked for, is none of its messages."""
    graph = Graph(torch.tensor([[0, 1], [1, 2]]), 4, edge_attr=torch.ones(2, 3))
    _, part = graph.part(torch.tensor([3]))
    looped = part.with_loops(fill_value=2.0)
    assert looped.edge_index.tolist() == [[0], [0]]
    assert looped.edge_attr is not None
    assert looped.edge_attr.tolist() == [[2.0] * 3]
