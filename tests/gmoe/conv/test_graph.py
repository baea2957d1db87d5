"""Whatever form the edges come in, the result is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.nn import GATConv, GCNConv, GINConv, GraphConv, LEConv, SAGEConv, SimpleConv

from gmoe import GNNMoE, MoEConv
from gmoe.conv.graph import Graph
from gmoe.conv.separate import SeparateExperts
from tests.gmoe.conv.masked import assert_equals_masked, features, random_graph, routing_of

NODES, WIDTH = 9, 4


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    """PyG's EdgeIndex makes weights of the default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def simple_graph(num_src: int, num_dst: int, loops: bool = True) -> Tensor:
    """No parallel edges, which a coalesced matrix cannot hold; in no order."""
    edges = random_graph(num_src, num_dst, 30).unique(dim=1)
    edges = edges if loops else edges[:, edges[0] != edges[1]]
    return edges[:, torch.randperm(edges.size(1), generator=torch.Generator().manual_seed(1))]


def _sorted_by(row: int) -> Callable[[Tensor, tuple[int, int]], EdgeIndex]:
    def build(edge_index: Tensor, size: tuple[int, int]) -> EdgeIndex:
        order = edge_index[row].argsort(stable=True)
        return EdgeIndex(edge_index[:, order], sparse_size=size, sort_order="col" if row else "row")

    return build


def coo(edge_index: Tensor, size: tuple[int, int], value: Tensor | None = None) -> Tensor:
    value = torch.ones(edge_index.size(1), dtype=torch.float64) if value is None else value
    return torch.sparse_coo_tensor(edge_index.flip(0), value, size[::-1], check_invariants=True).coalesce()


def csr(edge_index: Tensor, size: tuple[int, int], value: Tensor | None = None) -> Tensor:
    return coo(edge_index, size, value).to_sparse_csr()


FORMS: dict[str, Callable[[Tensor, tuple[int, int]], Any]] = {
    "EdgeIndex": lambda edges, size: EdgeIndex(edges, sparse_size=size),
    "EdgeIndex by col": _sorted_by(1),
    "EdgeIndex by row": _sorted_by(0),
    "EdgeIndex without size": lambda edges, _: EdgeIndex(edges),
    "coo": coo,
    "csr": csr,
    "not contiguous": lambda edges, _: edges.T.contiguous().T,
}


def weights(num_tokens: int) -> Tensor:
    weight_TE = features(num_tokens, 3, seed=3)
    weight_TE[::3, 0] = 0
    weight_TE[:, 1] = 0
    return weight_TE


@pytest.mark.filterwarnings("ignore:.*runs on the whole graph")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "conv",
    [GCNConv, SAGEConv, GraphConv, GINConv, GATConv, LEConv, "transformer", "cheb"],
    ids=lambda c: getattr(c, "__name__", c),
)
def test_forms_give_the_same(conv: Any, form: str) -> None:
    edges = simple_graph(NODES, NODES, loops=False)
    adj = FORMS[form](edges, (NODES, NODES))
    if conv == "cheb" and form in ("coo", "csr"):
        pytest.skip("ChebConv takes no sparse matrix")
    kwargs: Any = {"K": 3} if conv == "cheb" else {}
    layer = MoEConv(conv, WIDTH, WIDTH, num_experts=3, router=None, **kwargs)
    assert_equals_masked(layer, features(NODES, WIDTH), adj, reference_adj=edges, weight_TE=weights(NODES))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("conv", [GCNConv, SAGEConv, GATConv])
def test_self_loops_count_as_pyg_counts_them_in_that_form(conv: Any, form: str) -> None:
    """To the loops of a sparse matrix GCN adds its own, of an edge_index it replaces them."""
    adj = FORMS[form](simple_graph(NODES, NODES), (NODES, NODES))
    layer = MoEConv(conv, WIDTH, WIDTH, num_experts=3, router=None)
    assert_equals_masked(layer, features(NODES, WIDTH), adj, weight_TE=weights(NODES))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [(9, 5), (5, 9)], ids=str)
