"""Kinds of convs: names, factories, and what is refused."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch_geometric import nn as pyg

from gmoe import FilterConv, GNNMoE, MoEConv
from tests.gmoe.conv.masked import random_graph

WIDTH = 8
SHARED: Any = pyg.GINConv(nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("text", "cls"),
    [
        *(
            ("GCNConv", pyg.GCNConv),
            ("gat_v2", pyg.GATv2Conv),
            ("SAGE", pyg.SAGEConv),
            ("lowpass_", FilterConv),
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


def test_an_unknown_name_suggests_the_nearest() -> None:
    builds: list[Any] = [
        partial(MoEConv, "gatt"),
        partial(MoEConv, ["gcn", "gatt"]),
        partial(GNNMoE, 4, conv="gatt"),
    ]
    for build in builds:
        with pytest.raises(ValueError, match=r"conv: got 'gatt', .*did you mean 'gat'"):
            build(4, 4)


@pytest.mark.parametrize("text", ["gcm", "gnc"])
def test_of_equally_near_names_the_one_with_swapped_letters_or_the_same_start_is_suggested(
    text: str,
) -> None:
    with pytest.raises(ValueError, match="did you mean 'gcn'"):
        MoEConv(text, 4, 4)


@pytest.mark.parametrize(
    ("text", "name"), [("expert-choice", "expert_choice"), ("top_k", "token_choice")]
)
def test_an_unknown_router_suggests_the_nearest(text: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"^router: got '{text}', .*did you mean '{name}'"):
        MoEConv("gcn", 4, 4, router=text)


@pytest.mark.parametrize("cls", [pyg.GINConv, pyg.GINEConv])
def test_gin_gets_the_mlp_of_pygs_model(cls: Any) -> None:
    conv: Any = MoEConv(cls, 4, 6, train_eps=True, start="plain").expert(0)
    assert [tuple(lin.weight.shape) for lin in conv.nn.lins] == [(6, 4), (6, 6)]
    assert conv.eps.requires_grad


NOT_WIDTHS = [pyg.APPNP, pyg.EdgeConv, "agnn", ["gcn", pyg.APPNP]]
"""``APPNP(16, 8)`` would be 16 steps with a teleport probability of 8."""
OTHER_FORWARD: list[Any] = [
    lambda i, _: pyg.GCN2Conv(i, 0.1),
    lambda i, o: pyg.RGCNConv(i, o, num_relations=2),
    pyg.HypergraphConv,
]
TURNED = partial(pyg.SAGEConv, flow="target_to_source")


@pytest.mark.parametrize(
    ("conv", "kwargs", "message"),
    [
        *((conv, {}, r"conv: got \w+, which is built with") for conv in NOT_WIDTHS),
        *((conv, {}, r"conv: got \w+, whose forward takes") for conv in OTHER_FORWARD),
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
        *(
            ("gcn", {name: True}, f"^{name}: got a removed argument")
            for name in ("shared_expert", "dense_start")
        ),
        (
            "gcn",
            {"start": "dense"},
            "^start: got 'dense', expected one of 'copies', 'shared', 'plain'",
        ),
        (["gcn", "sage"], {"start": "copies"}, "^start: got 'copies' for several kinds"),
        (
            "gcn",
            {"start": "copies", "shared_transform": True},
            "^start: got 'copies' for several kinds or a shared",
        ),
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
