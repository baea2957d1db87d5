"""Kinds of convs: names, factories, and what is refused."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric import nn as pyg

from gmoe import GNNMoE, MoEConv
from gmoe.conv.build import Trial
from gmoe.conv.kinds import (
    KINDS,
    Kind,
    base_kind_of,
    factory_of,
    kind_of,
    name_of,
)
from tests.helpers.masked import random_graph

WIDTH = 8
SHARED: Any = pyg.GINConv(nn.Linear(4, 4))
PNA = {"aggregators": ["mean"], "scalers": ["identity"], "deg": torch.tensor([1, 3])}


def built(cls: Any) -> Any:
    """A conv of a class that keeps the width."""
    options = PNA if cls is pyg.PNAConv else {}
    return factory_of(cls)(WIDTH, WIDTH, **options)


def call(conv: Any, x: Any) -> torch.Tensor:
    """The output of a conv at five destinations of nine sources."""
    given: dict[str, Any] = {}
    given |= {"edge_attr": torch.ones(20, WIDTH)} if isinstance(conv, pyg.GINEConv) else {}
    if x[1] is None:
        given["size"] = (9, 5)
    out: torch.Tensor = conv(x, random_graph(9, 5, 20), **given)
    return out


@pytest.mark.parametrize("cls", [cls for cls, kind in KINDS.items() if kind.is_local])
def test_a_class_that_is_said_to_be_local_is_local(cls: Any) -> None:
    assert Trial(built(cls), WIDTH).way(local=None) != "whole"


@pytest.mark.parametrize("cls", KINDS)
def test_a_class_takes_two_sets_of_nodes_if_it_is_said_to(cls: Any) -> None:
    try:
        takes_two_sets = call(built(cls), (torch.ones(9, WIDTH), torch.ones(5, WIDTH))).dim() == 2
    except (AttributeError, TypeError, ValueError):
        takes_two_sets = False
    assert takes_two_sets == kind_of(cls).takes_two_sets


STACKED = [cls for cls, kind in KINDS.items() if kind.stack]


@pytest.mark.parametrize("cls", [cls for cls in STACKED if kind_of(cls).takes_two_sets])
def test_a_class_that_needs_no_destinations_takes_them_for_zeros(cls: Any) -> None:
    x_src, conv = torch.randn(9, WIDTH), built(cls)
    zeros = call(conv, (x_src, torch.zeros(5, WIDTH)))
    if kind_of(cls).needs_destinations:
        with pytest.raises((AssertionError, TypeError)):
            call(conv, (x_src, None))
    else:
        torch.testing.assert_close(call(conv, (x_src, None)), zeros)


@pytest.mark.parametrize("conv", ["gcn", ["sage", "gcn"], "cluster_gcn"])
@pytest.mark.parametrize("local", [None, False])
def test_two_sets_of_nodes_are_refused_by_the_name_of_the_conv(conv: Any, local: Any) -> None:
    name = "ClusterGCNConv" if conv == "cluster_gcn" else "GCNConv"
    layer = MoEConv(conv, WIDTH, WIDTH, num_experts=2, local=local)
    with pytest.raises(ValueError, match=f"^x: got a tuple .*: {name} takes no bipartite input"):
        layer((torch.ones(9, WIDTH), torch.ones(5, WIDTH)), random_graph(9, 5, 20))
    with pytest.raises(ValueError, match=r"^in_channels: got .* expected one width"):
        MoEConv(conv, (WIDTH, WIDTH), WIDTH, num_experts=2, local=local)


@pytest.mark.parametrize("name", [name for kind in KINDS.values() for name in kind.names])
def test_a_name_of_a_row_stands_for_its_options(name: str) -> None:
    conv: Any = factory_of(name)(WIDTH, WIDTH)
    for option, value in kind_of(type(conv)).names[name].items():
        assert getattr(conv, option) == value


class OwnConv(pyg.SAGEConv):
    """A conv of a user's, which is built from one width alone."""

    def __init__(self, width: int, aggr: str = "mean") -> None:
        super().__init__(width, width, aggr)


