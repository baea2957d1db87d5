"""GNNMoE against a composition of masked layers, its inference against its forward, and dense GNNs turned into it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.loader import NodeLoader
from torch_geometric.nn import (
    GAT,
    GCN,
    GIN,
    FeaStConv,
    FiLMConv,
    GATConv,
    GCNConv,
    GraphSAGE,
    LayerNorm,
    MessagePassing,
    PNAConv,
    SAGEConv,
    to_hetero,
)

from gmoe import (
    GNNMoE,
    Graph,
    MoEConv,
    MultiCentroid,
    NeighborSampler,
    OracleRouter,
    Routing,
    TokenChoice,
    moefy,
    record_routing,
)
from gmoe.conv.graph import Edges, parameters_of
from gmoe.routing import GAIN_SCALE
from tests.gmoe.conv.masked import (
    FORMS,
    GRAPHS,
    csr,
    default_float64,
    features,
    masked,
    mean_of_in_edges,
    random_graph,
    simple_graph,
)

NODES, IN, HIDDEN, OUT, EXPERTS = 8, 4, 6, 3, 3
shared_routers = pytest.mark.parametrize("shared_router", [False, True], ids=["own routers", "shared router"])


def model(**kwargs: Any) -> GNNMoE:
    torch.manual_seed(0)
    experts = None if isinstance(kwargs.get("conv"), list) else EXPERTS
    options = {"hidden_channels": HIDDEN, "out_channels": OUT, "num_layers": 3, "num_experts": experts, **kwargs}
    if options.get("router", "token_choice") == "token_choice":  # noise would differ from call to call
        options.setdefault("router_kwargs", {"balance": None})
    gnn = GNNMoE(IN, **{"shared_expert": False, **options}).double()
    for name, parameter in gnn.named_parameters():
        if name.endswith("gain"):  # so that the routed experts count
            torch.nn.init.constant_(parameter, 2.0)
    return gnn


def graph() -> tuple[Tensor, Tensor]:
    return features(NODES, IN), GRAPHS["mixed"][1]


def assert_same(a: Tensor, b: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def by_hand(gnn: GNNMoE, x: Tensor, adj: Any, routings: list[Routing], **edge_args: Tensor) -> Tensor:
    """The model as a composition of masked PyG convs, in evaluation."""
    decisions, xs = iter(routings * (gnn.num_layers if gnn.shared_router is not None else 1)), []
    x = x if gnn.lin_in is None else gnn.lin_in(x)
    for layer, conv in enumerate(gnn.convs):
        if isinstance(conv, MoEConv):
            convs = [conv.experts.expert(e) for e in range(conv.num_experts)]
            out = masked(convs, x, adj, next(decisions), **edge_args)
            out = out if conv.gain is None else GAIN_SCALE * conv.gain * out
            if conv.shared_expert is not None:
                out = out + masked([conv.shared_expert.expert(0)], x, adj, Routing.everyone(len(x), out), **edge_args)
        else:
            out = conv(x, adj, **{name: v for name, v in edge_args.items() if name in parameters_of(conv)})
        if layer < len(gnn.residuals):
            out = out + gnn.residuals[layer](x)
        if layer < gnn.num_layers - 1 or gnn.jk_mode is not None:
            out = gnn.act(gnn.norms[layer](out))
        x = out
        xs.append(x)
    return gnn.lin(gnn.jk(xs)) if gnn.jk_mode is not None else x


def edge_args(gnn: GNNMoE, num_edges: int, width: int = 2) -> dict[str, Tensor]:
    """What some conv of the model takes."""
    names = {
        name for conv in gnn.convs for name in (conv.edge_names if isinstance(conv, MoEConv) else parameters_of(conv))
    }
    found = {"edge_weight": features(num_edges, seed=4).abs() + 0.1, "edge_attr": features(num_edges, width, seed=5)}
    return {name: value for name, value in found.items() if name in names}


KINDS: dict[str, dict[str, Any]] = {
    "gcn": {"conv": "gcn"},
    "gcn improved": {"conv": "gcn", "improved": True},
    "gcn without loops": {"conv": "gcn", "add_self_loops": False},
    "sage": {"conv": "sage"},
    "sage narrow": {"conv": "sage", "num_experts": 2, "hidden_channels": 2},
    "sage max": {"conv": "sage", "aggr": "max"},
    "graph": {"conv": "graph"},
    "gin": {"conv": "gin"},
    "gat": {"conv": "gat", "heads": 2, "edge_dim": 2},
    "gatv2": {"conv": "gatv2", "edge_dim": 2},
    "transformer": {"conv": "transformer", "heads": 2, "edge_dim": 2},
    "gated": {"conv": "res_gated_graph", "edge_dim": 2},
    "mlp": {"conv": "mlp"},
    "filters": {"conv": ["low_pass", "identity", "high_pass", "two_hop"]},
    "mixed": {"conv": ["gcn", "gat", "mlp", "sage"]},
    "edge arguments": {"conv": ["gcn", "le", "film", partial(GATConv, edge_dim=2)]},
    "both flows": {"conv": ["sage", partial(SAGEConv, flow="target_to_source"), "gat"]},
}

OPTIONS: list[dict[str, Any]] = [
    {},
    {"norm": "layer_norm", "shared_router": True, "router_input": ("node", "neighbors"), "router_hops": 2},
    {"jk": "cat", "shared_expert": True, "router": "expert_choice", "k": 2},
    {
        **{"in_proj": True, "every": 2, "residual": "linear", "norm": "batch_norm", "jk": "lstm"},
        **{"router": "multi_centroid", "router_input": ("degree", "neighbors"), "shared_expert": "mlp"},
    },
    {"jk": "max", "shared_router": True, "router": "attention_vote", "residual": "none"},
]


def trained(**kwargs: Any) -> GNNMoE:
    """With a few training steps' worth of statistics."""
    gnn = model(**kwargs)
    edges = random_graph(23, 23, 70, seed=9)
    with torch.no_grad():
        for _ in range(3):
            gnn.train()(features(23, IN, seed=9), edges, **edge_args(gnn, 70))
    return gnn.eval()


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(map(str, o.values())) or "default")
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_inference_equal_a_composition_of_masked_layers(kind: str, options: dict[str, Any]) -> None:
    """On plain edges, and on one Graph that is passed in their place to all calls."""
    if len(KINDS[kind]) > 1 and "shared_expert" in options:  # the convs' arguments are for a shared expert too
        options = {**options, "shared_expert": True}
    gnn = trained(**KINDS[kind], **options)
    x, edges = features(23, IN), random_graph(23, 23, 70)
    args = edge_args(gnn, 70)
    built = Graph(edges, 23, edge_weight=args.get("edge_weight"), edge_attr=args.get("edge_attr"))
    for given in (args, {}) if kind in ("gcn", "graph", "filters") else (args,):
        logits, routings = gnn(x, edges, **given, return_routing=True)
        assert_same(logits, by_hand(gnn, x, edges, routings, **given))
        for batch_size in (1, 6, 100) if options == {} else (6,):
            found, again = gnn.inference(Data(x, edges, **given), batch_size=batch_size, return_routing=True)
            assert_same(found, logits)
            assert len(again) == len(routings)
            for own, other in zip(again, routings, strict=True):
                assert_same(own.to_dense(), other.to_dense())
        if given:
            assert torch.equal(gnn(x, built), logits)
            assert torch.equal(gnn(x, built), logits)
            assert_same(gnn.inference(Data(x=x, edge_index=built), batch_size=6), logits)


