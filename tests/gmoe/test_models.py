"""GNNMoE, and dense PyG GNNs turned into it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GAT, GCN, GIN, GCNConv, GraphSAGE, LayerNorm, PNAConv

from gmoe import (
    ROUTERS,
    GNNMoE,
    MoEConv,
    MultiCentroid,
    OracleRouter,
    Routing,
    TokenChoice,
    aux_loss,
    moefy,
    record,
)
from tests.gmoe.conv.masked import GRAPHS, features, random_graph

NODES, IN, HIDDEN, OUT, EXPERTS = 8, 4, 6, 3, 3


def model(**kwargs: Any) -> GNNMoE:
    torch.manual_seed(0)
    return GNNMoE(IN, HIDDEN, OUT, **{"num_layers": 3, "num_experts": EXPERTS, **kwargs}).double()


def graph() -> tuple[Tensor, Tensor]:
    return features(NODES, IN), GRAPHS["mixed"][1]


def mean_of_in_edges(x: Tensor, edge_index: Tensor) -> Tensor:
    adjacency = torch.zeros(len(x), len(x), dtype=x.dtype)
    for source, destination in edge_index.T.tolist():
        adjacency[destination, source] += 1
    return adjacency @ x / adjacency.sum(dim=1, keepdim=True).clamp(min=1)


def assert_same(a: Tensor, b: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


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


def test_forward_by_hand() -> None:
    """conv + residual, norm, activation; a plain conv at the end."""
    x, edge_index = graph()
    gnn = model(norm="layer_norm", residual="identity")
    first, second, last = gnn.convs
    h = gnn.norms[0](first(x, edge_index) + gnn.residuals[0](x)).relu()
    h = gnn.norms[1](second(h, edge_index) + h).relu()
    assert_same(gnn(x, edge_index), last(h, edge_index))
    assert type(last) is GCNConv


@pytest.mark.parametrize("kwargs", [{"dropout": 0.5}, {"act": "elu", "act_first": True, "norm": "batch_norm"}], ids=str)
@pytest.mark.parametrize("jk", [None, "cat", "max", "last", "lstm"])
def test_dense_control_is_pygs_gcn(jk: str | None, kwargs: dict[str, Any]) -> None:
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


@pytest.mark.parametrize(
    ("residual", "in_proj", "kinds"),
    [
        ("identity", False, [nn.Linear, nn.Identity]),
        ("identity", True, [nn.Identity, nn.Identity]),
        ("linear", False, [nn.Linear, nn.Linear]),
        ("none", False, []),
    ],
)
def test_residuals(residual: Any, in_proj: bool, kinds: list[type]) -> None:
    gnn = model(residual=residual, in_proj=in_proj)
    assert [type(module) for module in gnn.residuals] == kinds
    assert (gnn.lin_in is not None) == in_proj
    x, edge_index = graph()
    gnn(x, edge_index).sum().backward()
    assert all(p.grad is not None for p in gnn.parameters())


@pytest.mark.parametrize("jk", [None, "cat", "max", "last", "lstm"])
@pytest.mark.parametrize("routing", ["layer", "shared"])
def test_all_parameters_learn(routing: Any, jk: str | None) -> None:
    x, edge_index = graph()
    gnn = model(jk=jk, routing=routing, norm="layer_norm", in_proj=True, k=2)
    logits, routings = gnn(x, edge_index, return_routing=True)
    (logits.square().sum() + aux_loss(routings)).backward()
    assert all(p.grad is not None for p in gnn.parameters())
    routers = [p.grad for name, p in gnn.named_parameters() if "router" in name]
    assert routers
    assert all(grad is not None and grad.any() for grad in routers)


class Watched:
    """What each MoE layer was told to follow, and what routers saw."""

    def __init__(self, gnn: GNNMoE) -> None:
        self.followed: list[Routing] = []
        self.seen: list[Tensor] = []
        for module in gnn.modules():
            if isinstance(module, MoEConv):
                module.register_forward_hook(lambda _, __, out: self.followed.append(out[1]))
        for name, module in gnn.named_modules():
            if name.endswith("router"):
                module.register_forward_pre_hook(lambda _, args: self.seen.append(args[0]))


@pytest.mark.parametrize("hops", [1, 2])
@pytest.mark.parametrize("router_input", ["input", "aggregate", "both"])
def test_shared_routing_decides_once_and_all_layers_follow(router_input: Any, hops: int) -> None:
    x, edge_index = graph()
    gnn = model(shared_router=True, router_input=router_input, router_hops=hops, num_layers=4)
    watched = Watched(gnn)
    logits, routings = gnn(x, edge_index, return_routing=True)
    assert len(routings) == 1
    assert len(watched.followed) == 3
    assert all(followed is routings[0] for followed in watched.followed)
    seen = [x]
    for _ in range(hops):
        seen.append(mean_of_in_edges(seen[-1], edge_index))
    expected = {"input": seen[:1], "aggregate": seen[1:], "both": seen}[router_input]
    torch.testing.assert_close(watched.seen, [torch.cat(expected, dim=1)])
    assert torch.equal(gnn.decide(x, edge_index).to_dense(), routings[0].to_dense())
    # the decision is followed: another decision, another result
    assert not torch.equal(
        logits, model(shared_router=True, router_input=router_input, router_hops=hops, num_layers=4, k=2)(x, edge_index)
    )


def test_layer_routing_sees_each_layers_own_input() -> None:
    x, edge_index = graph()
    gnn = model(conv="sage", router_input=("node", "neighbors"))
    watched = Watched(gnn)
    _, routings = gnn(x, edge_index, return_routing=True)
    assert len(routings) == 2
    h = (gnn.convs[0](x, edge_index, routing=routings[0]) + gnn.residuals[0](x)).relu()
    expected = [torch.cat([value, mean_of_in_edges(value, edge_index)], dim=1) for value in (x, h)]
    torch.testing.assert_close(watched.seen, expected)
    with pytest.raises(ValueError, match="routing: got 'layer', expected 'shared'"):
        gnn.decide(x, edge_index)


@pytest.mark.parametrize("routing", ["layer", "shared"])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("norm", [None, "graph_norm", "instance_norm", LayerNorm(HIDDEN)], ids=str)
def test_batch_mates_do_not_matter(norm: Any, router: str, routing: Any) -> None:
    gnn = model(router=router, routing=routing, norm=norm, k=2)
    graphs = [Data(features(n, IN, seed=n), random_graph(n, n, 3 * n, seed=n)) for n in (5, 7, 5)]
    alone = [gnn(g.x, g.edge_index, batch=torch.zeros(g.num_nodes, dtype=torch.long)) for g in graphs]
    data = Batch.from_data_list(graphs)
    together = gnn(data.x, data.edge_index, batch=data.batch)
    assert_same(together, torch.cat(alone), atol=1e-6)


def test_normalisation_sees_the_batch_size() -> None:
    x, edge_index = graph()
    batch = torch.tensor([0, 0, 0, 0, 0, 0, 2, 2])  # graph 1 and 3 are empty
    gnn = model(norm="graph_norm")
    assert_same(gnn(x, edge_index, batch=batch, batch_size=4), gnn(x, edge_index, batch=batch))


@pytest.mark.parametrize("conv", ["gat", "gatv2", "transformer"])
@pytest.mark.parametrize("jk", [None, "cat"])
def test_heads_divide_the_hidden_width(conv: str, jk: str | None) -> None:
    x, edge_index = graph()
    gnn = model(conv=conv, heads=2, jk=jk, edge_dim=5)
    logits = gnn(x, edge_index, edge_attr=features(edge_index.size(1), 5))
    assert logits.shape == (NODES, OUT)
    assert gnn.convs[0].out_channels == HIDDEN // 2
    with pytest.raises(ValueError, match="hidden_channels: got 6, expected a multiple of heads=4"):
        model(conv=conv, heads=4)


def test_edge_weight_and_edge_attr_reach_all_layers() -> None:
    x, edge_index = graph()
    weight = features(edge_index.size(1), seed=2).abs().requires_grad_()
    model(conv="graph")(x, edge_index, edge_weight=weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.any()
    attr = features(edge_index.size(1), 2).requires_grad_()
    model(conv="gat", edge_dim=2)(x, edge_index, edge_attr=attr).sum().backward()
    assert attr.grad is not None
    assert attr.grad.any()


def test_all_nodes_on_one_expert_is_the_dense_model_of_that_expert() -> None:
    x, edge_index = graph()
    for routing in ("layer", "shared"):
        gnn = model(
            router=lambda dim, n: OracleRouter(dim, n, torch.full((NODES,), 1)), routing=routing, residual="none"
        )
        dense = GCN(IN, HIDDEN, 3, OUT).double()
        for mine, plain in zip(gnn.convs, dense.convs, strict=True):
            plain.load_state_dict((mine.expert(1) if isinstance(mine, MoEConv) else mine).state_dict())
        assert_same(gnn(x, edge_index), dense(x, edge_index))


def test_oracle_assignment_is_followed() -> None:
    assignment = torch.arange(NODES) % EXPERTS
    for routing in ("layer", "shared"):
        gnn = model(router=lambda dim, n: OracleRouter(dim, n, assignment), routing=routing)
        _, routings = gnn(*graph(), return_routing=True)
        assert all(torch.equal(r.to_dense().argmax(dim=1), assignment) for r in routings)


def sampled() -> tuple[Tensor, Tensor, list[int], list[int]]:
    """As NeighborLoader gives it: nodes and edges hop by hop, seeds first."""
    edges = [[(3, 0), (4, 0), (5, 1), (1, 2)], [(6, 3), (7, 4), (0, 5), (8, 5)], [(9, 6), (3, 7)]]
    edge_index = torch.tensor([edge for hop in edges for edge in hop]).T.contiguous()
    return features(10, IN), edge_index, [3, 3, 3, 1], [len(hop) for hop in edges]


@pytest.mark.parametrize("jk", [None, "last"])
@pytest.mark.parametrize("routing", ["layer", "shared"])
@pytest.mark.parametrize("router", ["token_choice", "multi_centroid", "random", "uniform"])
def test_trimming_does_not_change_the_seeds(router: str, routing: Any, jk: str | None) -> None:
    x, edge_index, nodes, edges = sampled()
    gnn = model(router=router, routing=routing, jk=jk, conv="sage", norm=nn.LayerNorm(HIDDEN))
    trimmed, routings = gnn(
        x, edge_index, num_sampled_nodes_per_hop=nodes, num_sampled_edges_per_hop=edges, return_routing=True
    )
    assert_same(trimmed[:3], gnn(x, edge_index)[:3])
    assert len(trimmed) < 10
    if routing == "layer":
        assert [r.num_tokens for r in routings] == ([10, 9, 6] if jk else [10, 9])


def test_trimming_takes_edge_weights_and_batch_along() -> None:
    x, edge_index, nodes, edges = sampled()
    weight = features(10, seed=4).abs()
    hops = {"num_sampled_nodes_per_hop": nodes, "num_sampled_edges_per_hop": edges}
    gnn = model(conv="graph", shared_router=True)
    assert_same(gnn(x, edge_index, weight, **hops)[:3], gnn(x, edge_index, weight)[:3])
    attr = features(10, 2, seed=4)
    gnn = model(conv="gat", edge_dim=2, add_self_loops=False)
    assert_same(gnn(x, edge_index, edge_attr=attr, **hops)[:3], gnn(x, edge_index, edge_attr=attr)[:3])
    batch = torch.tensor([0, 0, 1, 0, 0, 1, 0, 0, 1, 0])
    assert model(conv="sage", router="expert_choice")(x, edge_index, batch=batch, **hops).isfinite().all()
    with pytest.raises(ValueError, match="edge_attr: got edge_weight too"):
        gnn(x, edge_index, weight, attr, **hops)


def test_trimming_with_jumping_knowledge_over_all_layers_keeps_the_seeds() -> None:
    x, edge_index, nodes, edges = sampled()
    gnn = model(conv="sage", jk="cat")
    trimmed = gnn(x, edge_index, num_sampled_nodes_per_hop=nodes, num_sampled_edges_per_hop=edges)
    assert_same(trimmed[:3], gnn(x, edge_index)[:3])


@pytest.mark.parametrize("routing", ["layer", "shared"])
def test_record_sees_what_is_returned(routing: Any) -> None:
    gnn = model(routing=routing)
    with record(gnn) as routings:
        _, returned = gnn(*graph(), return_routing=True)
    assert len(routings) == len(returned)
    assert all(a is b for a, b in zip(routings, returned, strict=True))


@pytest.mark.parametrize("routing", ["layer", "shared"])
def test_checkpointing_counts_once_and_gives_the_same_gradients(routing: Any) -> None:
    x, edge_index = graph()
    gnn = model(routing=routing, router_kwargs={"balance": "bias", "bias_rate": 0.1})
    twin = copy.deepcopy(gnn)
    for _ in range(2):  # the second moves the biases by the load of the first
        gnn(x, edge_index).sum().backward()
        checkpoint(twin, x, edge_index, use_reentrant=False).sum().backward()
    for (name, mine), other in zip(gnn.named_parameters(), twin.parameters(), strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(other.grad, mine.grad, msg=name)
    for mine, other in zip(gnn.buffers(), twin.buffers(), strict=True):
        assert torch.equal(mine, other)
    assert any(bool(b.any()) for name, b in gnn.named_buffers() if "bias_E" in name)


@pytest.mark.parametrize("routing", ["layer", "shared"])
def test_compiled_equals_eager(routing: Any) -> None:
    torch.compiler.reset()
    x, edge_index = graph()
    gnn = model(routing=routing)
    compiled = torch.compile(gnn, backend="eager")
    torch.testing.assert_close(compiled(x, edge_index), gnn(x, edge_index))
    compiled(x, edge_index).sum().backward()


def test_autocast_scores_in_float32() -> None:
    x, edge_index = graph()
    for routing in ("layer", "shared"):
        gnn = model(routing=routing, norm="layer_norm").float()
        with torch.autocast("cpu", torch.bfloat16):
            logits, routings = gnn(x.float(), edge_index, return_routing=True)
        assert logits.isfinite().all()
        assert all(r.scores.dtype == torch.float32 for r in routings)


@pytest.mark.parametrize("routing", ["layer", "shared"])
@pytest.mark.parametrize("copier", ["state_dict", "deepcopy", "pickle"])
def test_copies_give_the_same(copier: str, routing: Any) -> None:
    x, edge_index = graph()
    gnn = model(routing=routing, norm="batch_norm").eval()
    if copier == "state_dict":
        twin = GNNMoE(IN, HIDDEN, OUT, 3, num_experts=EXPERTS, routing=routing, norm="batch_norm").double().eval()
        twin.load_state_dict(gnn.state_dict())
    else:
        twin = copy.deepcopy(gnn) if copier == "deepcopy" else pickle.loads(pickle.dumps(gnn))
    assert torch.equal(twin(x, edge_index), gnn(x, edge_index))


@pytest.mark.parametrize(
    "kwargs", [{}, {"routing": "shared", "in_proj": True}, {"jk": "lstm", "residual": "linear"}], ids=str
)
def test_reset_parameters_draws_all_anew(kwargs: dict[str, Any]) -> None:
    gnn = model(norm="batch_norm", **kwargs)
    with torch.no_grad():
        for parameter in gnn.parameters():
            parameter.fill_(9.0)
    gnn.reset_parameters()
    assert not any((parameter == 9.0).any() for parameter in gnn.parameters())


def test_mixed_kinds() -> None:
    gnn = model(conv=["sage", "gat", "graph"])
    assert gnn(*graph()).shape == (NODES, OUT)
    assert [type(gnn.convs[0].expert(i)).__name__ for i in range(3)] == ["SAGEConv", "GATConv", "GraphConv"]
    assert type(gnn.convs[2]).__name__ == "SAGEConv"  # the first kind is the dense one


def test_cached_normalisation_is_that_of_the_graph() -> None:
    x, edge_index = graph()
    gnn, plain = model(cached=True), model()
    plain.load_state_dict(gnn.state_dict())
    assert_same(gnn(x, edge_index), plain(x, edge_index))
    assert_same(gnn(x, edge_index), plain(x, edge_index))


def test_repr() -> None:
    assert repr(model()) == "GNNMoE(4, 6, 3, num_layers=3, routing='layer')"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_layers": 1}, "every: got 1 with num_layers=1 and jk=None, which leaves no hidden layer for a MoE"),
        ({"every": 3}, "every: got 3 with num_layers=3 and jk=None, which leaves no hidden layer"),
        ({"every": 0}, "every: got 0, expected at least 1"),
        ({"num_layers": 0}, "num_layers: got 0, expected at least 1"),
        ({"router_hops": 0}, "router_hops: got 0, expected at least 1"),
        ({"routing": "global"}, "routing: got 'global', expected one of 'layer', 'shared'"),
        ({"router_input": "output"}, "router_input: got 'output', expected one of 'input', 'aggregate', 'both'"),
        ({"residual": True}, "residual: got True, expected one of 'none', 'identity', 'linear'"),
        ({"router": "nobody"}, "router: got 'nobody', expected one of 'token_choice'"),
        ({"router": "nobody", "routing": "shared"}, "router: got 'nobody', expected one of 'token_choice'"),
        ({"k": 4}, "k: got 4, expected at most num_experts=3"),
        ({"k": 0, "routing": "shared"}, "k: got 0, expected at least 1"),
        ({"num_experts": 0}, "num_experts: got 0, expected at least 1"),
        ({"conv": "gnc"}, "conv: got 'gnc', expected one of 'agnn'"),
        ({"conv": ["gcn", "gat"]}, "conv: got a list of 2 convs, expected num_experts=3"),
        (
            {"router": TokenChoice(2 * IN, EXPERTS)},
            "router: got an instance for several layers, expected a name or a factory",
        ),
        ({"router_kwargs": {"weight": "normalized"}}, "weight: got 'normalized' with k=1"),
        (
            {"router": "expert_choice", "router_kwargs": {"capacity_factor": -1}},
            "capacity_factor: got -1, expected a positive",
        ),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**kwargs)


def test_bad_input() -> None:
    _, edge_index = graph()
    for routing in ("layer", "shared"):
        gnn = model(routing=routing, check_finite=True)
        with pytest.raises(ValueError, match=r"x: got shape \(8, 5\), expected \(number of nodes, 4\)"):
            gnn(features(NODES, 5), edge_index)
        with pytest.raises(ValueError, match=r"edge_index: got source node 8, expected values in 0\.\.7"):
            gnn(features(NODES, IN), torch.tensor([[8], [0]]))
        with pytest.raises(ValueError, match=r"x: got .* values that are NaN or infinite, expected none"):
            gnn(torch.full((NODES, IN), torch.nan, dtype=torch.float64), edge_index)
        with pytest.raises(
            ValueError, match=r"batch: got shape \(3,\) of torch.int64, expected one integer for each of 8 nodes"
        ):
            gnn(features(NODES, IN), edge_index, batch=torch.zeros(3, dtype=torch.long))


def test_a_shared_router_belongs_to_one_model() -> None:
    router = MultiCentroid(2 * IN, EXPERTS)
    first = model(router=router, shared_router=True)
    assert first.shared_router is router
    with pytest.raises(ValueError, match="router: got an instance that another layer holds already"):
        model(router=router, shared_router=True)


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


@pytest.mark.parametrize("router", ["token_choice", "random", "uniform"])
@pytest.mark.parametrize(("cls", "kwargs"), DENSE, ids=lambda v: getattr(v, "__name__", str(v)))
def test_moefy_upcycled_equals_the_dense_model(cls: Any, kwargs: dict[str, Any], router: str) -> None:
    x, edge_index = graph()
    dense = cls(IN, HIDDEN, 3, OUT, **kwargs).double().eval()
    expected = dense(x, edge_index)
    moe = moefy(dense, every=1, k=2, router=router, num_experts=EXPERTS)
    assert isinstance(moe, GNNMoE)
    assert sum(isinstance(conv, MoEConv) for conv in moe.convs) == (3 if "jk" in kwargs else 2)
    assert not moe.training
    assert_same(moe(x, edge_index), expected)
    assert torch.equal(dense(x, edge_index), expected)  # left alone
    fresh = moefy(dense, every=1, k=2, router=router, num_experts=EXPERTS, upcycle=False)
    assert (fresh(x, edge_index) - expected).abs().max() > 1e-3
    moe.train()(x, edge_index).sum().backward()
    assert all(p.grad is not None for p in moe.parameters())
    assert all(p.grad is None for p in dense.parameters())


@pytest.mark.parametrize("cls", [GCN, GraphSAGE, GIN, GAT])
def test_moefy_experts_are_copies_that_go_their_own_way(cls: Any) -> None:
    x, edge_index = graph()
    dense = cls(IN, HIDDEN, 3, OUT).double()
    moe = moefy(dense, every=1, num_experts=EXPERTS)
    assert isinstance(moe, GNNMoE)
    before = moe(x, edge_index)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.zero_()
    assert torch.equal(moe(x, edge_index), before)
    plain: Any = moe.convs[0].expert(1)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    assert torch.equal(moe(x, edge_index), before)


def test_moefy_reset_parameters_draws_anew() -> None:
    """Also an upcycled model's: afterwards its experts differ from the dense conv and from each other."""
    dense = GCN(IN, HIDDEN, 3, OUT)
    moe = moefy(dense, every=1, num_experts=EXPERTS)
    assert isinstance(moe, GNNMoE)
    moe.reset_parameters()
    first, second = (moe.convs[0].expert(i).lin.weight for i in range(2))
    assert not torch.equal(first, second)
    assert not torch.equal(first, dense.convs[0].lin.weight)