def of_one_width(cls: Any, in_channels: Any, out_channels: int, **options: Any) -> OwnConv:
    return cls(in_channels, **options)


def test_a_row_may_be_added_at_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"custom": {}, "custom_sum": {"aggr": "sum"}}
    monkeypatch.setitem(KINDS, OwnConv, Kind(is_local=True, adapt=of_one_width, names=names))
    layer = MoEConv("custom_sum", WIDTH, WIDTH, num_experts=2)
    expert: Any = layer.experts.expert(0)
    assert isinstance(expert, OwnConv)
    assert expert.aggr == "sum"
    assert name_of(factory_of("custom")) == "OwnConv"
    assert GNNMoE(WIDTH, WIDTH, WIDTH, conv=OwnConv).config["conv"] == "custom"
    with pytest.raises(ValueError, match=r"^conv: got 'custm'.* did you mean 'custom'"):
        MoEConv("custm", WIDTH, WIDTH)


def test_a_subclass_is_unknown_but_has_a_base_that_is_known() -> None:
    cls = type("Mine", (pyg.GCNConv,), {})
    assert kind_of(cls) == kind_of(nn.Linear)
    assert kind_of(cls).stack is None
    assert base_kind_of(cls) is KINDS[pyg.GCNConv]


@pytest.mark.parametrize(
    ("text", "cls"),
    [
        *(
            ("GCNConv", pyg.GCNConv),
            ("gat_v2", pyg.GATv2Conv),
            ("SAGE", pyg.SAGEConv),
            ("gcn_", pyg.GCNConv),
        ),
        *(
            ("res_gated_graph_conv", pyg.ResGatedGraphConv),
            ("cg", pyg.CGConv),
            ("simple", pyg.SimpleConv),
        ),
    ],
)
def test_names(text: str, cls: type) -> None:
    layer = MoEConv(text, 4, 4, num_experts=2, start="plain")
    assert type(layer.expert(0)) is cls
    assert layer(torch.randn(5, 4), random_graph(5, 5, 9)).shape == (5, 4)


def test_edge_features_are_as_wide_as_the_option_of_the_conv_says() -> None:
    """Those of GINE are as wide as its sources where it does not transform them."""
    network = nn.Linear(WIDTH, 4)
    convs = {
        pyg.GATConv(WIDTH, WIDTH, edge_dim=3): 3,
        pyg.CGConv(WIDTH, dim=2): 2,
        pyg.SAGEConv(WIDTH, WIDTH): None,
        pyg.GINEConv(network): WIDTH,
        pyg.GINEConv(network, edge_dim=3): 3,
    }
    for conv, width in convs.items():
        assert kind_of(type(conv)).edge_width(conv, WIDTH) == width


def test_an_unknown_name_suggests_the_nearest() -> None:
    builds: list[Any] = [
        partial(MoEConv, "gatt"),
        partial(MoEConv, ["gcn", "gatt"]),
        partial(GNNMoE, 4, conv="gatt"),
    ]
    for build in builds:
        with pytest.raises(ValueError, match=r"conv: got 'gatt', .*did you mean 'gat'"):
            build(4, 4)


@pytest.mark.parametrize("cls", [pyg.GINConv, pyg.GINEConv])
def test_gin_gets_the_mlp_of_pygs_model(cls: Any) -> None:
    conv: Any = MoEConv(cls, 4, 6, train_eps=True, start="plain").expert(0)
    assert [tuple(lin.weight.shape) for lin in conv.nn.lins] == [(6, 4), (6, 6)]
    assert conv.eps.requires_grad