@shared_routers
@pytest.mark.parametrize("conv", ["gcn", "sage", "gat", ["gcn", "gat", "le"]], ids=str)
def test_the_other_flow(conv: Any, shared_router: bool) -> None:
    """Layers, inference and a shared router's neighbors follow ``flow``: as the default flow on flipped edges."""
    options: dict[str, Any] = {
        "router_input": ("node", "neighbors", "degree"),
        "router_hops": 2,
        "shared_router": shared_router,
    }
    x, edges = features(23, IN), random_graph(23, 23, 70)
    turned = model(conv=conv, flow="target_to_source", **options).eval()
    plain = model(conv=conv, **options).eval()
    plain.load_state_dict(turned.state_dict())
    expected = plain(x, edges.flip(0))
    assert not torch.allclose(plain(x, edges), expected)
    for given in (edges, Graph(edges, 23)):
        assert_same(turned(x, given), expected)
        assert_same(turned.inference(Data(x=x, edge_index=given), batch_size=6), expected)
    if shared_router:
        mean = mean_of_in_edges(x, edges.flip(0))
        degree = torch.bincount(edges[0], minlength=23).double().log1p()[:, None]
        view = torch.cat([x, mean, mean_of_in_edges(mean, edges.flip(0)), degree], dim=1)
        torch.testing.assert_close(turned.router_view(x, edges), view)
        assert turned.shared_router is not None
        assert_same(turned.decide(x, edges).to_dense(), turned.shared_router(view).to_dense())


