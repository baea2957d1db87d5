"""The dense relational layer, and the rows and weights that it shares with the mixed one."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric import EdgeIndex
from torch_geometric.nn import HeteroConv, SAGEConv

from gmoe.conv.hetero import RelationalConv
from tests.gmoe.conv.hetero_reference import (
    COUNTS,
    METADATA,
    OUT,
    WIDTHS,
    Edges,
    Plain,
    assert_all_close,
    backward,
    csr,
    edges,
    nodes,
)
from tests.gmoe.conv.masked import gradient

WRITES = ("author", "writes", "paper")


def layer(widths: Any = WIDTHS, metadata: Any = METADATA, **kwargs: Any) -> RelationalConv:
    torch.manual_seed(0)
    return RelationalConv(widths, OUT, metadata, **kwargs).double()


@pytest.mark.parametrize("aggr", ["mean", "sum"])
@pytest.mark.parametrize("share_root", [False, True])
@pytest.mark.parametrize("out_types", [None, ["field", "paper"]], ids=str)
def test_equals_pyg(aggr: Any, share_root: bool, out_types: Any) -> None:
    """Outputs and all gradients are those of HeteroConv of SAGEConvs, and a root linear layer a node type."""
    conv = layer(4 if share_root else WIDTHS, aggr=aggr, share_root=share_root, out_types=out_types)
    plain = Plain(conv)
    x_dict = nodes(4 if share_root else WIDTHS)

    def run(module: Any, named: Any) -> dict[str, Tensor]:
        xs = {t: x.clone().requires_grad_() for t, x in x_dict.items()}
        y_dict = module(xs, edges())
        backward(y_dict)
        return {**y_dict, **{f"x.{t}": gradient(x) for t, x in xs.items()}, **named()}

    ours = run(conv, lambda: {name: gradient(p) for name, p in conv.named_parameters()})
    assert_all_close(ours, run(plain, lambda: plain.named(gradient)))
    assert {t for t in ours if t in METADATA[0]} == set(out_types or METADATA[0])


@pytest.mark.filterwarnings("ignore:There exist node types")
def test_equals_sage_with_root_weights_that_add_up() -> None:
    """HeteroConv of whole SAGEConvs has a root weight a relation: their sum is the root weight here."""
    conv = layer()
    pyg = HeteroConv({r: SAGEConv((WIDTHS[r[0]], WIDTHS[r[-1]]), OUT) for r in METADATA[1]}, aggr="sum").double()
    with torch.no_grad():
        for node_type, into in conv.relations_into.items():
            root: Any = conv.root[node_type]  # type: ignore[index]
            root.weight.zero_()
            root.bias.zero_()
            for relation in into:
                sage: Any = pyg.convs[relation]
                root.weight.add_(sage.lin_r.weight)
                root.bias.add_(sage.lin_l.bias)
                conv.relation[relation].weight.copy_(sage.lin_l.weight)
    expected = pyg(nodes(), edges())
    actual = conv(nodes(), edges())
    assert_all_close({t: actual[t] for t in expected}, expected)
    assert torch.equal(actual["venue"], torch.zeros(COUNTS["venue"], OUT))  # which HeteroConv drops


def forms(relation: Any, edge_index: Tensor) -> dict[str, Any]:
    size = (COUNTS[relation[0]], COUNTS[relation[-1]])
    by_destination = edge_index[:, edge_index[1].argsort(stable=True)]
    return {
        "csr": csr(edge_index, *size),
        "csr of another dtype": csr(edge_index, *size, dtype=torch.float32),
        "coo": csr(edge_index, *size).to_sparse_coo(),
        "EdgeIndex": EdgeIndex(edge_index),
        "sized EdgeIndex": EdgeIndex(edge_index, sparse_size=size),
        "sorted EdgeIndex": EdgeIndex(by_destination, sparse_size=size, sort_order="col"),
        "half-sized EdgeIndex": EdgeIndex(by_destination, sparse_size=(size[0], None), sort_order="col"),
        "int32": edge_index.int(),
        "int32 EdgeIndex": EdgeIndex(edge_index.int(), sparse_size=size),
    }


@pytest.mark.filterwarnings("ignore:Converting sparse tensor to CSR")
@pytest.mark.parametrize("aggr", ["mean", "sum"])
@pytest.mark.parametrize("form", list(forms(WRITES, edges()[WRITES])))
def test_takes_every_form_of_edges(form: str, aggr: Any) -> None:
    conv = layer(aggr=aggr)
    found = []
    for edge_index_dict in (edges(), {r: forms(r, e)[form] for r, e in edges().items()}):
        xs = {t: x.clone().requires_grad_() for t, x in nodes().items()}
        y_dict = conv(xs, edge_index_dict)
        backward(y_dict)
        found.append({**y_dict, **{f"x.{t}": gradient(x) for t, x in xs.items()}})
    assert_all_close(found[1], found[0])


def test_values_of_a_sparse_matrix_are_weights() -> None:
    conv = layer(aggr="sum")
    plain = edges()[WRITES]
    twice = 2 * csr(plain, COUNTS["author"], COUNTS["paper"])
    expected = conv(nodes(), {WRITES: torch.cat([plain, plain], dim=1)})
    assert_all_close(conv(nodes(), {WRITES: twice}), expected)


def test_a_sparse_matrix_stores_no_messages() -> None:
    num_edges, width = 10_000, 8
    conv = RelationalConv(width, OUT, (["a", "b"], [("a", "to", "b")]))
    edge_index = torch.randint(5, (2, num_edges))
    x_dict = {t: torch.randn(5, width, requires_grad=True) for t in "ab"}

    def largest_stored(adj: Tensor) -> int:
        stored = [0]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
            conv(x_dict, {("a", "to", "b"): adj})
        return max(stored)

    assert largest_stored(edge_index) == num_edges * width
    assert largest_stored(csr(edge_index, 5, 5, dtype=torch.float32)) < num_edges


def test_absent_relations_and_isolated_nodes_add_zero() -> None:
    conv = layer()
    xs = nodes()
    alone = conv(xs, {})
    for t, y in alone.items():
        torch.testing.assert_close(y, nn.functional.linear(xs[t], conv.root[t].weight, conv.root[t].bias))  # type: ignore
    backward(alone)
    assert all(p.grad is not None for p in conv.parameters())
    no_edges = {r: torch.zeros(2, 0, dtype=torch.long) for r in METADATA[1]}
    assert_all_close(conv(xs, no_edges), alone)
    together = conv(xs, edges())
    assert all(torch.allclose(together[t][-1], alone[t][-1]) for t in alone)  # the last ones are isolated
    assert not torch.allclose(together["paper"], alone["paper"])


@pytest.mark.parametrize("sparse", [False, True], ids=["edge_index", "csr"])
@pytest.mark.parametrize("empty", [["author"], ["paper"], ["venue", "field"], METADATA[0]], ids=str)
def test_types_without_nodes(empty: list[str], sparse: bool) -> None:
    conv = layer()
    counts = {t: 0 if t in empty else n for t, n in COUNTS.items()}
    found: Edges = edges()
    for r in METADATA[1]:
        if counts[r[0]] == 0 or counts[r[-1]] == 0:
            found[r] = torch.zeros(2, 0, dtype=torch.long)
        if sparse:
            found[r] = csr(found[r], counts[r[0]], counts[r[-1]])
    xs = {t: x[: counts[t]].requires_grad_() for t, x in nodes().items()}
    y_dict = conv(xs, found)
    assert {t: y.shape for t, y in y_dict.items()} == {t: (n, OUT) for t, n in counts.items()}
    backward(y_dict)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in conv.parameters())


def test_each_part_is_initialised_as_a_linear_layer_of_its_own() -> None:
    torch.manual_seed(3)
    conv = RelationalConv(WIDTHS, OUT, METADATA)
    torch.manual_seed(3)
    expected = [nn.Linear(WIDTHS[t], OUT) for t in METADATA[0]]
    expected += [nn.Linear(WIDTHS[r[0]], OUT, bias=False) for into in conv.relations_into.values() for r in into]
    actual = [m for m in conv.modules() if isinstance(m, nn.Linear)]
    assert all(torch.equal(a.weight, e.weight) for a, e in zip(actual, expected, strict=True))
    before = [p.clone() for p in conv.parameters()]
    conv.reset_parameters()
    assert not any(torch.equal(p, b) for p, b in zip(conv.parameters(), before, strict=True))


def test_metadata_may_have_been_through_json() -> None:
    conv = layer(metadata=json.loads(json.dumps(METADATA)))
    assert_all_close(conv(nodes(), edges()), layer()(nodes(), edges()), atol=0.0)


def test_half_precision_sums_in_float32() -> None:
    """4,096 neighbours are more than bfloat16 can count or add one by one."""
    metadata = (["a", "b"], [("a", "to", "b")])
    x_dict = {"a": torch.ones(4096, 2, dtype=torch.bfloat16), "b": torch.zeros(1, 2, dtype=torch.bfloat16)}
    to_one = torch.stack([torch.arange(4096), torch.zeros(4096, dtype=torch.long)])
    for adj in (to_one, csr(to_one, 4096, 1, dtype=torch.float32)):
        for aggr, expected in (("mean", 1.0), ("sum", 4096.0)):
            conv = RelationalConv(2, OUT, metadata, aggr=aggr).bfloat16()  # type: ignore[arg-type]
            row = conv.rows(x_dict, {("a", "to", "b"): adj})["b"]
            assert row.dtype == torch.bfloat16
            assert row.tolist() == [[0.0, 0.0, expected, expected]]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert conv(x_dict, {("a", "to", "b"): adj})["b"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"metadata": ([], [])}, "metadata: got no node types"),
        ({"metadata": (["a", "a"], [])}, "metadata: got node types ['a', 'a'], expected each of them once"),
        ({"metadata": (["a"], [("a", "r", "a")] * 2)}, "metadata: got edge types"),
        ({"metadata": (["a"], [("a", "r", "b")])}, "metadata: got edge type ('a', 'r', 'b'), expected (source"),
        ({"metadata": (["a"], [("a", "a")])}, "metadata: got edge type ('a', 'a'), expected (source"),
        ({"widths": {"paper": 3}}, "expected widths of ['author', 'field', 'venue'] too"),
        ({"widths": 0}, "in_channels: got 0, expected at least 1"),
        ({"aggr": "max"}, "aggr: got 'max', expected one of 'mean', 'sum'"),
        ({"out_types": ["book"]}, "out_types: got 'book', expected one of 'paper'"),
        ({"out_types": []}, "out_types: got none"),
        ({"share_root": True}, "in_channels: got {'paper': 4, 'author': 3, 'field': 5, 'venue': 2} with a shared root"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_of_the_constructor(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        layer(**kwargs)
    assert message in str(error.value)


BAD_CALLS: list[tuple[Any, Any, str]] = [
    ({"author": None}, {}, "x_dict['author']: got None, expected (number of nodes, 3)"),
    ({"author": torch.zeros(5, 4)}, {}, "x_dict['author']: got shape (5, 4), expected (number of nodes, 3)"),
    ({}, {("author", "reads", "paper"): 0}, "edge_index_dict: got ('author', 'reads', 'paper'), expected one of"),
    ({}, {WRITES: torch.tensor([[5], [0]])}, "edge_index_dict[('author', 'writes', 'paper')]: edge_index: got source"),
    ({}, {WRITES: torch.tensor([[0], [7]])}, "got destination node 7, expected values in 0..6"),
    ({}, {WRITES: csr(torch.zeros(2, 0, dtype=torch.long), 7, 5)}, "got a sparse matrix of shape (5, 7), expected"),
    (
        {},
        {WRITES: EdgeIndex([[0], [0]], sparse_size=(5, 9))},
        "got an EdgeIndex of 9 destination nodes, expected 7",
    ),
]


@pytest.mark.parametrize(("changed", "edge_index_dict", "message"), BAD_CALLS, ids=[c[2][:40] for c in BAD_CALLS])
def test_errors_of_a_call_name_the_type(changed: Any, edge_index_dict: Any, message: str) -> None:
    xs = {t: x for t, x in {**nodes(), **changed}.items() if x is not None}
    with pytest.raises(ValueError) as error:  # noqa: PT011
        layer()(xs, edge_index_dict)
    assert message in str(error.value)
