"""What is particular to GAT, GATv2 and TransformerConv experts. That they equal masked convs: ``test_experts.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch_geometric.nn import GATConv, GATv2Conv, TransformerConv

from gmoe import MoEConv
from gmoe.conv.separate import SeparateExperts
from tests.gmoe.conv.masked import GRAPHS, assert_equals_masked, features, routing_of, weights
from tests.gmoe.conv.test_experts import ATTENTION, build, edge_args, ids

IN, EDGE_DIM = 6, 3
CONVS = ["gat", "gatv2", "transformer"]


@pytest.mark.parametrize("conv", CONVS)
def test_one_set_of_nodes_for_two_layers(conv: str) -> None:
    """A tuple of widths with a single tensor: both ends are the same nodes, each through its own layer."""
    num_nodes, edge_index = GRAPHS["mixed"]
    layer = build(conv, {"heads": 2}, (IN, IN))
    assert_equals_masked(layer, features(num_nodes, IN), edge_index, weight_TE=weights(num_nodes))


@pytest.mark.parametrize("conv", CONVS)
def test_dropout_is_right_in_the_mean(conv: str) -> None:
    num_nodes, edge_index = GRAPHS["mixed"]
    x, routing = features(num_nodes, IN), routing_of(weights(num_nodes, "all"))
    layer = build(conv, {"heads": 2, "dropout": 0.5}, IN)
    expected = layer.eval()(x, edge_index, routing=routing)
    torch.testing.assert_close(build(conv, {"heads": 2}, IN)(x, edge_index, routing=routing), expected)
    layer.train()
    draws = torch.stack([layer(x, edge_index, routing=routing).detach() for _ in range(200)])
    error = draws.std(dim=0) / len(draws) ** 0.5
    assert float(draws.std(dim=0).max()) > 0.1
    assert ((draws.mean(dim=0) - expected).abs() <= 5 * error + 1e-12).all()
    plain: Any = [layer.expert(e) for e in range(3)]  # as the separate convs', draw by draw
    weight_TE = routing.to_dense()
    theirs = torch.stack(
        [sum(weight_TE[:, e, None] * plain[e](x, edge_index).detach() for e in range(3)) for _ in range(200)]
    )
    torch.testing.assert_close(draws.std(dim=0), theirs.std(dim=0), rtol=0.3, atol=1e-12)


@pytest.mark.parametrize(("conv", "kwargs"), ATTENTION[::2], ids=ids)
def test_autocast_gives_what_pyg_gives(conv: str, kwargs: dict[str, Any]) -> None:
    num_nodes, edge_index = GRAPHS["mixed"]
    layer = build(conv, kwargs)
    args = {name: value.float() for name, value in edge_args(layer, edge_index.size(1)).items()}
    layer, x = layer.float(), features(num_nodes, 4).float().requires_grad_()
    weight_TE = torch.zeros(num_nodes, 3)
    weight_TE[:, 1] = 1.0
    exact = layer(x, edge_index, **args, routing=routing_of(weight_TE))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain: Any = layer.expert(1)
        y = layer(x, edge_index, **args, routing=routing_of(weight_TE))
        assert y.dtype == plain(x, edge_index, **args).dtype
        y.sum().backward()  # here, where products would be cast
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("conv", "kwargs"), [*((conv, {"aggr": "mean"}) for conv in CONVS), ("gat", {"edge_dim": -1})], ids=ids
)
def test_other_options_run_one_by_one(conv: str, kwargs: dict[str, Any]) -> None:
    assert isinstance(MoEConv(conv, IN, 4, num_experts=2, router=None, **kwargs).experts, SeparateExperts)


def test_edge_features_that_do_not_fit() -> None:
    num_nodes, edge_index = GRAPHS["mixed"]
    x, attr = features(num_nodes, 4), features(edge_index.size(1), EDGE_DIM)
    routing = routing_of(weights(num_nodes))
    for cls in (GATv2Conv, TransformerConv):
        with pytest.raises(ValueError, match=f"edge_attr: got a tensor, .*{cls.__name__} was built with edge_dim=None"):
            build(cls, {})(x, edge_index, edge_attr=attr, routing=routing)
    with pytest.raises(ValueError, match=r"edge_attr: got None, expected a tensor of shape \(edges, 3\)"):
        build(TransformerConv, {"edge_dim": 3})(x, edge_index, routing=routing)
    for cls, kwargs in ((GATConv, {}), (GATConv, {"edge_dim": 3}), (GATv2Conv, {"edge_dim": 3})):  # as PyG has it
        assert_equals_masked(build(cls, kwargs), x, edge_index, weight_TE=weights(num_nodes))
    for edge_dim, given in ((None, attr), (1, attr[:, 0])):  # one feature an edge, as a vector
        layer = build(GATConv, {"edge_dim": edge_dim})
        assert_equals_masked(layer, x, edge_index, weight_TE=weights(num_nodes), edge_attr=given)
