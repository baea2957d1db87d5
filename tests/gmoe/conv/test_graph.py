"""The graph object: forms, flow, what it computes once and for which call, and what it refuses.

Its order, loops, norms, parts and sums are compared in ``tests/compose.py``.
"""

from __future__ import annotations

import ast
import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch_geometric.nn import GCNConv

import gmoe
from gmoe import GNNMoE, Graph, MoEConv, count_flops
from gmoe.conv.edges import Edges
from gmoe.conv.sums import _WeightedSum
from tests.gmoe.conv.masked import features, mean_of_in_edges, random_graph

EDGES = random_graph(9, 9, 30)


def test_the_default_device_and_numpys_integers_do_not_matter() -> None:
    x = features(9, 4)
    with torch.device("meta"):
        graph = Graph(EDGES, numpy.int64(9))
        assert graph.edges.degree.tolist() == EDGES[1].bincount(minlength=9).tolist()
    torch.testing.assert_close(graph.mean(x), mean_of_in_edges(x, EDGES))


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
    gnn = GNNMoE(
        4, 6, 3, 6, shared_router=shared_router, router_input=("node", "neighbors")
    ).double()
    calls = watched(monkeypatch, Edges, "sorted")
    gnn(x, EDGES)
    assert len(calls) == 1
    for _ in range(2):  # the transpose, once
        gnn(x, graph).sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize("kind", ["gcn", "sage", "graph", "gin", "filter"])
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


@pytest.mark.parametrize(
    "change", [lambda x, _: x.add_(1), lambda _, y: y.add_(1)], ids=["features", "sums"]
)
def test_sums_are_kept_until_something_changes_in_place(change: Callable[..., Any]) -> None:
    x = features(9, 2)
    graph = Graph(EDGES, 9, x=x)
    found = graph.mean(x)
    assert graph.mean(x) is found
    change(x, found)
    torch.testing.assert_close(graph.mean(x), mean_of_in_edges(x, EDGES))


def test_features_made_in_inference_mode_are_summed_anew() -> None:
    with torch.inference_mode():
        x = features(9, 4)
    torch.testing.assert_close(Graph(EDGES, 9, x=x).mean(x), mean_of_in_edges(x, EDGES))


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda graph: pickle.loads(pickle.dumps(graph))]
)
def test_a_graph_that_keeps_sums_can_be_copied(copied: Callable[[Graph], Graph]) -> None:
    x = features(9, 2)
    graph = Graph(EDGES, 9, x=x)
    graph.mean(x)
    for given in (x, 2 * x):
        assert torch.equal(copied(graph).mean(given), graph.mean(given))


def test_threads_may_share_a_graph() -> None:
    x, layer, graph = features(9, 4), MoEConv("gcn", 4, 4).double().eval(), Graph(EDGES, 9)
    expected = layer(x, EDGES)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: layer(x, graph), range(12)):
            torch.testing.assert_close(found, expected)


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


GMOE = Path(gmoe.__file__).parent


def test_nobody_else_sets_the_attributes_of_a_graph() -> None:
    attributes = set(vars(Graph(PLAIN, 2))) | {"mask", "scale_of", "destinations"}
    written = [
        f"{path.relative_to(GMOE)}: {ast.unparse(node)}"
        for path in GMOE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        # Others set attributes of the same names on themselves.
        and node.value.id not in ("self", "ctx")
        and node.attr in attributes - {"flow"}  # a conv has a flow, too
    ]
    assert written == []


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


@pytest.mark.parametrize("name", ["x", "edge_weight"])
def test_sums_follow_what_is_set_anew(name: str) -> None:
    layer = MoEConv("gcn", 4, 4, num_experts=2)
    edge_index = random_graph(6, 6, 20)
    old: dict[str, Any] = {"x": torch.randn(6, 4), "edge_weight": torch.rand(20)}
    new = old | {name: torch.rand_like(old[name])}
    graph = Graph(edge_index, 6, **old)
    layer(old["x"], graph)
    setattr(graph, name, new[name])
    torch.testing.assert_close(
        layer(new["x"], graph), layer(new["x"], edge_index, new["edge_weight"])
    )


def test_sums_follow_a_weight_that_was_learned_and_frozen_again() -> None:
    layer = MoEConv("gcn", 4, 4, num_experts=2)
    edge_index, x, weight = random_graph(6, 6, 20), torch.randn(6, 4), torch.rand(20)
    graph = Graph(edge_index, 6, x=x, edge_weight=weight)
    layer(x, graph)  # keeps the norms of the weight as it is
    optimizer = torch.optim.SGD([weight.requires_grad_()], lr=1e-3)
    layer(x, graph).square().sum().backward()
    optimizer.step()
    weight.requires_grad_(False)
    torch.testing.assert_close(layer(x, graph), layer(x, edge_index, weight))


@pytest.mark.parametrize("name", ["x", "edge_weight"])
@pytest.mark.parametrize("fused", [False, True])
def test_sums_follow_what_an_optimizer_wrote(name: str, fused: bool) -> None:
    """A fused optimizer leaves no trace in a tensor's version."""
    layer = MoEConv("gcn", 4, 4, num_experts=2)
    edge_index = random_graph(6, 6, 20)
    given: dict[str, Any] = {"x": torch.randn(6, 4), "edge_weight": torch.rand(20)}
    graph = Graph(edge_index, 6, **given)
    layer(given["x"], graph)  # keeps what follows from them as they are
    optimizer = torch.optim.Adam([given[name].requires_grad_()], lr=1e-2, fused=fused)
    layer(given["x"], graph).square().sum().backward()
    optimizer.step()
    given[name].requires_grad_(False)
    torch.testing.assert_close(
        layer(given["x"], graph), layer(given["x"], edge_index, given["edge_weight"])
    )


