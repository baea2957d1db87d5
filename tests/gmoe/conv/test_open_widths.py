"""Widths that are left open: what a layer is before and after its first call."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch_geometric import nn as pyg
from torch_geometric.nn import MessagePassing

from gmoe import Graph, MoEConv
from tests.contract import opened
from tests.helpers.conv_cases import KINDS, WIDTH, graph, layer
from tests.helpers.masked import features, random_graph
from tests.helpers.one_process import one_process

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*runs on the whole graph"),
    pytest.mark.filterwarnings("ignore:.*this call fills in the width"),
]


@pytest.mark.parametrize(
    ("conv", "start"), [*((kind, "shared") for kind in KINDS), ("gcn", "copies")], ids=str
)
def test_open_widths_are_filled_in_by_the_first_call(conv: Any, start: Any) -> None:
    x, edge_index = graph()
    options: dict[str, Any] = {"router_input": ("node", "neighbors"), "start": start}
    lazy, built = (layer(conv, width, **options).eval() for width in (-1, WIDTH))
    assert lazy.state_dict() == {}
    with torch.inference_mode():
        assert lazy.double()(x.double(), edge_index).dtype == torch.float64
    lazy(x.double(), edge_index).sum().backward()
    assert lazy.in_channels == WIDTH
    built.load_state_dict(opened(lazy.float()).state_dict())
    assert torch.equal(built(x, edge_index), lazy(x, edge_index))


def test_open_widths_of_two_sets_of_nodes() -> None:
    x = (features(9, 3).float(), features(5, 6).float())
    for given in ((-1, -1), (3, -1), (-1, 6), -1):
        lazy = layer("sage", given).eval()
        with torch.no_grad():
            assert lazy(x, random_graph(9, 5, 20)).shape == (5, WIDTH)
        assert lazy.in_channels == (3, 6)
        assert not any(part.training for part in lazy.modules())
    with pytest.raises(ValueError, match=r"x: got .*expected"):
        layer("sage", (4, -1))(x, random_graph(9, 5, 20))


def test_an_open_layer_is_not_frozen_and_keeps_its_type() -> None:
    x, edge_index = graph()
    lazy = layer("gcn", -1)
    with pytest.raises(ValueError, match="uninitialized parameter"):
        lazy.requires_grad_(False)
    # A layer before it may have given bfloat16; the parameters stay what they are.
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        lazy(x.bfloat16(), edge_index)
    assert {value.dtype for value in lazy.parameters()} == {torch.float32}
    with pytest.raises(ValueError, match=r"^x: got torch.float64, expected torch.float32"):
        layer("gcn", -1)(x.double(), edge_index)


def test_processes_refuse_an_open_layer(tmp_path: Path) -> None:
    """They would train parameters that none of them shares."""
    with one_process(tmp_path), pytest.raises(RuntimeError, match="uninitialized parameters"):
        DistributedDataParallel(layer("gcn", -1))


def test_a_first_call_that_records_gradients_warns_of_the_optimizer() -> None:
    lazy = layer("gcn", -1)
    with pytest.warns(UserWarning, match="an optimizer that was made before does not train them"):
        lazy(*graph())
    lazy(*graph())  # once


def test_an_open_layer_is_copied_and_takes_a_state_once_it_is_built() -> None:
    x, edge_index = graph()
    built, lazy = layer("gat", heads=2), nn.ModuleList([layer("gat", -1, heads=2)])
    twin = pickle.loads(pickle.dumps(copy.deepcopy(lazy)))
    twin[0](x, edge_index)
    assert [one.in_channels for one in (*twin, *lazy)] == [WIDTH, -1]
    lazy.load_state_dict(copy.deepcopy(lazy).state_dict())  # an open one's has nothing
    state = nn.ModuleList([built]).state_dict()
    with pytest.raises(RuntimeError, match="in_channels: got -1, expected a call to fill it in"):
        lazy.load_state_dict(state, strict=False)
    lazy[0](x, edge_index)
    lazy.load_state_dict(state)
    assert torch.equal(lazy[0](x, edge_index), built(x, edge_index))


def test_a_call_that_fails_leaves_the_widths_open() -> None:
    x, edge_index = graph()
    lazy = layer("gcn", -1, router_kwargs={"temperatur": 1}, start="shared")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^router_kwargs: got .*temperatur"):
            lazy(x, edge_index)
    assert lazy.state_dict() == {}
    assert lazy.experts is lazy.shared_expert is lazy.gain is None


# As the dense conv --------------------------------------------------------------------------------


def _gin(in_channels: Any, out_channels: int) -> MessagePassing:
    network = pyg.MLP([in_channels, out_channels, out_channels], norm="batch_norm")
    return pyg.GINConv(network)


class _OwnConv(pyg.SAGEConv):
    """A class that gmoe does not know."""


LAZY: dict[str, tuple[Any, dict[str, Any]]] = {
    "gcn": (pyg.GCNConv, {}),
    "sage": (pyg.SAGEConv, {}),
    "graph": (pyg.GraphConv, {}),
    "gat with dropout": (pyg.GATConv, {"heads": 2, "concat": False, "dropout": 0.3}),
    "gatv2": (pyg.GATv2Conv, {}),
    "transformer with dropout": (pyg.TransformerConv, {"dropout": 0.2}),
    "gated": (pyg.ResGatedGraphConv, {}),
    "cheb": (pyg.ChebConv, {"K": 2}),
    "a factory": (_gin, {}),
    "a class of one's own": (_OwnConv, {}),
}


def _two_layers(
    make: Callable[[int, int], nn.Module], given: Callable[[Tensor], Any], is_trained: bool
) -> tuple[Tensor, Tensor]:
    """What two lazy layers and a linear one give, and what torch would draw next."""
    x, edge_index = graph()
    torch.manual_seed(0)
    convs = [make(-1, 8), make(-1, 6)]
    last = nn.Linear(6, 3)
    edges = given(edge_index)
    with torch.no_grad():
        first = convs[1].train(is_trained)(convs[0].train(is_trained)(x, edges), edges)
        assert len(last(first)) == len(x)
        drawn = torch.rand(())
        h = convs[1].eval()(convs[0].eval()(x, edges), edges)
    return last(h), drawn


@pytest.mark.parametrize("start", ["shared", "copies"])
@pytest.mark.parametrize("name", LAZY)
def test_with_the_same_seed_a_lazy_layer_starts_as_its_lazy_conv(name: str, start: Any) -> None:
    conv, options = LAZY[name]

    def experts(in_channels: int, out_channels: int) -> nn.Module:
        return MoEConv(conv, in_channels, out_channels, num_experts=3, start=start, **options)

    def dense(in_channels: int, out_channels: int) -> nn.Module:
        return conv(in_channels, out_channels, **options)

    for is_trained in (True, False):
        expected, expected_next = _two_layers(dense, lambda edges: edges, is_trained)
        found, found_next = _two_layers(experts, lambda edges: edges, is_trained)
        # In training, the batch norm of experts has seen other rows.
        if conv is not _gin or not is_trained:
            torch.testing.assert_close(found, expected)
        assert found_next == expected_next


def test_a_lazy_layer_that_gets_a_graph_starts_as_its_lazy_conv() -> None:
    expected = _two_layers(pyg.SAGEConv, lambda edges: edges, is_trained=False)
    num_nodes = len(graph()[0])
    found = _two_layers(
        partial(MoEConv, "sage"), lambda edges: Graph(edges, num_nodes), is_trained=False
    )
    torch.testing.assert_close(found, expected)


def test_what_no_lazy_dense_conv_runs_on_is_drawn_by_the_first_call() -> None:
    x, edge_index = graph()
    for conv in (pyg.TAGConv, lambda i, o: pyg.GINConv(nn.Linear(i, o))):
        assert MoEConv(conv, -1, 4, num_experts=2)(x, edge_index).shape == (len(x), 4)