@shared_routers
@pytest.mark.parametrize("router", [None, "expert_choice"])
@pytest.mark.parametrize("conv", ["gcn", "sage", "graph", "gin", ["low_pass", "high_pass", "gcn", "mlp"]], ids=str)
def test_values_of_a_sparse_matrix(conv: Any, router: str | None, shared_router: bool) -> None:
    ends = simple_graph(23, 23)
    adj = csr(ends, (23, 23), features(ends.size(1), seed=4).abs() + 0.1)
    gnn, x = trained(conv=conv, router=router, shared_router=shared_router), features(23, IN)
    logits, routings = gnn(x, adj, return_routing=True)
    assert_same(logits, by_hand(gnn, x, adj, routings))
    assert_same(gnn.inference(Data(x=x, edge_index=adj), batch_size=6), logits)
    assert torch.equal(gnn(x, Graph(adj, 23)), logits)


@shared_routers
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_the_edges(form: str, shared_router: bool) -> None:
    edges, x = simple_graph(9, 9, loops=False), features(9, IN)
    gnn = model(shared_router=shared_router, router_input=("node", "neighbors"))
    adj = FORMS[form](edges, (9, 9))
    with default_float64():
        assert_same(gnn(x, adj), gnn(x, edges))
        assert_same(gnn(x, Graph(adj, 9)), gnn(x, edges))