@pytest.mark.parametrize("conv", [SAGEConv, GraphConv, "transformer"])
def test_forms_give_the_same_on_bipartite_graphs(conv: Any, form: str, sizes: tuple[int, int]) -> None:
    if conv is GraphConv and form == "EdgeIndex by col":
        pytest.skip("PyG's own product with a sorted bipartite EdgeIndex has no backward pass")
    edges = simple_graph(*sizes)
    layer = MoEConv(conv, WIDTH, WIDTH, num_experts=3, router=None)
    x = (features(sizes[0], WIDTH), features(sizes[1], WIDTH, seed=1))
    assert_equals_masked(layer, x, FORMS[form](edges, sizes), reference_adj=edges, weight_TE=weights(sizes[1]))


@pytest.mark.parametrize("make", [coo, csr])
@pytest.mark.parametrize("conv", [GCNConv, GraphConv, LEConv])
def test_values_of_a_sparse_matrix_are_edge_weights(conv: Any, make: Callable[..., Tensor]) -> None:
    edges = simple_graph(NODES, NODES, loops=False)
    value = features(edges.size(1), seed=2).abs() + 0.1
    layer = MoEConv(conv, WIDTH, WIDTH, num_experts=3, router=None)
    x, routing = features(NODES, WIDTH), routing_of(weights(NODES))
    expected = layer(x, edges, edge_weight=value, routing=routing)
    actual = layer(x, make(edges, (NODES, NODES), value), routing=routing)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    assert not torch.allclose(layer(x, edges, routing=routing), expected)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("conv", [GCNConv, GraphConv, LEConv])
def test_edge_weights_beside_an_edge_index(conv: Any, order: int) -> None:
    """EdgeIndex holds edges in another order than the plain graph; weights come in its order."""
    edges = simple_graph(NODES, NODES)
    value = features(edges.size(1), seed=2).abs() + 0.1
    by = edges[order].argsort(stable=True)
    layer = MoEConv(conv, WIDTH, WIDTH, num_experts=3, router=None)
    x, routing = features(NODES, WIDTH), routing_of(weights(NODES))
    adj = _sorted_by(order)(edges, (NODES, NODES))
    actual = layer(x, adj, edge_weight=value[by], routing=routing)
    torch.testing.assert_close(actual, layer(x, edges, edge_weight=value, routing=routing), rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*runs on the whole graph")
@pytest.mark.parametrize("conv", ["gcn", "sage", "graph", "gin", "gat", "gatv2", "le"])
def test_target_to_source(conv: str) -> None:
    edges = simple_graph(NODES, NODES)
    layer = MoEConv(conv, WIDTH, WIDTH, num_experts=3, k=2, router_input=("node", "neighbors"), flow="target_to_source")
    assert_equals_masked(layer, features(NODES, WIDTH), edges)
    if conv != "gcn":  # the local path, not the full one
        assert isinstance(layer.experts, SeparateExperts)
        assert layer.experts.local == [True] * 3
    # the router sees the mean over what the messages come from
    x, seen = features(NODES, WIDTH), []
    assert layer.router is not None
    layer.router.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    layer(x, edges)
    torch.testing.assert_close(seen[0], torch.cat([x, SimpleConv(aggr="mean")(x, edges.flip(0))], dim=1))
    # and it is the other flow on the flipped graph
    forth = MoEConv(conv, WIDTH, WIDTH, num_experts=3, router=None)
    back = MoEConv(conv, WIDTH, WIDTH, num_experts=3, router=None, flow="target_to_source")
    experts: Any = back.experts
    for mine, plain in zip(experts.convs, (forth.expert(i) for i in range(3)), strict=True):
        mine.load_state_dict(plain.state_dict())
    routing = routing_of(weights(NODES))
    expected = forth(x, edges, routing=routing)
    torch.testing.assert_close(back(x, edges.flip(0), routing=routing), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", ["EdgeIndex", "EdgeIndex by col", "EdgeIndex by row", "coo", "csr"])
@pytest.mark.parametrize("routing", ["layer", "shared"])
def test_forms_give_the_same_through_a_model(routing: Any, form: str) -> None:
    edges = simple_graph(NODES, NODES, loops=False)
    model = GNNMoE(WIDTH, 8, 3, num_layers=3, num_experts=3, routing=routing)
    x = features(NODES, WIDTH)
    adj = FORMS[form](edges, (NODES, NODES))
    torch.testing.assert_close(model(x, adj), model(x, edges), rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", ["plain", *FORMS])
def test_router_input_aggregate_sees_the_same(form: str) -> None:
    edges = simple_graph(NODES, NODES)
    adj = edges if form == "plain" else FORMS[form](edges, (NODES, NODES))
    layer = MoEConv("gat", WIDTH, WIDTH, num_experts=3, router_input="neighbors")
    x = features(NODES, WIDTH)
    scores = layer(x, adj, return_routing=True)[1].scores
    mean = torch.stack([x[edges[0, edges[1] == i]].sum(0) / max(int((edges[1] == i).sum()), 1) for i in range(NODES)])
    assert layer.router is not None
    torch.testing.assert_close(scores, layer.router(mean).scores)


def test_in_edges() -> None:
    edges = torch.tensor([[3, 0, 1, 2, 0], [1, 2, 1, 0, 1]])
    edge, position = Graph(edges, 4, 4, {}).in_edges(torch.tensor([3, 1, 0]))
    assert edge.tolist() == [0, 2, 4, 3]
    assert position.tolist() == [1, 1, 1, 2]


def test_edge_args_follow_their_edges() -> None:
    edges = torch.tensor([[0, 1], [1, 0]])
    graph = Graph(edges, 2, 2, {"edge_attr": torch.tensor([[1.0], [2.0]])})
    assert graph.args_of(torch.tensor([1]), frozenset({"edge_attr"}))["edge_attr"].tolist() == [[2.0]]


@pytest.mark.parametrize("conv", ["gcn", "sage", "gin", "gat"])
@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([[0, 9], [1, 0]], r"edge_index: got source node 9, expected values in 0\.\.8"),
        ([[0, 1], [1, 12]], r"edge_index: got destination node 12, expected values in 0\.\.8"),
        ([[0, -1], [1, 0]], r"edge_index: got source node -1, expected values in 0\.\.8"),
        ([[0, 1, 2]], r"edge_index: got shape \(1, 3\), expected \(2, number of edges\)"),
    ],
)
def test_edges_outside_the_nodes(conv: str, edges: list[list[int]], message: str) -> None:
    layer = MoEConv(conv, WIDTH, WIDTH, num_experts=2)
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(NODES, WIDTH), torch.tensor(edges))