NOT_WIDTHS = [pyg.APPNP, pyg.EdgeConv, "agnn", ["gcn", pyg.APPNP]]
"""``APPNP(16, 8)`` would be 16 steps with a teleport probability of 8."""
OTHER_FORWARD: list[tuple[Any, str]] = [
    (lambda i, _: pyg.GCN2Conv(i, 0.1), r"one of \(x, edge_index"),
    (
        lambda i, o: pyg.RGCNConv(i, o, num_relations=2),
        r"a MoEConv for each relation in PyG's HeteroConv",
    ),
    (pyg.HypergraphConv, r"one of \(x, edge_index"),
]
TURNED = partial(pyg.SAGEConv, flow="target_to_source")


class Renamed(pyg.SAGEConv):
    """Names nodes and edges as it likes."""

    def forward(self, nodes: Any, links: Any) -> Tensor:
        out: Tensor = super().forward(nodes, links)
        return out


def test_a_conv_of_ones_own_may_name_nodes_and_edges_as_it_likes() -> None:
    x, edges = torch.randn(9, 2), random_graph(9, 9, 30)
    torch.manual_seed(0)
    expected = Renamed(2, 8)
    torch.manual_seed(0)
    layer = MoEConv(Renamed, 2, 8, num_experts=3, start="copies", local=True)
    torch.testing.assert_close(layer(x, edges), expected(x, edges))


@pytest.mark.parametrize(
    ("conv", "kwargs", "message"),
    [
        *((conv, {}, r"conv: got \w+, which is built with") for conv in NOT_WIDTHS),
        *(
            (conv, {}, rf"conv: got \w+, whose forward takes .* expected {expected}")
            for conv, expected in OTHER_FORWARD
        ),
        (
            [lambda i, _: pyg.FiLMConv(i, 8), lambda i, _: pyg.FiLMConv(i, 1)],
            {},
            r"conv: got .* widths \[1, 8\]",
        ),
        (["gcn", partial(pyg.GATConv, heads=2)], {}, r"conv: got .* widths \[8, 16\]"),
        (["sage", TURNED], {}, "conv: got experts of flows"),
        (lambda _, o: pyg.SAGEConv((-1, -1), o), {}, "conv: got SAGEConv of open widths"),
        (
            lambda i, _: pyg.GINConv(nn.Linear(i, 3)),
            {},
            "out_channels: got 8, but <lambda> gives 3",
        ),
        (lambda *_: pyg.APPNP(2, 0.1), {}, "out_channels: got 8, but <lambda> gives 4"),
        (
            "gcn",
            {"start": "dense"},
            "^start: got 'dense', expected one of 'copies', 'shared', 'plain'",
        ),
        (["gcn", "sage"], {"start": "copies"}, "^start: got 'copies' for several kinds"),
        ("simple", {}, "out_channels: got 8 for SimpleConv"),
        ("cg", {}, "out_channels: got 8 for CGConv"),
        *((wrong, {}, "conv: got ") for wrong in (None, [], [None, "gcn"])),
        (["gcn", "gat"], {"num_experts": 3}, "conv: got a list of 2 convs"),
        (lambda i, o: nn.Linear(i, o), {}, "conv: got a factory of Linear"),
        (lambda *_: SHARED, {}, "conv: got a factory whose convs share parameters"),
    ],
)
def test_refusals(conv: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEConv(conv, 4, 8, **{"start": "plain", **kwargs})


@pytest.mark.parametrize("value", [6.0, "6", None, (6,), True, -2, (3, 0)])
def test_bad_widths(value: Any) -> None:
    with pytest.raises(ValueError, match="in_channels: got "):
        MoEConv("sage", value, 4, start="plain")
    if not isinstance(value, tuple):
        with pytest.raises(ValueError, match="out_channels: got "):
            MoEConv("sage", 4, value, start="plain")


def test_a_class_of_ones_own_with_the_name_of_pygs_is_not_taken_for_it() -> None:
    cls = type("GCNConv", (pyg.SAGEConv,), {})
    layer = MoEConv(cls, (4, 6), 5, num_experts=2, local=True)
    assert layer((torch.randn(9, 4), torch.randn(7, 6)), random_graph(9, 7, 30)).shape == (7, 5)
