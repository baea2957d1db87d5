"""``torch.compile`` takes a layer as one graph, forward and backward.

Both give what they give without it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from gmoe import GNNMoE, Graph, MLPExperts, MoE, MoEConv, SoftMoE, SoftSlots
from gmoe.routers import ROUTERS, build_router
from tests.contract import CASES, graph_breaks, opened
from tests.torch_versions import COMPILES_GRAPHS

WIDTH = 8
SIZES = (30, 37, 50, 64, 101, 33, 77)
EDGES_OF_A_NODE = 4

AGGREGATIONS = ("max", "min", "mul", "std", "var", "softmax", "powermean")


conv: Callable[..., nn.Module] = partial(MoEConv, in_channels=WIDTH, out_channels=WIDTH)
four: Callable[..., nn.Module] = partial(conv, num_experts=4)
gnn: Callable[..., nn.Module] = partial(GNNMoE, WIDTH, WIDTH, WIDTH, 3, num_experts=4)

TYPED = ("HeteroConv",)
RAGGED = ("MoE expert_choice", "MoE attention_vote", "MoE multi_centroid experts")
"""Cases of the contract, whose tokens are in groups of several sizes."""


@pytest.fixture(autouse=True)
def _sorted_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code sorts edges, however few: bits are compared with those of the same order."""
    monkeypatch.setattr("gmoe.conv.matrix.FEW_NUMBERS", 0)


def mlps(router: str) -> nn.Module:
    return MoE(
        build_router(router, WIDTH, num_experts=4, k=1),
        MLPExperts(WIDTH, WIDTH, WIDTH, num_experts=4),
    )


def soft() -> nn.Module:
    return SoftMoE(
        SoftSlots(WIDTH, num_experts=4, slots=2), MLPExperts(WIDTH, WIDTH, WIDTH, num_experts=4)
    )


ROWS: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "`MoE`, each router, and `SoftMoE`, on groups of one size": {
        **{f"MoE, {router}": partial(mlps, router) for router in ROUTERS},
        "MoE, soft": soft,
    },
    "`MoEConv` of GCN, SAGE, GraphConv, GIN, GINE": {
        "GCN": partial(four, "gcn"),
        "GCN, edge weights": partial(four, "gcn"),
        "GCN, neighbors": partial(four, "gcn", router_input=("node", "neighbors", "degree")),
        "SAGE": partial(four, "sage"),
        "SAGE, normalized": partial(four, "sage", normalize=True),
        "GraphConv": partial(four, "graph"),
        "GIN": partial(four, "gin"),
        "GINE": partial(four, "gine"),
    },
    "SAGE and GraphConv that aggregate by max, min, mul, std, var, softmax, powermean": {
        **{f"SAGE, {aggr}": partial(four, "sage", aggr=aggr) for aggr in AGGREGATIONS},
        "SAGE, two": partial(four, "sage", aggr=["max", "mean"]),
        "GraphConv, std": partial(four, "graph", aggr="std"),
    },
    "`MoEConv` under each router": {
        **{f"GCN, {router}": partial(four, "gcn", router=router) for router in ROUTERS},
        "GCN, votes of neighbors": partial(
            four,
            "gcn",
            router="attention_vote",
            router_kwargs={"scope": "neighbors"},
        ),
        "GCN, losses": partial(four, "gcn", router_kwargs={"balance": "switch", "z_coef": 0.1}),
    },
    "token choice with a capacity": {
        "GCN, capacity": partial(four, "gcn", router_kwargs={"capacity_factor": 1.0}),
    },
    "GAT": {
        "GAT": partial(four, "gat"),
        "GAT, edge features": partial(four, "gat", edge_dim=WIDTH),
    },
    "GAT whose heads are narrower than the input": {
        "GAT, narrow": partial(MoEConv, "gat", WIDTH, WIDTH // 2, num_experts=4, heads=2),
    },
    "GATv2": {
        "GATv2": partial(four, "gatv2"),
        "GATv2, edge features": partial(four, "gatv2", edge_dim=WIDTH),
    },
    "TransformerConv": {
        "Transformer": partial(four, "transformer"),
        "Transformer, edge features": partial(four, "transformer", edge_dim=WIDTH),
    },
    "`GNNMoE` of GCN, whose output layer is PyG's conv": {
        "GNNMoE": gnn,
        "GNNMoE, one router": partial(gnn, shared_router=True),
        "GNNMoE, a router a layer": partial(gnn, shared_router=False),
    },
    "`GNNMoE` of GAT": {"GNNMoE of GAT": partial(gnn, conv="gat")},
    "SAGE that aggregates by median, which PyG counts by `bincount`": {
        "SAGE, median": partial(four, "sage", aggr="median"),
    },
    "FiLM and all other convs that run one by one": {"FiLM": partial(four, "film")},
    "five kinds under one router": {
        "five": partial(conv, ["gcn", "sage", "gin", "gat", "graph"]),
    },
}
"""The layers of each row of the table in ``docs/support.md``, in training."""

