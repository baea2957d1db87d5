"""GNNMoE: its layers and routers, its inference, and dense GNNs turned into one.

``tests/compose`` compares forward, inference and sampled batches with a composition of masked
layers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch_geometric import EdgeIndex
from torch_geometric.nn import (
    GAT,
    GCN,
    GIN,
    EdgeCNN,
    GATConv,
    GINConv,
    GraphSAGE,
    MixHopConv,
    TransformerConv,
)

from gmoe import GNNMoE, Graph, MoEConv, MultiCentroid, TokenChoice, moefy
from tests.helpers.equal import assert_same
from tests.helpers.masked import GRAPHS, csr, features

NODES, IN, HIDDEN, OUT, EXPERTS = 8, 4, 6, 3, 3
shared_routers = pytest.mark.parametrize(
    "shared_router", [False, True], ids=["own routers", "shared router"]
)


def model(**kwargs: Any) -> GNNMoE:
    torch.manual_seed(0)
    experts = None if isinstance(kwargs.get("conv"), list) else EXPERTS
    options = {
        "hidden_channels": HIDDEN,
        "out_channels": OUT,
        "num_layers": 3,
        "num_experts": experts,
        **kwargs,
    }
    # Noise would differ from call to call
    if options.get("router", "token_choice") == "token_choice":
        options.setdefault("router_kwargs", {"balance": None})
    return GNNMoE(IN, **{"start": "plain", **options}).double()


def graph() -> tuple[Tensor, Tensor]:
    return features(NODES, IN), GRAPHS["mixed"][1]


@pytest.mark.parametrize("jk", [None, "cat", "max", "last", "lstm"])
def test_dense_baseline_is_pygs_gcn(jk: str | None) -> None:
    x, edge_index = graph()
    kwargs: dict[str, Any] = {"dropout": 0.5, "act": "elu", "norm": "batch_norm", "jk": jk}
    dense = model(router=None, residual="none", **kwargs)
    plain = GCN(IN, HIDDEN, 3, OUT, **kwargs).double()
    dense.load_state_dict(plain.state_dict())
    for train in (True, False):
        outs = []
        for gnn in (dense.train(train), plain.train(train)):
            torch.manual_seed(1)
            outs.append(
                gnn(x, edge_index, edge_weight=torch.rand(edge_index.size(1), dtype=x.dtype))
            )
        assert_same(*outs)


@shared_routers
def test_routings_are_replayed_without_asking_a_router(shared_router: bool) -> None:
    gnn, (x, edge_index) = model(shared_router=shared_router).eval(), graph()
    y, routings = gnn(x, edge_index, return_routing=True)
    for router in [part for part in gnn.modules() if isinstance(part, TokenChoice)]:
        router.gate.weight.data.neg_()
    assert not torch.allclose(gnn(x, edge_index), y)
    replayed, used = gnn(x, edge_index, routings=routings, return_routing=True)
    assert_same(replayed, y)
    assert [*map(id, used)] == [*map(id, routings)]


@shared_routers
def test_routings_of_other_numbers_are_refused(shared_router: bool) -> None:
    gnn, (x, edge_index) = model(shared_router=shared_router).eval(), graph()
    _, routings = gnn(x, edge_index, return_routing=True)
    for given, got in (
        ([], "0"),
        ([None] * len(routings), "list"),
        (routings[0], "Routing"),
        (dict(enumerate(routings)), "dict"),
    ):
        expected = f"expected a list of {len(routings)} Routings, one a router"
        with pytest.raises(ValueError, match=f"^routings: got {got}, {expected}"):
            gnn(x, edge_index, routings=given)
    with pytest.raises(ValueError, match=r"^routing: got .*8 tokens.*, expected .* 9 tokens"):
        gnn(torch.cat([x, x[:1]]), edge_index, routings=routings)


@pytest.mark.parametrize("jk", [None, "cat"])
def test_heads_divide_the_hidden_width(jk: str | None) -> None:
    x, edge_index = graph()
    gnn = model(conv="gat", heads=2, jk=jk, edge_dim=5)
    assert gnn(x, edge_index, edge_attr=features(edge_index.size(1), 5)).shape == (NODES, OUT)
    assert gnn.convs[0].out_channels == HIDDEN // 2
    # Which are averaged
    assert model(conv="general", heads=4, jk=jk)(x, edge_index).shape == (
        NODES,
        OUT,
    )
    with pytest.raises(ValueError, match="hidden_channels: got 6"):
        model(conv="gat", heads=4)


@pytest.mark.parametrize(("jk", "router"), [(None, "token_choice"), ("cat", None)])
def test_heads_of_a_partial_are_those_of_the_model(jk: str | None, router: str | None) -> None:
    """The same weights and logits, of a kind and of a list whose kinds agree."""
    x, edge_index = graph()
    for options in ({"heads": 2}, {"heads": 3, "concat": False}):
        expected = model(conv=GATConv, jk=jk, router=router, **options)
        one: Any = partial(GATConv, **options)
        for conv in (one, [one] * EXPERTS):
            found = model(conv=conv, jk=jk, router=router)
            assert_same(found(x, edge_index), expected(x, edge_index))
    of_both: list[Any] = [partial(GATConv, heads=2, concat=False), "gcn"]
    mixed = model(conv=of_both, num_experts=None, jk=jk, router=router)
    assert mixed.convs[0].out_channels == HIDDEN  # not divided where kinds disagree
    averaged: Any = model(conv=partial(GATConv, concat=False), heads=2, jk=jk, router=None)
    assert averaged.convs[0].out_channels == HIDDEN
    with pytest.raises(ValueError, match=r"hidden_channels: got 6, expected a multiple of heads=4"):
        model(conv=partial(GATConv, heads=4), jk=jk, router=router)


@pytest.mark.filterwarnings("ignore:.*runs on the whole graph")
@pytest.mark.parametrize("jk", [None, "cat"])
@pytest.mark.parametrize("options", [{}, {"router": None}], ids=str)
def test_a_conv_of_another_width_is_refused(jk: str | None, options: dict[str, Any]) -> None:
    """When the model is built, not at the first call, and with what to do about heads."""
    convs: list[Any] = [
        lambda width, out: GATConv(width, out, heads=2),
        lambda width, out, **kwargs: TransformerConv(width, out, heads=2, **kwargs),
        lambda width, out: GINConv(nn.Linear(width, 2 * out)),
        partial(MixHopConv, powers=[0, 1]),
    ]
    for conv in convs:
        message = "which gives 12 columns for out_channels=6, expected 6; of .*heads"
        with pytest.raises(ValueError, match=rf"^conv: got \w+Conv, {message}"):
            model(conv=conv, jk=jk, **options)
    if options.get("router", "") is None:
        with pytest.raises(ValueError, match="which gives 6 columns for out_channels=3"):
            model(conv=convs[0], num_layers=1, **options)
    else:
        with pytest.raises(ValueError, match=r"conv: got experts of output widths \[6, 12\]"):
            model(conv=["gcn", partial(GATConv, heads=2)], jk=jk, **options)


@pytest.mark.parametrize("router", ["token_choice", None])
def test_sizes_may_be_integers_of_numpy(router: str | None) -> None:
    x, edge_index = graph()
    size: Any = np.int64
    counts = {"num_experts": size(2), "k": size(2), "every": size(1)}
    for options in ({}, {"conv": "gin", "jk": "lstm"}, {"conv": "gat", "heads": np.int64(2)}):
        common: dict[str, Any] = {"router": router, "dropout": np.float32(0), **options}
        torch.manual_seed(0)
        gnn = GNNMoE(size(IN), size(HIDDEN), size(OUT), size(3), **common | counts)
        torch.manual_seed(0)
        expected = GNNMoE(IN, HIDDEN, OUT, 3, num_experts=2, k=2, **common)
        assert_same(gnn.eval()(x.float(), edge_index), expected.eval()(x.float(), edge_index))


def sampled() -> tuple[Tensor, Tensor, dict[str, list[int]]]:
    """As NeighborLoader gives it: nodes and edges hop by hop, seeds first."""
    edges = [[(3, 0), (4, 0), (5, 1), (1, 2)], [(6, 3), (7, 4), (0, 5), (8, 5)], [(9, 6), (3, 7)]]
    edge_index = torch.tensor([edge for hop in edges for edge in hop]).T.contiguous()
    hops = {
        "num_sampled_nodes_per_hop": [3, 3, 3, 1],
        "num_sampled_edges_per_hop": [len(hop) for hop in edges],
    }
    return features(10, IN), edge_index, hops


@shared_routers
@pytest.mark.parametrize("jk", [None, "cat"])
def test_trimming_does_not_change_the_seeds(shared_router: bool, jk: str | None) -> None:
    """Edge arguments, a batch and the shared decision are trimmed with a graph.

    That holds for a Graph and an EdgeIndex, too.
    """
    x, edge_index, hops = sampled()
    args: dict[str, Any] = {
        "edge_weight": features(10, seed=4).abs(),
        "edge_attr": features(10, 2, seed=4),
    }
    conv: list[Any] = ["graph", "sage", partial(GATConv, edge_dim=2, add_self_loops=False)]
    gnn = model(conv=conv, shared_router=shared_router, jk=jk, norm=nn.LayerNorm(HIDDEN))
    trimmed, routings = gnn(x, edge_index, **args, **hops, return_routing=True)
    assert_same(trimmed[:3], gnn(x, edge_index, **args)[:3])
    for adj in (Graph(edge_index, 10), EdgeIndex(edge_index, sparse_size=(10, 10))):
        assert_same(gnn(x, adj, **args, **hops), trimmed)
    assert shared_router or [r.num_tokens for r in routings] == ([10, 9, 6] if jk else [10, 9])
    batch = torch.tensor([0, 0, 1, 0, 0, 1, 0, 0, 1, 0])
    assert gnn(x, edge_index, batch=batch, **args, **hops).isfinite().all()
    with pytest.raises(ValueError, match="edge_index: got a sparse matrix"):
        model(shared_router=shared_router)(x, csr(edge_index, (10, 10)), **hops)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_layers": 1}, "num_layers: got 1, expected at least 2, or a jk"),
        ({"conv": "bare_sage"}, "out_channels: got 6 for SimpleConv, expected in_channels=4"),
        ({"mix": "weights"}, "mix: got 'weights', expected"),
        ({"router_input": "graph"}, "router_input: got 'graph', expected one of"),
        ({"num_layers": 0}, "num_layers: got 0"),
        ({"router_input": "output"}, "router_input: got 'output'"),
        ({"residual": True}, "residual: got True"),
        ({"jk": "mean"}, "jk: got 'mean'"),
        ({"router": "nobody", "shared_router": True}, "router: got 'nobody'"),
        (
            {"router": TokenChoice(IN, num_experts=EXPERTS)},
            "router: got an instance for several layers",
        ),
        (
            {"router": MultiCentroid(2 * IN, num_experts=EXPERTS), "shared_router": True},
            "router: got an instance for dim=8",
        ),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**kwargs)


@shared_routers
def test_bad_input(shared_router: bool) -> None:
    x, edge_index = graph()
    gnn = model(conv="sage", shared_router=shared_router)
    for given, adj, options, message in (
        (features(NODES, 5), edge_index, {}, r"x: got shape \(8, 5\)"),
        (x, None, {}, "edge_index: got NoneType"),
        (x, Graph(edge_index, 9), {}, "edge_index: got Graph.*expected 8 sources"),
        (
            x,
            Graph(edge_index, 8, flow="target_to_source"),
            {},
            "edge_index: got Graph.* of flow 'target_to_source'",
        ),
        (x, edge_index, {"batch": torch.zeros(3).long()}, r"batch: got shape \(3,\)"),
        (
            x,
            edge_index,
            {"edge_weight": torch.ones(13)},
            "edge_weight: got a tensor, but no conv of the model",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            gnn(given, adj, **options)


DENSE: list[tuple[Any, dict[str, Any]]] = [
    (GCN, {"jk": "cat", "norm": "layer_norm", "act": "elu"}),
    (GraphSAGE, {}),
    (GIN, {"train_eps": True, "jk": "max"}),
    (GAT, {"heads": 2, "v2": True}),
    (EdgeCNN, {}),
]


@pytest.mark.filterwarnings("ignore:.*runs on the whole graph")
@pytest.mark.parametrize(("cls", "kwargs"), DENSE, ids=lambda v: getattr(v, "__name__", str(v)))
def test_moefy_starts_as_the_dense_model(cls: Any, kwargs: dict[str, Any]) -> None:
    """In place: all convs but an output conv; see ``test_convert.py``."""
    x, edge_index = graph()
    dense = cls(IN, HIDDEN, 3, OUT, **kwargs).double()
    expected = [dense.train(training)(x, edge_index) for training in (True, False)]
    moe: Any = moefy(dense, router="expert_choice", num_experts=EXPERTS)
    assert moe is dense
    assert [isinstance(conv, MoEConv) for conv in moe.convs] == [True, True, "jk" in kwargs]
    assert not moe.training
    for training, y in zip((True, False), expected, strict=True):
        assert_same(moe.train(training)(x, edge_index), y)
    moe(x, edge_index).sum().backward()
    assert all(p.grad is not None for p in moe.parameters())