def test_bipartite_bounds_are_those_of_each_side() -> None:
    layer = MoEConv("sage", WIDTH, WIDTH, num_experts=2)
    x = (torch.randn(9, WIDTH), torch.randn(3, WIDTH))
    layer(x, torch.tensor([[8], [2]]))
    with pytest.raises(ValueError, match=r"edge_index: got destination node 3, expected values in 0\.\.2"):
        layer(x, torch.tensor([[8], [3]]))


def test_sparse_matrix_of_another_shape() -> None:
    layer = MoEConv("sage", WIDTH, WIDTH, num_experts=2)
    adj = csr(torch.tensor([[0], [1]]), (NODES, NODES - 1)).float()
    with pytest.raises(ValueError, match=r"edge_index: got a sparse matrix of shape \(8, 9\), expected .* \(9, 9\)"):
        layer(torch.randn(NODES, WIDTH), adj)


@pytest.mark.parametrize(("conv", "name"), [("gcn", "edge_weight"), ("gat", "edge_attr")])
def test_edge_arguments_of_the_wrong_length(conv: str, name: str) -> None:
    kwargs: Any = {"edge_dim": 1} if conv == "gat" else {}
    layer = MoEConv(conv, WIDTH, WIDTH, num_experts=2, **kwargs)
    with pytest.raises(ValueError, match=f"{name}: got 3 rows, expected one for each of 2 edges"):
        layer(torch.randn(NODES, WIDTH), torch.tensor([[0, 1], [1, 0]]), **{name: torch.ones(3, 1)})


def test_edge_arguments_that_the_conv_does_not_take() -> None:
    x, edges = torch.randn(NODES, WIDTH), torch.tensor([[0, 1], [1, 0]])
    with pytest.raises(ValueError, match="edge_weight: got a tensor, but the conv takes none"):
        MoEConv("sage", WIDTH, WIDTH, num_experts=2)(x, edges, edge_weight=torch.ones(2))
    with pytest.raises(ValueError, match=r"edge_attr: got a tensor, but the conv takes \['edge_weight'\]"):
        MoEConv("gcn", WIDTH, WIDTH, num_experts=2)(x, edges, edge_attr=torch.ones(2, 1))