def test_moefy_refuses() -> None:
    with pytest.raises(ValueError, match="every: got 3 with num_layers=3"):
        moefy(GCN(IN, HIDDEN, 3, OUT), every=3)
    with pytest.raises(ValueError, match="model: got a GNN with bipartite or lazy layers"):
        moefy(GraphSAGE((IN, IN), HIDDEN, 3, OUT))
    with pytest.raises(ValueError, match="router: got an instance, expected a name or a factory"):
        moefy(GCN(IN, HIDDEN, 3, OUT), router=TokenChoice(IN, 8))


def test_moefy_without_out_channels() -> None:
    x, edge_index = graph()
    dense = GCN(IN, HIDDEN, 2).double()
    assert_same(moefy(dense, every=1, num_experts=EXPERTS)(x, edge_index), dense(x, edge_index))


def test_full_path_convs_warn_from_a_model_too() -> None:
    kwargs = {"aggregators": ["mean", "max"], "scalers": ["identity"], "deg": torch.tensor([1, 2, 3])}
    with pytest.warns(UserWarning, match="PNAConv runs on the whole graph"):
        gnn = model(conv=PNAConv, **kwargs)
    assert gnn(*graph()).shape == (NODES, OUT)


def test_moefy_of_a_gnn_takes_no_blocks() -> None:
    with pytest.raises(ValueError, match="blocks: got"):
        moefy(GCN(4, 8, 3), blocks=[0])