QUICK = ("GCN, capacity",)
"""Layers whose breaks are counted in the default suite."""

SHARED = ", shared"
"""Ends the name of a layer beside a shared expert; else experts are copies, if they can."""


def as_copies(make: Any) -> nn.Module:
    """The layer as copies; beside a shared expert if its router or its kinds do not allow that."""
    try:
        return make(start="copies")
    except ValueError:
        return make(start="shared")


MAKERS: dict[str, Any] = {}
_rows: dict[str, dict[str, Any]] = ROWS
for _row in _rows.values():
    for _name, _make in _row.items():
        if _name.startswith("MoE, "):
            MAKERS[_name] = _make
            continue
        MAKERS[_name] = partial(as_copies, _make)
        MAKERS[f"{_name}{SHARED}"] = partial(_make, start="shared")


def table() -> dict[str, tuple[str, int, int | None]]:
    """The rows of the page: if a layer is one graph, and its breaks without ``fullgraph=True``.

    As copies, and beside a shared expert; ``None`` for layers without that choice.
    """
    page = (Path(__file__).parent.parent / "docs" / "support.md").read_text()
    lines = page.split("<!-- breaks -->\n")[1].split("\n<!-- end -->")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {
        name: (whole, int(breaks), None if shared == "–" else int(shared))
        for name, whole, breaks, shared in cells
    }


def of_row(row: str) -> dict[str, int]:
    """The layers of a row, and the breaks that the page says each has."""
    _, breaks, shared = table()[row]
    found = dict.fromkeys(ROWS[row], breaks)
    if shared is not None:
        found |= {f"{name}{SHARED}": shared for name in ROWS[row]}
    return found


def layers(*verdicts: str) -> list[str]:
    """The layers of the rows with these verdicts."""
    return [name for row in ROWS if table()[row][0] in verdicts for name in of_row(row)]


@pytest.fixture(autouse=True)
def compile_anew() -> Iterator[None]:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def made(name: str) -> nn.Module:
    """The layer, with a gain that lets its experts be seen, or copies that differ."""
    torch.manual_seed(0)
    layer = MAKERS[name]()
    return layer if name.startswith("MoE, ") else opened(layer)


