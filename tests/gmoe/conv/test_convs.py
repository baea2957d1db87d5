"""Filters and MLPs in the place of convs.

``tests/compose`` compares experts of them with masked convs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch_geometric.nn import GCNConv, SimpleConv

from gmoe import FilterConv, Graph, MLPConv
from gmoe.conv.convs import BareConv
from tests.helpers.equal import assert_same
from tests.helpers.masked import GRAPHS, coo, features, simple_graph

NODES, WIDTH = 7, 4


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("hops", [1, 2, 3])
def test_filters_are_what_they_say(hops: int, weighted: bool) -> None:
    """Powers of D^-1/2 (A + I) D^-1/2; of a :class:`Graph` too."""
    x, edge_index = features(NODES, WIDTH), simple_graph(NODES, NODES, loops=False)
    weight = features(edge_index.size(1), seed=2).abs() + 0.1 if weighted else None
    adj = coo(edge_index, (NODES, NODES), weight).to_dense() + torch.eye(NODES, dtype=torch.float64)
    scale = adj.sum(dim=1).rsqrt()
    low = torch.linalg.matrix_power(scale[:, None] * adj * scale, hops) @ x
    found: list[tuple[Any, Any]] = [
        (FilterConv(WIDTH, 3, hops=hops), low),
        (FilterConv(WIDTH, 3, filter="high_pass", hops=hops), x - low),
        (FilterConv(WIDTH, 3, filter="identity"), x),
    ]
    for conv, expected in found:
        y = conv.double()(x, edge_index, weight)
        torch.testing.assert_close(y, expected @ conv.lin.weight.T + conv.bias)
        assert torch.equal(conv(x, Graph(edge_index, NODES, edge_weight=weight)), y)


def test_one_low_pass_hop_is_gcn() -> None:
    num_nodes, edge_index = GRAPHS["mixed"]
    conv, gcn, x = (
        FilterConv(WIDTH, 3).double(),
        GCNConv(WIDTH, 3).double(),
        features(num_nodes, WIDTH),
    )
    gcn.load_state_dict(conv.state_dict())
    torch.testing.assert_close(conv(x, edge_index), gcn(x, edge_index))


def test_mlp_conv_is_an_mlp_of_the_destinations() -> None:
    plain, x = MLPConv((3, WIDTH), 5, hidden_channels=7, bias=False).double(), features(4, WIDTH)
    torch.testing.assert_close(plain((features(6, 3), x)), plain.down(plain.up(x).clamp(min=0)))


@pytest.mark.parametrize(
    ("bad", "name"), [({"filter": "band"}, "filter"), ({"filter": "identity", "hops": 2}, "hops")]
)
def test_bad_arguments(bad: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got"):
        FilterConv(WIDTH, 3, **bad)


@pytest.mark.parametrize("of", ["gcn", "sage"])
def test_a_bare_conv_is_pygs_without_its_weights(of: str) -> None:
    """Also on a matrix, with edge weights, and by gradients of the nodes."""
    x, edge_index = features(NODES, WIDTH).requires_grad_(), simple_graph(NODES, NODES, loops=False)
    weight = features(edge_index.size(1), seed=2).abs()
    bare = BareConv(WIDTH, WIDTH, of)  # type: ignore[arg-type]
    if of == "gcn":
        pyg: Any = GCNConv(WIDTH, WIDTH, bias=False).double()
        nn.init.eye_(pyg.lin.weight)
    else:
        pyg = SimpleConv("mean", combine_root="cat")
    pairs = [
        (bare(x, edge_index, weight), pyg(x, edge_index, weight)),
        (bare(x, edge_index), pyg(x, edge_index)),
        (bare(x, coo(edge_index, (NODES, NODES))), pyg(x, edge_index)),
    ]
    for found, expected in pairs:
        assert_same(found, expected)
        grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)]
        assert_same(*grads)


def test_a_bare_conv_keeps_its_width() -> None:
    with pytest.raises(ValueError, match="out_channels: got 5, expected in_channels=4"):
        BareConv(4, 5)
    with pytest.raises(ValueError, match="of: got 'gat'"):
        BareConv(4, 4, "gat")  # type: ignore[arg-type]