@shared_routers
def test_a_forward_sorts_plain_edges_once_and_a_graph_never_again(
    shared_router: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, edges = graph()
    gnn = model(num_layers=6, shared_router=shared_router, router_input=("node", "neighbors"))
    calls: list[Any] = []
    plain = Edges.sorted

    def watched(*args: Any) -> Any:
        calls.append(args)
        return plain(*args)

    monkeypatch.setattr(Edges, "sorted", staticmethod(watched))
    gnn(x, edges)
    assert len(calls) == 1
    built = Graph(edges, NODES)
    calls.clear()
    for _ in range(3):
        gnn(x, built)
    assert len(calls) == 1
    gnn(x, built).sum().backward()  # the transpose of the graph's own edges
    calls.clear()
    gnn(x, built).sum().backward()
    assert not calls


@pytest.mark.parametrize(
    ("kwargs", "moe_layers"),
    [
        ({}, [0, 1]),
        ({"jk": "last"}, [0, 1, 2]),
        ({"jk": "cat", "every": 2}, [1]),
        ({"num_layers": 6, "every": 2}, [1, 3]),
        ({"num_layers": 4, "every": 3, "jk": "max"}, [2]),
        ({"num_layers": 1, "jk": "last"}, [0]),
        ({"router": None}, []),
    ],
    ids=str,
)
def test_which_layers_are_moe(kwargs: dict[str, Any], moe_layers: list[int]) -> None:
    gnn = model(**kwargs)
    assert [i for i, conv in enumerate(gnn.convs) if isinstance(conv, MoEConv)] == moe_layers
    logits, routings = gnn(*graph(), return_routing=True)
    assert logits.shape == (NODES, OUT)
    assert len(routings) == len(moe_layers)


@pytest.mark.parametrize("kwargs", [{"dropout": 0.5}, {"act": "elu", "act_first": True, "norm": "batch_norm"}], ids=str)
@pytest.mark.parametrize("jk", [None, "cat", "max", "last", "lstm"])
def test_dense_baseline_is_pygs_gcn(jk: str | None, kwargs: dict[str, Any]) -> None:
    x, edge_index = graph()
    dense = model(router=None, residual="none", jk=jk, **kwargs)
    plain = GCN(IN, HIDDEN, 3, OUT, jk=jk, **kwargs).double()
    assert dense.state_dict().keys() == plain.state_dict().keys()
    dense.load_state_dict(plain.state_dict())
    for train in (True, False):
        outs = []
        for gnn in (dense.train(train), plain.train(train)):
            torch.manual_seed(1)
            outs.append(gnn(x, edge_index, edge_weight=torch.rand(edge_index.size(1), dtype=x.dtype)))
        assert_same(*outs)


class Watched:
    """What each MoE layer was told to follow, and what routers saw."""

    def __init__(self, gnn: GNNMoE) -> None:
        self.followed: list[Routing] = []
        self.seen: list[Tensor] = []
        for name, module in gnn.named_modules():
            if isinstance(module, MoEConv):
                module.register_forward_hook(lambda _, __, out: self.followed.append(out[1]))
            if name.endswith("router"):
                module.register_forward_pre_hook(lambda _, args: self.seen.append(args[0]))


@pytest.mark.parametrize("hops", [1, 2])
@pytest.mark.parametrize("router_input", ["node", "neighbors", ("node", "neighbors")], ids=str)
def test_a_shared_router_decides_once_and_all_layers_follow(router_input: Any, hops: int) -> None:
    x, edge_index = graph()
    gnn = model(shared_router=True, router_input=router_input, router_hops=hops, num_layers=4)
    watched = Watched(gnn)
    _, routings = gnn(x, edge_index, return_routing=True)
    assert len(routings) == 1
    assert len(watched.followed) == 3
    assert all(followed is routings[0] for followed in watched.followed)
    seen = [x]
    for _ in range(hops):
        seen.append(mean_of_in_edges(seen[-1], edge_index))
    expected = {"node": seen[:1], "neighbors": seen[1:]}.get(router_input, seen)
    torch.testing.assert_close(watched.seen, [torch.cat(expected, dim=1)])
    assert torch.equal(gnn.decide(x, edge_index).to_dense(), routings[0].to_dense())


def test_own_routers_see_each_layers_own_input() -> None:
    x, edge_index = graph()
    gnn = model(conv="sage", router_input=("node", "neighbors"))
    watched = Watched(gnn)
    _, routings = gnn(x, edge_index, return_routing=True)
    assert len(routings) == 2
    h = (gnn.convs[0](x, edge_index, routing=routings[0]) + gnn.residuals[0](x)).relu()
    expected = [torch.cat([value, mean_of_in_edges(value, edge_index)], dim=1) for value in (x, h)]
    torch.testing.assert_close(watched.seen, expected)
    with pytest.raises(ValueError, match="shared_router: got False, expected True"):
        gnn.decide(x, edge_index)


@shared_routers
@pytest.mark.parametrize("norm", [None, "graph_norm", "instance_norm", LayerNorm(HIDDEN)], ids=str)
@pytest.mark.parametrize("router", ["expert_choice", "attention_vote"])
def test_graphs_of_a_batch_are_groups(router: str, norm: Any, shared_router: bool) -> None:
    gnn = model(router=router, shared_router=shared_router, norm=norm, k=2)
    graphs = [Data(features(n, IN, seed=n), random_graph(n, n, 3 * n, seed=n)) for n in (5, 7, 5)]
    alone = [gnn(g.x, g.edge_index, batch=torch.zeros(g.num_nodes, dtype=torch.long)) for g in graphs]
    data = Batch.from_data_list(graphs)
    together = gnn(data.x, data.edge_index, batch=data.batch)
    assert_same(together, torch.cat(alone), atol=1e-6)
    assert_same(
        gnn.eval().inference(Data(x=data.x, edge_index=data.edge_index, batch=data.batch), batch_size=6),
        gnn(data.x, data.edge_index, batch=data.batch),
    )


def test_normalization_sees_the_batch_size() -> None:
    x, edge_index = graph()
    batch = torch.tensor([0, 0, 0, 0, 0, 0, 2, 2])  # graph 1 and 3 are empty
    gnn = model(norm="graph_norm")
    assert_same(gnn(x, edge_index, batch=batch, batch_size=4), gnn(x, edge_index, batch=batch))


@pytest.mark.parametrize("conv", ["gat", "gatv2", "transformer"])
@pytest.mark.parametrize("jk", [None, "cat"])
def test_heads_divide_the_hidden_width(conv: str, jk: str | None) -> None:
    x, edge_index = graph()
    gnn = model(conv=conv, heads=2, jk=jk, edge_dim=5)
    assert gnn(x, edge_index, edge_attr=features(edge_index.size(1), 5)).shape == (NODES, OUT)
    assert gnn.convs[0].out_channels == HIDDEN // 2
    with pytest.raises(ValueError, match="hidden_channels: got 6, expected a multiple of heads=4"):
        model(conv=conv, heads=4)


def test_edge_arguments_that_no_conv_takes() -> None:
    x, edge_index = graph()
    with pytest.raises(ValueError, match="edge_weight: got a tensor, but no conv of the model takes it"):
        model(conv="sage")(x, edge_index, edge_weight=torch.ones(edge_index.size(1)))
    with pytest.raises(ValueError, match="edge_attr: got a tensor, but no conv of the model takes it"):
        model(conv=["gcn", "mlp", "le"])(x, edge_index, edge_attr=torch.ones(edge_index.size(1), 1))


@shared_routers
def test_all_nodes_on_one_expert_is_the_dense_model_of_that_expert(shared_router: bool) -> None:
    x, edge_index = graph()
    oracle = lambda dim, n: OracleRouter(dim, n, torch.full((NODES,), 1))  # noqa: E731
    gnn = model(router=oracle, shared_router=shared_router, residual="none")
    dense = GCN(IN, HIDDEN, 3, OUT).double()
    for mine, plain in zip(gnn.convs, dense.convs, strict=True):
        plain.load_state_dict((mine.expert(1) if isinstance(mine, MoEConv) else mine).state_dict())
    assert_same(gnn(x, edge_index), dense(x, edge_index))
    with record_routing(gnn) as routings:
        _, returned = gnn(x, edge_index, return_routing=True)
    assert len(routings) == len(returned)
    assert all(a is b and (a.to_dense().argmax(1) == 1).all() for a, b in zip(routings, returned, strict=True))


def sampled() -> tuple[Tensor, Tensor, dict[str, list[int]]]:
    """As NeighborLoader gives it: nodes and edges hop by hop, seeds first."""
    edges = [[(3, 0), (4, 0), (5, 1), (1, 2)], [(6, 3), (7, 4), (0, 5), (8, 5)], [(9, 6), (3, 7)]]
    edge_index = torch.tensor([edge for hop in edges for edge in hop]).T.contiguous()
    hops = {"num_sampled_nodes_per_hop": [3, 3, 3, 1], "num_sampled_edges_per_hop": [len(hop) for hop in edges]}
    return features(10, IN), edge_index, hops


@shared_routers
@pytest.mark.parametrize("jk", [None, "last", "cat"])
@pytest.mark.parametrize("router", ["token_choice", "multi_centroid", "random", "uniform"])
def test_trimming_does_not_change_the_seeds(router: str, shared_router: bool, jk: str | None) -> None:
    x, edge_index, hops = sampled()
    gnn = model(router=router, shared_router=shared_router, jk=jk, conv="sage", norm=nn.LayerNorm(HIDDEN))
    trimmed, routings = gnn(x, edge_index, **hops, return_routing=True)
    assert_same(trimmed[:3], gnn(x, edge_index)[:3])
    assert len(trimmed) < 10
    if not shared_router:
        assert [r.num_tokens for r in routings] == ([10, 9, 6] if jk else [10, 9])
    with pytest.raises(ValueError, match="edge_index: got a Graph"):
        gnn(x, Graph(edge_index, 10), **hops)


def test_trimming_takes_edge_arguments_and_batch_along() -> None:
    x, edge_index, hops = sampled()
    weight, attr = features(10, seed=4).abs(), features(10, 2, seed=4)
    gnn = model(conv="graph", shared_router=True)
    assert_same(gnn(x, edge_index, weight, **hops)[:3], gnn(x, edge_index, weight)[:3])
    gnn = model(conv="gat", edge_dim=2, add_self_loops=False)
    assert_same(gnn(x, edge_index, edge_attr=attr, **hops)[:3], gnn(x, edge_index, edge_attr=attr)[:3])
    batch = torch.tensor([0, 0, 1, 0, 0, 1, 0, 0, 1, 0])
    assert model(conv="sage", router="expert_choice")(x, edge_index, batch=batch, **hops).isfinite().all()
    with pytest.raises(ValueError, match="edge_attr: got edge_weight too"):
        gnn(x, edge_index, weight, attr, **hops)


@pytest.mark.parametrize(
    "kwargs", [{}, {"shared_router": True, "in_proj": True}, {"jk": "lstm", "residual": "linear"}], ids=str
)
def test_reset_parameters_draws_all_anew(kwargs: dict[str, Any]) -> None:
    gnn = model(norm="batch_norm", **kwargs)
    with torch.no_grad():
        for parameter in gnn.parameters():
            parameter.fill_(9.0)
    gnn.reset_parameters()
    assert not any((parameter == 9.0).any() for parameter in gnn.parameters())


def test_the_first_kind_of_a_list_is_the_dense_one() -> None:
    gnn = model(conv=["sage", "gat", "graph"])
    assert [type(gnn.convs[0].expert(i)).__name__ for i in range(3)] == ["SAGEConv", "GATConv", "GraphConv"]
    assert type(gnn.convs[2]).__name__ == "SAGEConv"
    assert repr(gnn) == "GNNMoE(4, 6, 3, num_layers=3, shared_router=False)"


def test_a_model_of_mixed_experts_and_a_shared_one_learns() -> None:
    torch.manual_seed(0)
    x, edge_index = features(30, IN).float(), random_graph(30, 30, 90)
    y = (x[:, 0] > 0).long()
    gnn = model(conv=["gcn", "sage", "mlp", "identity"], k=2, shared_expert=True).float()
    optimizer = torch.optim.Adam(gnn.parameters(), lr=0.02)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(gnn(x, edge_index), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_layers": 1}, "every: got 1 with num_layers=1 and jk=None, which leaves no hidden layer for a MoE"),
        ({"every": 3}, "every: got 3 with num_layers=3 and jk=None, which leaves no hidden layer"),
        ({"every": 0}, "every: got 0, expected at least 1"),
        ({"num_layers": 0}, "num_layers: got 0, expected at least 1"),
        ({"router_hops": 0}, "router_hops: got 0, expected at least 1"),
        ({"router_input": "output"}, "router_input: got 'output', expected one of 'node', 'neighbors', 'degree'"),
        ({"residual": True}, "residual: got True, expected one of 'none', 'identity', 'linear'"),
        ({"router": "nobody"}, "router: got 'nobody', expected one of 'token_choice'"),
        ({"router": "nobody", "shared_router": True}, "router: got 'nobody', expected one of 'token_choice'"),
        ({"k": 4}, "k: got 4, expected at most num_experts=3"),
        ({"k": 0, "shared_router": True}, "k: got 0, expected at least 1"),
        ({"num_experts": 0}, "num_experts: got 0, expected at least 1"),
        ({"conv": "gcnn"}, "conv: got 'gcnn', expected one of 'agnn'.* did you mean 'gcn'"),
        ({"conv": ["gcn", "gat"], "num_experts": 3}, "conv: got a list of 2 convs, expected num_experts=3"),
        ({"router": TokenChoice(IN, EXPERTS)}, "router: got an instance for several layers"),
        ({"router": MultiCentroid(2 * IN, EXPERTS), "shared_router": True}, "router: got an instance for dim=8"),
        ({"router_kwargs": {"weight": "normalized"}}, "weight: got 'normalized' with k=1"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**kwargs)


@shared_routers
def test_bad_input(shared_router: bool) -> None:
    x, edge_index = graph()
    gnn = model(shared_router=shared_router, check_finite=True)
    for given, edges, options, message in (
        (features(NODES, 5), edge_index, {}, r"x: got shape \(8, 5\), expected \(number of nodes, 4\)"),
        (None, edge_index, {}, "x: got shape NoneType"),
        (x, torch.tensor([[8], [0]]), {}, r"edge_index: got node 8, expected values in 0\.\.7"),
        (x, None, {}, "edge_index: got NoneType"),
        (x, Graph(edge_index, 9), {}, "edge_index: got Graph.*expected 8 nodes"),
        (x * torch.nan, edge_index, {}, r"x: got .* values that are NaN or infinite, expected none"),
        (
            x,
            edge_index,
            {"batch": torch.zeros(3).long()},
            r"batch: got shape \(3,\) of torch.int64, expected one integer",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            gnn(given, edges, **options)


# inference ----------------------------------------------------------------------------------------------------------


def test_inference_of_a_loader_with_a_cache_of_no_edges_and_of_no_nodes() -> None:
    gnn, data = trained(router="expert_choice"), Data(x=features(23, IN), edge_index=random_graph(23, 23, 70))
    loader = NodeLoader(data, NeighborSampler(data, [2, 2, 2]), batch_size=7)
    expected = gnn(data.x, data.edge_index)
    for cache in (False, True):
        torch.testing.assert_close(gnn.inference(loader, cache=cache), expected)
    for nodes in (23, 0):
        data = Data(x=features(nodes, IN), edge_index=torch.empty(2, 0, dtype=torch.long))
        assert_same(gnn.inference(data, batch_size=7), gnn(data.x, data.edge_index))
    votes = trained(router="attention_vote", router_kwargs={"scope": "neighbors"})
    data = Data(x=features(23, IN), edge_index=random_graph(23, 23, 70))
    assert_same(votes.inference(data, batch_size=7), votes(data.x, data.edge_index))


def feast(in_channels: int, out_channels: int) -> FeaStConv:
    return FeaStConv(in_channels, out_channels, heads=2)


CHUNKED: list[dict[str, Any]] = [
    {"conv": "sage", "backend": "padded"},
    {"conv": "sage", "backend": "grouped", "k": 2},
    {"conv": "sage", "normalize": True},
    {"conv": "gcn", "add_self_loops": False},
    {"conv": "gat", "flow": "target_to_source", "edge_dim": 2, "jk": "last"},
    {"conv": "gat", "heads": 2, "fill_value": "max", "edge_dim": 2},
    {"conv": "graph", "aggr": "max"},
    {"conv": feast},
    {"conv": [partial(FiLMConv, flow="target_to_source"), "le", partial(FiLMConv, flow="target_to_source")]},
    {"conv": [partial(SAGEConv, flow="target_to_source"), "sage", "gin"], "shared_router": False, "jk": "cat"},
]


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("options", CHUNKED, ids=lambda o: ",".join(map(str, o.values()))[:60].partition(" at 0x")[0])
def test_chunks_of_a_sparse_graph_equal_the_whole(options: dict[str, Any], batch_size: int) -> None:
    """Loops in the data, chunks without an edge, nodes without one: as on the whole graph, layer for layer."""
    gnn = trained(**options)
    data = Data(x=features(23, IN), edge_index=torch.cat([random_graph(23, 12, 14), torch.tensor([[3, 4], [3, 4]])], 1))
    args = edge_args(gnn, data.num_edges)
    for name, value in args.items():
        data[name] = value
    assert_same(gnn.inference(data, batch_size=batch_size), gnn(data.x, data.edge_index, **args))


def test_a_part_on_another_device_is_of_the_same_graph() -> None:
    _, part = Graph(random_graph(23, 23, 70), 23).part(torch.arange(5))
    assert part.to("meta")._parent is part._parent


def test_inference_leaves_the_model_as_it_was() -> None:
    gnn, data = trained(), Data(x=features(23, IN), edge_index=random_graph(23, 23, 70))
    before = {name: value.clone() for name, value in gnn.state_dict().items()}
    assert not gnn.inference(data, batch_size=5).requires_grad
    assert all(torch.equal(before[name], value) for name, value in gnn.state_dict().items())
    convs: list[Any] = [conv for layer in gnn.convs[:2] for conv in layer._all_convs()] + [gnn.convs[2]]
    assert [type(conv) for conv in convs] == [GCNConv] * 3
    assert all(conv.normalize and conv.flow == "source_to_target" for conv in convs)


def test_inference_refuses() -> None:
    gnn, data = model().eval(), Data(x=features(23, IN), edge_index=random_graph(23, 23, 70))
    with pytest.warns(UserWarning, match="runs on the whole graph"):
        far = model(conv="tag").eval()
    for other, name in ((far, "TAGConv"), (model(conv="two_hop", router=None).eval(), "FilterConv")):
        with pytest.raises(RuntimeError, match=f"inference: {name} looks further than one hop"):
            other.inference(data)
    with pytest.raises(RuntimeError, match="call inference"):
        gnn.inference_per_layer()
    with pytest.raises(ValueError, match="batch_size: got 0"):
        gnn.inference(data, batch_size=0)
    with pytest.raises(ValueError, match="expected a Data with x and edge_index"):
        gnn.inference(Data(edge_index=torch.empty(2, 0, dtype=torch.long), num_nodes=2))


# moefy --------------------------------------------------------------------------------------------------------------

DENSE: list[tuple[Any, dict[str, Any]]] = [
    (GCN, {}),
    (GCN, {"jk": "cat", "norm": "layer_norm", "act": "elu"}),
    (GraphSAGE, {"dropout": 0.3}),
    (GraphSAGE, {"aggr": "max", "jk": "last"}),
    (GIN, {}),
    (GIN, {"train_eps": True, "jk": "max"}),
    (GAT, {}),
    (GAT, {"heads": 2, "v2": True}),
    (GAT, {"heads": 2, "jk": "lstm"}),
]


@pytest.mark.parametrize("upcycle", [True, False])
@pytest.mark.parametrize("router", ["token_choice", "expert_choice"])
@pytest.mark.parametrize(("cls", "kwargs"), DENSE, ids=lambda v: getattr(v, "__name__", str(v)))
def test_moefy_starts_as_the_dense_model(cls: Any, kwargs: dict[str, Any], router: str, upcycle: bool) -> None:
    x, edge_index = graph()
    dense = cls(IN, HIDDEN, 3, OUT, **{**kwargs, "dropout": 0.0}).double()
    moe: Any = moefy(dense, router=router, num_experts=EXPERTS, upcycle=upcycle)
    for training in (True, False):
        assert_same(moe.train(training)(x, edge_index), dense.train(training)(x, edge_index))
    assert all(conv.shared_expert is not None for conv in moe.convs if isinstance(conv, MoEConv))


def test_moefy_of_a_frozen_gnn_leaves_it_frozen() -> None:
    """But for what is new: routers, experts, gains."""
    moe: Any = moefy(GCN(IN, HIDDEN, 3, OUT, norm="layer_norm").requires_grad_(False), num_experts=EXPERTS)
    new = ("router", "experts", "gain")
    for name, parameter in moe.named_parameters():
        assert parameter.requires_grad == (name.startswith("convs") and name.split(".")[2] in new), name


@pytest.mark.parametrize("router", ["token_choice", "random", "uniform"])
@pytest.mark.parametrize(("cls", "kwargs"), DENSE, ids=lambda v: getattr(v, "__name__", str(v)))
def test_moefy_upcycled_equals_the_dense_model(cls: Any, kwargs: dict[str, Any], router: str) -> None:
    torch.manual_seed(0)
    x, edge_index = graph()
    dense = cls(IN, HIDDEN, 3, OUT, **kwargs).double().eval()
    expected = dense(x, edge_index)
    options: dict[str, Any] = {"k": 2, "router": router, "num_experts": EXPERTS, "shared_expert": False}
    moe: Any = moefy(dense, **options)
    assert isinstance(moe, GNNMoE)
    assert sum(isinstance(conv, MoEConv) for conv in moe.convs) == (3 if "jk" in kwargs else 2)
    assert not moe.training
    assert_same(moe(x, edge_index), expected)
    assert torch.equal(dense(x, edge_index), expected)  # left alone
    fresh = moefy(dense, upcycle=False, **options)
    assert (fresh(x, edge_index) - expected).abs().max() > 1e-3
    moe.train()(x, edge_index).sum().backward()
    assert all(p.grad is not None for p in moe.parameters())
    assert all(p.grad is None for p in dense.parameters())
    before = moe.eval()(x, edge_index)
    with torch.no_grad():  # the experts are copies that go their own way
        for parameter in (*dense.parameters(), *moe.convs[0].expert(1).parameters()):
            parameter.zero_()
    assert torch.equal(moe(x, edge_index), before)


def test_moefy_reset_parameters_draws_anew() -> None:
    """Also an upcycled model's: afterwards its experts differ from the dense conv and from each other."""
    dense = GCN(IN, HIDDEN, 3, OUT)
    moe: Any = moefy(dense, num_experts=EXPERTS, shared_expert=False)
    moe.reset_parameters()
    first, second = (moe.convs[0].experts.expert(i).lin.weight for i in range(2))
    assert not torch.equal(first, second)
    assert not torch.equal(first, dense.convs[0].lin.weight)


def test_moefy_of_gnns_refuses() -> None:
    dense = GCN(IN, HIDDEN, 3, OUT)
    for given, kwargs, message in (
        (dense, {"every": 3}, "every: got 3 with num_layers=3"),
        (GraphSAGE((IN, IN), HIDDEN, 3, OUT), {}, "model: got a GNN with bipartite or lazy layers"),
        (dense, {"router": TokenChoice(IN, 8)}, "router: got an instance, expected a name or a factory"),
        (dense, {"blocks": [0]}, "blocks: got"),
    ):
        with pytest.raises(ValueError, match=message):
            moefy(given, **kwargs)


def test_moefy_of_two_layers_and_of_what_is_no_model() -> None:
    moe: Any = moefy(GCN(IN, HIDDEN, 2, OUT))
    assert [isinstance(conv, MoEConv) for conv in moe.convs] == [True, False]
    with pytest.raises(ValueError, match="model: got str, expected a transformer or a PyG GNN"):
        moefy("GCN")  # type: ignore[arg-type]


class Shifted(GCN):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = super().forward(*args, **kwargs)
        return out + 5


def test_moefy_refuses_gnns_of_another_forward() -> None:
    hooked = GCN(IN, HIDDEN, 2, OUT)
    hooked.register_forward_hook(lambda _, __, out: out + 5)
    for given in (Shifted(IN, HIDDEN, 2, OUT), hooked, model(), moefy(GCN(IN, HIDDEN, 2, OUT))):
        with pytest.raises(ValueError, match=f"model: got {type(given).__name__}, which computes something else"):
            moefy(given)


class OneHop(MessagePassing):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.lin = nn.Linear(in_channels, out_channels)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        out: Tensor = self.propagate(edge_index, x=self.lin(x))
        return out

    def reset_parameters(self) -> None:
        self.lin.reset_parameters()


def test_inference_of_a_users_own_local_conv() -> None:
    data = Data(x=features(23, IN), edge_index=random_graph(23, 23, 70))
    gnn = model(conv=OneHop, local=True).eval()
    assert_same(gnn.inference(data, batch_size=5), gnn(data.x, data.edge_index))
    with pytest.warns(UserWarning, match="whole graph"):
        unsure = model(conv=OneHop).eval()
    with pytest.raises(RuntimeError, match="OneHop looks further than one hop, or is not known not to"):
        unsure.inference(data)


def test_to_hetero_is_refused_by_name() -> None:
    metadata = (["a", "b"], [("a", "to", "b"), ("b", "to", "a")])
    with pytest.raises(ValueError, match="HeteroGNNMoE"):
        to_hetero(model(), metadata)


def test_moefy_without_out_channels_and_with_a_warning() -> None:
    x, edge_index = graph()
    dense = GCN(IN, HIDDEN, 2).double()
    assert_same(moefy(dense, every=1, num_experts=EXPERTS)(x, edge_index), dense(x, edge_index))
    kwargs = {"aggregators": ["mean", "max"], "scalers": ["identity"], "deg": torch.tensor([1, 2, 3])}
    with pytest.warns(UserWarning, match="PNAConv runs on the whole graph"):
        gnn = model(conv=PNAConv, **kwargs)
    assert gnn(x, edge_index).shape == (NODES, OUT)


def test_heads_that_are_averaged_leave_the_width_alone() -> None:
    gnn = GNNMoE(IN, 6, OUT, conv="general", heads=4, num_layers=3, num_experts=2).double()
    assert gnn(features(NODES, IN), random_graph(NODES, NODES, 20)).shape == (NODES, OUT)