def inputs(name: str, nodes: int, prepared: bool = False) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call: tokens in two groups, or nodes and edges, and what edges have.

    Args:
        name: of the layer.
        nodes: their number.
        prepared: give a :class:`Graph` for the edges.
    """
    generator = torch.Generator().manual_seed(nodes)
    if name.startswith("MoE, "):
        return (torch.randn(2, nodes, WIDTH, generator=generator),), {}
    edges = EDGES_OF_A_NODE * nodes
    x = torch.randn(nodes, WIDTH, generator=generator)
    edge_index = torch.randint(nodes, (2, edges), generator=generator)
    of_edges: dict[str, Tensor] = {}
    if "edge weights" in name:
        of_edges["edge_weight"] = torch.rand(edges, generator=generator)
    if "edge features" in name or name.startswith("GINE"):
        of_edges["edge_attr"] = torch.randn(edges, WIDTH, generator=generator)
    return (x, Graph(edge_index, nodes) if prepared else edge_index), of_edges


def trained(call: Any, layer: nn.Module, x: Tensor, *edges: Any, **of_edges: Any) -> list[Any]:
    """The output and all gradients of one step."""
    torch.manual_seed(1)
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = call(x, *edges, **of_edges)
    (y.square().sum() + y.sum()).backward()
    return [y.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]


def assert_is_one_graph(
    name: str,
    backend: str,
    sizes: Sequence[int],
    near: float,
    prepared: bool = False,
) -> None:
    """Outputs and gradients are as near to eager ones, by the largest number of any.

    Args:
        name: of the layer.
        backend: of the compiler.
        sizes: numbers of nodes, one step of each.
        near: the largest difference; 0 for equal bits.
        prepared: give a :class:`Graph` for the edges.
    """
    layer = made(name)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, backend=backend, fullgraph=True)
    for nodes in sizes:
        args, kwargs = inputs(name, nodes, prepared)
        expected = trained(layer, layer, *args, **kwargs)
        args, kwargs = inputs(name, nodes, prepared)  # another graph, which keeps nothing yet
        found = trained(compiled, twin, *args, **kwargs)
        # Some gradients are zero but for rounding: a bias of keys moves all scores of a node alike.
        largest = max(float(value.abs().max()) for value in expected if value is not None)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=near * largest)


def graphs_made() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def breaks(name: str) -> int:
    """How often a training forward leaves the graph where nobody asks for one graph."""
    args, kwargs = inputs(name, SIZES[0])
    return int(torch._dynamo.explain(made(name))(*args, **kwargs).graph_break_count)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name",
    [
        "GCN",
        pytest.param("GCN, shared", marks=SLOW),
        pytest.param("GAT", marks=SLOW),
        pytest.param("GAT, shared", marks=SLOW),
    ],
)
@COMPILES_GRAPHS
def test_a_layer_is_one_graph(name: str) -> None:
    assert_is_one_graph(name, "aot_eager", SIZES[:2], near=0)


QUICK_WITHOUT_GRADIENTS = ("SAGE, shared", "GATv2")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK_WITHOUT_GRADIENTS else SLOW)
        for name in layers("yes")
    ],
)
@COMPILES_GRAPHS
def test_without_gradients_a_layer_is_one_graph_of_few_nodes_and_of_many(name: str) -> None:
    """As a server calls it; of many nodes, rows of all experts move at once."""
    layer = made(name).eval()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for nodes in (SIZES[0], 1100):
        args, kwargs = inputs(name, nodes)
        with torch.no_grad():
            assert torch.equal(compiled(*args, **kwargs), layer(*args, **kwargs))


def test_the_page_has_every_row() -> None:
    of_contract = set(table()) - set(ROWS)
    assert set(ROWS) <= set(table())
    assert {row.split()[0] for row in of_contract} == {"`ViTMoE`;", "PyG's", "tokens"}


@pytest.mark.parametrize("name", QUICK)
@COMPILES_GRAPHS
def test_some_breaks_are_those_of_the_page(name: str) -> None:
    (expected,) = (of_row(row)[name] for row in ROWS if name in of_row(row))
    assert breaks(name) == expected


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
@COMPILES_GRAPHS
def test_breaks_are_those_of_the_page(row: str) -> None:
    expected = of_row(row)
    assert {name: breaks(name) for name in expected} == expected


@pytest.mark.slow
@COMPILES_GRAPHS
def test_breaks_of_the_contracts_cases_are_those_of_the_page() -> None:
    page = {row.split()[0]: breaks for row, (_, breaks, _) in table().items()}
    cases = {case.name: case for case in CASES}
    for names, row in ((TYPED, "PyG's"), (RAGGED, "tokens")):
        found = graph_breaks([cases[name] for name in names])
        assert set(found.values()) == {page[row]}


@pytest.mark.slow
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("name", layers("yes"))
@COMPILES_GRAPHS
def test_every_layer_is_one_graph_of_any_size(name: str, prepared: bool) -> None:
    assert_is_one_graph(name, "aot_eager", SIZES, near=0, prepared=prepared)
    assert graphs_made() <= 1 + 3  # compiled again three times at most


@pytest.mark.slow
@pytest.mark.parametrize("name", layers("compiled anew for each size"))
@COMPILES_GRAPHS
def test_some_layers_are_one_graph_of_one_size(name: str) -> None:
    assert_is_one_graph(name, "aot_eager", SIZES[:3], near=0)
    assert graphs_made() == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", layers("no"))
def test_convs_that_run_one_by_one_are_refused_where_one_graph_is_asked_for(name: str) -> None:
    args, kwargs = inputs(name, SIZES[0])
    # Sizes that follow the data are refused by torch's shape environment, not by dynamo itself.
    refusals = (torch._dynamo.exc.TorchDynamoException, GuardOnDataDependentSymNode)
    with pytest.raises(refusals):
        torch.compile(made(name), backend="eager", fullgraph=True)(*args, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("name", layers("yes"))
@COMPILES_GRAPHS
def test_inductor_takes_every_layer_whole(name: str) -> None:
    assert_is_one_graph(name, "inductor", SIZES[:2], near=2e-5)  # it draws the same noise, too


@pytest.mark.parametrize("name", ["GCN", pytest.param("GCN, shared", marks=SLOW)])
@COMPILES_GRAPHS
def test_a_graph_that_is_given_again_is_not_compiled_again(name: str) -> None:
    layer = made(name)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    (x, edge_index), _ = inputs("GCN", 30)
    graph = Graph(edge_index, len(x))
    for _ in range(4):  # the second finds the transpose that the first left in the graph
        trained(compiled, layer, x, graph)
    assert graphs_made() <= 2


@pytest.mark.parametrize("prepared", [False, pytest.param(True, marks=SLOW)])
@pytest.mark.parametrize("conv", ["gcn", *(pytest.param(n, marks=SLOW) for n in ("sage", "gin"))])
@COMPILES_GRAPHS
def test_a_model_is_not_compiled_again_for_batches_of_other_sizes(
    conv: str, prepared: bool
) -> None:
    """By the line that everybody types, with ``dynamic=True``."""
    model = GNNMoE(WIDTH, WIDTH, 4, 3, conv=conv, num_experts=4, dropout=0.1)
    compiled = torch.compile(model, dynamic=True, backend="aot_eager")
    for nodes in (30, 41, 57, 80, 33):
        args, _ = inputs(conv, nodes, prepared)
        compiled(*args).sum().backward()
    assert graphs_made() == 1


def test_compiled_sums_follow_what_was_changed_in_place() -> None:
    """Also those that the graph has kept from an eager call."""
    layer = made("GCN").eval()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    (x, edge_index), given = inputs("GCN, edge weights", 30)
    graph = Graph(edge_index, len(x), x=x, edge_weight=given["edge_weight"])
    layer(x, graph)
    compiled(x, graph)
    for changed in (x, given["edge_weight"]):
        changed.mul_(2)
        torch.testing.assert_close(compiled(x, graph), layer(x, edge_index, **given))


@pytest.mark.parametrize("learned", [pytest.param(False, marks=SLOW), True])
@pytest.mark.parametrize(
    "name", ["GCN", *(pytest.param(name, marks=SLOW) for name in ("GATv2, edge features", "FiLM"))]
)
@COMPILES_GRAPHS
def test_a_graph_of_a_sparse_matrix_is_taken(name: str, learned: bool) -> None:
    """Its values are factors, or rows of features; both also where they need gradients.

    Convs that run one by one do so outside of compiled code.
    """
    layer = made(name)
    compiled = torch.compile(layer, backend="eager", fullgraph=name != "FiLM")
    (x, edge_index), _ = inputs(name, 30)
    matrix = edge_index.flip(0).unique(dim=1)
    shape = (matrix.size(1), WIDTH) if "features" in name else (matrix.size(1),)
    values = torch.rand(shape, generator=torch.Generator().manual_seed(0)).requires_grad_(learned)
    found = []
    for call in (layer, compiled):
        values.grad = None
        size = (30, 30, *shape[1:])
        graph = Graph(torch.sparse_coo_tensor(matrix, values, size, is_coalesced=True), 30)
        found.append([*trained(call, layer, x, graph), values.grad])
    torch.testing.assert_close(found[1], found[0])


@COMPILES_GRAPHS
def test_edges_outside_the_nodes_are_refused_in_compiled_code() -> None:
    layer = made("GCN")
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    (x, edge_index), _ = inputs("GCN", 30)
    compiled(x, edge_index)
    edge_index[1, 7] = 30
    with pytest.raises(
        ValueError, match=r"edge_index: got nodes \d\.\.30, expected values in 0\.\.29"
    ):
        compiled(x, edge_index)


def test_a_graph_that_compiled_code_saw_in_inference_mode_trains() -> None:
    layer = made("GCN").eval()
    (x, edge_index), _ = inputs("GCN", 30)
    graph = Graph(edge_index, len(x))
    with torch.inference_mode():
        torch.compile(layer, backend="aot_eager", fullgraph=True)(x, graph)
    found = trained(layer, layer, x, graph)
    torch.testing.assert_close(found, trained(layer, layer, x, edge_index))