def test_sums_follow_a_weight_of_inference_mode() -> None:
    layer = MoEConv("gcn", 4, 4, num_experts=2)
    edge_index, x = random_graph(6, 6, 20), torch.randn(6, 4)
    with torch.inference_mode():
        weight = torch.rand(20)
        graph = Graph(edge_index, 6, edge_weight=weight)
        layer(x, graph)
        weight.mul_(torch.rand(20))
        torch.testing.assert_close(layer(x, graph), layer(x, edge_index, weight))


def test_a_weight_that_is_set_anew_has_to_fit() -> None:
    graph = Graph(random_graph(6, 6, 20), 6)
    graph.edge_weight = torch.rand(21)
    with pytest.raises(ValueError, match=r"^edge_weight: got shape \(21,\)"):
        MoEConv("gcn", 4, 4, num_experts=2)(torch.randn(6, 4), graph)


@pytest.mark.parametrize("form", ["edges", "weights", "matrix", "matrix of ones"])
def test_improved_loops_weigh_what_they_weigh_in_pyg(form: str) -> None:
    """Two, but one in an edge list without weights."""
    edge_index, x = random_graph(6, 6, 12), features(6, 4).float()
    weight = torch.rand(edge_index.size(1)) + 0.5
    values = weight if form == "matrix" else torch.ones_like(weight)
    edges: Any = edge_index
    if "matrix" in form:
        edges = (
            torch.sparse_coo_tensor(edge_index.flip(0), values, (6, 6)).coalesce().to_sparse_csr()
        )
    args = (weight,) if form == "weights" else ()
    torch.manual_seed(0)
    dense = GCNConv(4, 3, improved=True)
    torch.manual_seed(0)
    layer = MoEConv("gcn", 4, 3, improved=True, num_experts=2, start="copies")
    torch.testing.assert_close(layer(x, edges, *args), dense(x, edges, *args))


def test_what_a_graph_is_made_with_has_to_fit() -> None:
    edge_index = random_graph(6, 6, 20)
    with pytest.raises(ValueError, match=r"^edge_weight: got shape \(21,"):
        Graph(edge_index, 6, edge_weight=torch.rand(21))
    with pytest.raises(ValueError, match=r"^edge_attr: got shape \(21, 2"):
        Graph(edge_index, 6, edge_attr=torch.rand(21, 2))


def test_the_first_edges_keep_their_weights_and_features() -> None:
    edge_index, weight, attr = random_graph(6, 6, 20), torch.rand(20), torch.randn(20, 2)
    first = Graph(edge_index, 6, edge_weight=weight, edge_attr=attr).first(6, 12)
    assert torch.equal(first.edge_index, edge_index[:, :12])
    assert first.edge_weight is not None
    assert torch.equal(first.edge_weight, weight[:12])
    assert first.edge_attr is not None
    assert torch.equal(first.edge_attr, attr[:12])
    bare = Graph(edge_index, 6).first(6, 12)
    assert bare.edge_weight is bare.edge_attr is None


def test_the_values_of_a_matrix_are_features_only_if_they_are_rows() -> None:
    ptr, column = torch.tensor([0, 1, 3]), torch.tensor([1, 0, 1])
    for values in (features(3), features(3, 2)):
        attr = Graph(torch.sparse_csr_tensor(ptr, column, values, size=(2, 2)), 2).attr
        assert (attr is not None) == (values.dim() > 1)
        assert attr is None or torch.equal(attr, values)


def test_a_part_without_edges_holds_one_for_convs_that_fail_without() -> None:
    """The edge ends in one destination more, of which the part has no output."""
    graph = Graph(torch.tensor([[0, 1], [1, 1]]), 4)
    nodes, part = graph.part(torch.tensor([3, 0]))
    assert part.edge_index.size(1) > 0
    assert part.num_dst == 2
    assert nodes[:2].tolist() == [3, 0]
    assert len(part.edges.sender) == 0


@pytest.mark.parametrize("mask", [None, torch.ones(29)], ids=["none", "of other edges"])
def test_an_explainer_without_a_factor_for_each_edge_is_refused(mask: Tensor | None) -> None:
    conv: Any = GCNConv(2, 2)
    conv._edge_mask = mask
    with pytest.raises(ValueError, match=r"^explain: got .* expected one of the 30 edges"):
        Graph(EDGES, 9).explained(conv)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_keeps_nothing_of_the_graph_it_was_made_from(how: str) -> None:
    """A copied tensor counts its versions anew, so that old and new ones may agree."""
    torch.manual_seed(0)
    edges, weight = random_graph(10, 10, 30), torch.rand(30)
    weight.mul_(2).add_(1)
    graph = Graph(edges, 10, edge_weight=weight)
    conv, x = MoEConv("gcn", 4, 4, num_experts=2).eval(), torch.randn(10, 4)
    conv(x, graph)
    twin = copy.deepcopy(graph) if how == "deepcopy" else pickle.loads(pickle.dumps(graph))
    own: Any = twin.edge_weight
    while own._version < weight._version:
        own.mul_(torch.rand(30))
    expected = conv(x, Graph(edges, 10, edge_weight=own))
    torch.testing.assert_close(conv(x, twin), expected)
