"""Plain convs on a graph, and on a part of one."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch_geometric import nn as pyg

from gmoe import Graph
from gmoe.conv.kinds import base_kind_of
from gmoe.conv.plain import run, run_gat, run_gcn, run_on
from tests.helpers.masked import default_float64, random_graph

N, WIDTH = 12, 4
TOKEN = torch.tensor([2, 7, 3])


@pytest.mark.parametrize("sizes", [(N, N), (N, 9), (9, N)])
@pytest.mark.parametrize("cls", [pyg.SAGEConv, pyg.GraphConv])
def test_a_local_conv_gives_on_the_in_edges_of_some_nodes_what_it_gives_on_the_graph(
    cls: Any, sizes: tuple[int, int]
) -> None:
    with default_float64():
        graph = Graph(random_graph(*sizes, 40), sizes)
        x_src = torch.randn(sizes[0], WIDTH)
        x_dst = x_src if sizes[0] == sizes[1] else torch.randn(sizes[1], WIDTH)
        conv = cls(WIDTH, 3)
        whole = run(conv, graph, x_src, x_dst)
        torch.testing.assert_close(run_on(conv, graph, x_src, x_dst, TOKEN), whole[TOKEN])


@pytest.mark.parametrize(
    "conv",
    [
        pyg.GCNConv(WIDTH, 3),
        pyg.GCNConv(WIDTH, 3, improved=True),
        pyg.GCNConv(WIDTH, 3, add_self_loops=False),
        pyg.GCNConv(WIDTH, 3, normalize=False),
    ],
)
def test_a_conv_with_norms_gives_on_a_part_what_it_gives_on_the_whole_graph(conv: Any) -> None:
    run_plain: Any = base_kind_of(type(conv)).run
    with default_float64():
        conv = conv.double()
        edge_index, x = random_graph(N, N, 40), torch.randn(N, WIDTH)
        nodes, part = Graph(edge_index, N).part(TOKEN)
        torch.testing.assert_close(run_plain(conv, x[nodes], part), conv(x, edge_index)[TOKEN])


def test_a_gcn_on_a_part_is_left_as_it_is() -> None:
    conv = pyg.GCNConv(WIDTH, 3)
    nodes, part = Graph(random_graph(N, N, 40), N).part(TOKEN)
    run_gcn(conv, torch.randn(N, WIDTH)[nodes], part)
    assert conv.normalize


@pytest.mark.parametrize("flow", ["source_to_target", "target_to_source"])
@pytest.mark.parametrize(
    "conv",
    [
        partial(pyg.GATConv, WIDTH, 3),
        partial(pyg.GATConv, WIDTH, 3, heads=2, concat=False, bias=False),
        partial(pyg.GATConv, WIDTH, 3, add_self_loops=False),
        partial(pyg.GATv2Conv, WIDTH, 3, heads=2, residual=True),
        partial(pyg.GATv2Conv, WIDTH, 3, share_weights=True),
    ],
)
def test_a_gat_whose_edges_must_not_be_counted_gives_what_pygs_gives(
    conv: Any, flow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph has loops, one of them twice, and an edge twice."""
    edge_index = torch.cat([random_graph(N, N, 40), torch.tensor([[2, 2, 5, 1], [2, 2, 5, 3]])], 1)
    edge_index = torch.cat([edge_index, edge_index[:, :1]], dim=1)
    with default_float64():
        plain, x = conv(flow=flow), torch.randn(N, WIDTH, requires_grad=True)
        expected = plain(x, edge_index)
        leaves = [x, *plain.parameters()]
        sizes = set[int]()
        plain.register_message_forward_pre_hook(lambda _, args: sizes.add(len(args[0]["alpha"])))
        monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
        found = run_gat(plain, x, Graph(edge_index, N, flow=flow))
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(y.square().sum(), leaves) for y in (found, expected)]
        torch.testing.assert_close(*gradients)
        assert sizes == {edge_index.size(1) + (N if plain.add_self_loops else 0)}
        assert plain.flow == flow


@pytest.mark.parametrize(
    ("flow", "options"),
    [("source_to_target", {"bias": False}), ("target_to_source", {"improved": True})],
    ids=str,
)
def test_a_compiled_gcn_is_one_graph_and_gives_what_pygs_gives(
    flow: str, options: dict[str, Any]
) -> None:
    torch._dynamo.reset()
    edge_index = random_graph(N, N, 40)
    with default_float64():
        conv, x = pyg.GCNConv(WIDTH, 3, flow=flow, **options), torch.randn(N, WIDTH)
        weight = torch.rand(edge_index.size(1))
        graph = Graph(edge_index, N, edge_weight=weight, flow=flow)
        compiled = torch.compile(run_gcn, backend="aot_eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            found = compiled(conv, x, graph)
        torch.testing.assert_close(found, conv(x, edge_index, weight))
    assert torch._dynamo.explain(run_gcn)(conv, x, graph).graph_break_count == 0


def test_a_gcn_with_a_hook_is_called_on_a_part_too() -> None:
    conv: Any = pyg.GCNConv(WIDTH, 3)
    nodes, part = Graph(random_graph(N, N, 40), N).part(TOKEN)
    x = torch.randn(N, WIDTH)[nodes]
    plain = run_gcn(conv, x, part)
    conv.register_forward_hook(lambda *args: 2 * args[2])
    torch.testing.assert_close(run_gcn(conv, x, part), 2 * plain)


def test_a_gat_whose_edges_must_not_be_counted_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: compiled code cannot copy a conv."""
    torch._dynamo.reset()
    monkeypatch.setattr("gmoe.conv.plain._sizes_must_not_follow", lambda *_: True)
    conv, x = pyg.GATConv(WIDTH, 3), torch.randn(N, WIDTH)
    edge_index = random_graph(N, N, 40)
    compiled = torch.compile(run_gat, backend="aot_eager")
    torch.testing.assert_close(compiled(conv, x, Graph(edge_index, N)), conv(x, edge_index))
