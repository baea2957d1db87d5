"""What is known about PyG's convs, and that all of them come out right, whichever way they are run."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn
from torch_geometric import nn as pyg

from gmoe import MoEConv
from gmoe.conv.base import StackedExperts
from gmoe.conv.graph import parameters_of
from gmoe.conv.kinds import CONVS, LOCAL, conv_factory
from gmoe.conv.separate import SeparateExperts
from tests.gmoe.conv.masked import assert_equals_masked, features, random_graph

WIDTH, NODES, EDGES = 8, 11, 40

FACTORIES: dict[str, Any] = {
    "cg": lambda i, _: pyg.CGConv(i),
    "simple": lambda *_: pyg.SimpleConv(),
    "edge": lambda i, o: pyg.EdgeConv(nn.Linear(2 * i, o)),
    "lg": lambda *_: pyg.LGConv(),
    "gine": lambda i, o: pyg.GINEConv(nn.Linear(i, o)),
    "appnp": lambda *_: pyg.APPNP(K=2, alpha=0.1),
    "nn": lambda i, o: pyg.NNConv(i, o, nn.Linear(WIDTH, i * o)),
}
"""Convs that are not built as ``(in, out)``."""

OPTIONS: dict[str, dict[str, Any]] = {
    "cheb": {"K": 3},
    "ssg": {"alpha": 0.1},
    "gcn": {"improved": True},
    "pna": {
        "aggregators": ["mean", "max"],
        "scalers": ["identity", "amplification"],
        "deg": torch.tensor([1, 3, 4, 2]),
    },
    "arma": {"num_stacks": 2, "num_layers": 2},
    "gat": {"heads": 2},
    "gatv2": {"heads": 2},
    "transformer": {"heads": 2},
    "general": {"attention": True},
    "gen": {"norm": None},
}

NOT_LOCAL = [
    *("agnn", "appnp", "arma", "cheb", "edge", "eg", "gatedgraph", "gen", "hypergraph", "lg", "mixhop", "nn", "pna"),
    *("sg", "ssg", "supergat", "tag"),
]
"""Some of them are (edge, gen, nn, ...), but not registered as such."""

LOCAL_BY_NAME = {name: cls for name, cls in CONVS.items() if cls in LOCAL}
SWEEP = ["gcn", *LOCAL_BY_NAME, *NOT_LOCAL]


def kind_of(name: str) -> Any:
    return FACTORIES.get(name, name)


@pytest.mark.filterwarnings("ignore:.*runs on the whole graph")
@pytest.mark.parametrize("name", SWEEP)
def test_all_convs_equal_masked(name: str) -> None:
    torch.manual_seed(0)
    conv = MoEConv(kind_of(name), WIDTH, WIDTH, num_experts=3, k=2, **OPTIONS.get(name, {})).double()
    edge_index = random_graph(NODES, NODES, EDGES)
    x = features(NODES, WIDTH)
    args: dict[str, Any] = {}
    if "edge_weight" in parameters_of(conv._prototypes()[0]) and name != "appnp":
        args["edge_weight"] = features(EDGES, seed=1).abs() + 0.1
    if name in ("gine", "nn"):
        args["edge_attr"] = features(EDGES, WIDTH, seed=1)
    assert_equals_masked(conv, x, edge_index, **args)


def test_sweep_covers_what_can_be_built() -> None:
    """A conv of another PyG version that is built and called as (in, out), (x, edge_index) belongs into the sweep."""
    left_out = []
    x, edge_index = features(NODES, WIDTH).float(), random_graph(NODES, NODES, EDGES)
    for name in sorted(CONVS.keys() - set(SWEEP) - {"meshcnn"}):  # which needs a regular graph
        try:
            conv_factory(name, {})(WIDTH, WIDTH)(x, edge_index)
        except Exception:
            continue
        left_out.append(name)
    assert left_out == []


def test_local_names_are_all_known() -> None:
    assert set(LOCAL_BY_NAME.values()) == set(LOCAL)


@pytest.mark.parametrize("name", LOCAL_BY_NAME)
def test_registered_as_local_takes_a_path_whose_cost_follows_k(name: str, recwarn: pytest.WarningsRecorder) -> None:
    conv = MoEConv(kind_of(name), WIDTH, WIDTH, num_experts=3)
    if isinstance(conv.experts, SeparateExperts):
        assert conv.experts.local == [True] * 3
    else:
        assert isinstance(conv.experts, StackedExperts)
    assert not [w for w in recwarn if "whole graph" in str(w.message)]


@pytest.mark.filterwarnings("ignore:.*runs on the whole graph")
@pytest.mark.parametrize("name", NOT_LOCAL)
def test_not_registered_is_not_taken_for_local(name: str) -> None:
    conv = MoEConv(kind_of(name), WIDTH, WIDTH, num_experts=2, **OPTIONS.get(name, {}))
    assert isinstance(conv.experts, SeparateExperts)
    assert conv.experts.local == [False] * 2


@pytest.mark.parametrize(
    ("text", "cls"),
    [
        ("gcn", pyg.GCNConv),
        ("GCNConv", pyg.GCNConv),
        ("gat_v2", pyg.GATv2Conv),
        ("SAGE", pyg.SAGEConv),
        ("res_gated_graph_conv", pyg.ResGatedGraphConv),
    ],
)
def test_names(text: str, cls: type) -> None:
    assert type(conv_factory(text, {})(4, 4)) is cls


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"conv: got 'gnc', expected one of 'agnn', .*'gcn', .*'sage'"):
        conv_factory("gnc", {})


@pytest.mark.parametrize("cls", [pyg.GINConv, pyg.GINEConv])
def test_gin_gets_the_perceptron_of_pygs_model(cls: Any) -> None:
    conv: Any = conv_factory(cls, {"train_eps": True})(4, 6)
    assert [tuple(lin.weight.shape) for lin in conv.nn.lins] == [(6, 4), (6, 6)]
    assert conv.eps.requires_grad


def test_kwargs_reach_the_conv() -> None:
    conv: Any = conv_factory("gat", {"heads": 3, "concat": False})(4, 6)
    assert (conv.heads, conv.concat) == (3, False)


def test_names_are_lower_case_and_classes_message_passing() -> None:
    assert all(name == name.lower() and not name.endswith("conv") for name in CONVS)
    assert all(inspect.isclass(cls) for cls in CONVS.values())
    assert all(issubclass(cls, pyg.MessagePassing) for cls in LOCAL)
