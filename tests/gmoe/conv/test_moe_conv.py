"""MoEConv as a layer: what it promises whichever way its experts are run."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GATConv, GCNConv, GINConv, GraphConv, SAGEConv
from torch_geometric.utils import to_torch_csr_tensor

from gmoe import ROUTERS, MoEConv, OracleRouter, TokenChoice, aux_loss, record
from tests.gmoe.conv.masked import GRAPHS, assert_equals_masked, features, random_graph, routing_of

CONVS = ["gcn", "sage", "graph", "gin", "gat", "general"]
NODES, WIDTH, EXPERTS = 8, 4, 3
SHARED: Any = GINConv(nn.Linear(4, 4))


def layer(conv: Any = "gcn", **kwargs: Any) -> MoEConv:
    torch.manual_seed(0)
    return MoEConv(conv, WIDTH, WIDTH, **{"num_experts": EXPERTS, **kwargs})


def graph() -> tuple[Tensor, Tensor]:
    return features(NODES, WIDTH).float(), GRAPHS["mixed"][1]


@pytest.mark.parametrize("conv", CONVS)
def test_follows_permutations_of_the_nodes(conv: str) -> None:
    x, edge_index = graph()
    for router in ROUTERS:
        moe = layer(conv, router=router, k=2, router_input=("node", "neighbors")).double()
        order = torch.randperm(NODES)
        place = order.argsort()
        expected, routing = moe(x.double(), edge_index, return_routing=True)
        actual, permuted = moe(x.double()[order], place[edge_index], return_routing=True)
        torch.testing.assert_close(permuted.to_dense(), routing.to_dense()[order])
        torch.testing.assert_close(actual, expected[order])


@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("mixed", [False, True], ids=["sorted", "unsorted"])
def test_batch_mates_do_not_matter(router: str, conv: str, mixed: bool) -> None:
    moe = layer(conv, router=router, k=2, router_input=("node", "neighbors")).double()
    graphs = [Data(features(n, WIDTH, seed=n), random_graph(n, n, 3 * n, seed=n)) for n in (5, 7, 5, 2)]
    alone = [moe(g.x, g.edge_index, batch=torch.zeros(g.num_nodes, dtype=torch.long)) for g in graphs]
    torch.testing.assert_close(alone[0], moe(graphs[0].x, graphs[0].edge_index))  # no batch is one graph
    data = Batch.from_data_list(graphs)
    order = torch.randperm(data.num_nodes, generator=torch.Generator().manual_seed(0)) if mixed else torch.arange(19)
    batch = 3 * data.batch[order] + 1  # with gaps
    together = moe(data.x[order], order.argsort()[data.edge_index], batch=batch)
    torch.testing.assert_close(together, torch.cat(alone)[order], rtol=0, atol=1e-6)


def test_batch_makes_pools() -> None:
    x, edge_index = graph()
    moe = layer(router="expert_choice")
    batch = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    load = moe(x, edge_index, batch=batch, return_routing=True)[1].to_dense() != 0
    assert load[:3].sum(0).tolist() == [1, 1, 1]  # ceil(3 / 3)
    assert load[3:].sum(0).tolist() == [2, 2, 2]  # ceil(5 / 3)


def test_neighbours_vote_along_the_edges() -> None:
    x, edge_index = graph()
    moe = layer(router="attention_vote", router_kwargs={"scope": "neighbours"})
    _, routing = moe(x, edge_index, return_routing=True)
    assert moe.router is not None
    torch.testing.assert_close(routing.scores, moe.router(x, None, edge_index).scores)
    torch.testing.assert_close(routing.scores[6:], torch.ones(2, EXPERTS))  # isolated nodes vote for themselves
    with pytest.raises(ValueError, match="x: got bipartite input"):
        layer("sage", router="attention_vote", router_kwargs={"scope": "neighbours"})((x, x[:5]), edge_index % 5)


def mean_of_in_edges(x: Tensor, edge_index: Tensor) -> Tensor:
    adjacency = torch.zeros(len(x), len(x), dtype=x.dtype).index_put(
        (edge_index[1], edge_index[0]), torch.ones(edge_index.size(1), dtype=x.dtype), accumulate=True
    )
    return adjacency @ x / adjacency.sum(dim=1, keepdim=True).clamp(min=1)


@pytest.mark.filterwarnings("ignore:.*runs on the whole graph")
@pytest.mark.parametrize("router_input", ["input", "aggregate", "both"])
@pytest.mark.parametrize(
    ("conv", "kwargs", "aggregate"),
    [
        (
            GCNConv,
            {"bias": False, "normalize": False},
            lambda x, e: GraphConv(1, 1).propagate(e, x=(x, x), edge_weight=None),
        ),
        (SAGEConv, {}, mean_of_in_edges),
        (SAGEConv, {"aggr": ["mean", "max"]}, None),
        (GATConv, {}, mean_of_in_edges),
        ("cheb", {"K": 2}, mean_of_in_edges),
    ],
    ids=["gcn", "sage", "sage twice as wide", "gat", "cheb"],
)
def test_router_input(conv: Any, kwargs: dict[str, Any], aggregate: Any, router_input: str) -> None:
    """The router sees the input, the conv's own aggregate (else the mean over in-edges), or both in that order."""
    x, edge_index = graph()
    if aggregate is None:
        aggregate = SAGEConv(WIDTH, WIDTH, aggr=["mean", "max"], root_weight=False, bias=False)
        aggregate.lin_l = nn.Identity()
    seen = [x, aggregate(x, edge_index)]
    expected = {"input": seen[:1], "aggregate": seen[1:], "both": seen}[router_input]
    moe = layer(conv, router_input=router_input, **kwargs)
    assert moe.router is not None
    inputs: list[Tensor] = []
    moe.router.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    moe(x, edge_index)
    torch.testing.assert_close(inputs, [torch.cat(expected, dim=-1)])


@pytest.mark.parametrize("conv", CONVS)
def test_expert_is_a_detached_copy(conv: str) -> None:
    x, edge_index = graph()
    moe = layer(conv, router=None).eval()
    for index in range(EXPERTS):
        plain = moe.expert(index)
        assert not plain.training
        weight = torch.zeros(NODES, EXPERTS)
        weight[:, index] = 1
        before = moe(x, edge_index, routing=routing_of(weight))
        torch.testing.assert_close(plain(x, edge_index), before)
        assert all(p.is_leaf and p.requires_grad for p in plain.parameters())
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.add_(1.0)
        assert torch.equal(moe(x, edge_index, routing=routing_of(weight)), before)
        assert not torch.allclose(plain(x, edge_index), before)


def test_expert_follows_dtype_and_is_bounded() -> None:
    moe = layer().double()
    assert all(p.dtype == torch.float64 for p in moe.expert(0).parameters())
    for index in (-1, EXPERTS):
        with pytest.raises(ValueError, match=rf"index: got {index}, expected 0\.\.num_experts-1=2"):
            moe.expert(index)


@pytest.mark.parametrize("conv", [GCNConv, SAGEConv, GraphConv, GATConv])
def test_initialised_as_separate_convs(conv: Any) -> None:
    moe = MoEConv(conv, 6, 5, num_experts=EXPERTS, router=None)
    torch.manual_seed(7)
    moe.reset_parameters()
    separate = [conv(6, 5) for _ in range(EXPERTS)]
    torch.manual_seed(7)
    for plain in separate:
        plain.reset_parameters()
    for index, plain in enumerate(separate):
        mine = moe.expert(index).state_dict()
        assert mine.keys() == plain.state_dict().keys()
        assert all(torch.equal(value, mine[name]) for name, value in plain.state_dict().items())


def test_gin_is_initialised_as_separate_convs() -> None:
    """By statistics: uniform in +-1/sqrt(fan in), E different draws."""
    moe = MoEConv("gin", 400, 100, num_experts=2, router=None)
    experts: list[Any] = [moe.expert(0), moe.expert(1)]
    first, second = (expert.nn.lins[0].weight for expert in experts)
    assert float(first.detach().abs().max()) == pytest.approx(400**-0.5, rel=0.01)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("conv", CONVS)
def test_reset_parameters_draws_all_anew(conv: str) -> None:
    moe = layer(conv)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.fill_(9.0)
    moe.reset_parameters()
    assert not any((parameter == 9.0).any() for parameter in moe.parameters())


@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize("copier", ["state_dict", "deepcopy", "pickle"])
def test_copies_give_the_same_and_stand_alone(conv: str, copier: str) -> None:
    x, edge_index = graph()
    moe = layer(conv, router="multi_centroid", k=2)
    expected = moe(x, edge_index)
    if copier == "state_dict":
        twin = MoEConv(conv, WIDTH, WIDTH, num_experts=EXPERTS, router="multi_centroid", k=2)
        twin.load_state_dict(moe.state_dict())
    elif copier == "deepcopy":
        twin = copy.deepcopy(moe)
    else:
        twin = pickle.loads(pickle.dumps(moe))
    assert torch.equal(twin(x, edge_index), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2.0)
    assert torch.equal(moe(x, edge_index), expected)
    assert twin.expert(1)(x, edge_index).shape == (NODES, WIDTH)
    twin.reset_parameters()


@pytest.mark.parametrize("conv", CONVS)
def test_autocast_scores_in_float32(conv: str) -> None:
    x, edge_index = graph()
    for router in ROUTERS:
        moe = layer(conv, router=router, k=2, router_input=("node", "neighbors"))
        expected = moe(x, edge_index)
        with torch.autocast("cpu", torch.bfloat16):
            y, routing = moe(x, edge_index, return_routing=True)
            y.sum().backward()
        assert routing.scores.dtype == routing.weight.dtype == torch.float32
        assert y.dtype in (torch.bfloat16, torch.float32)
        assert y.isfinite().all()
        assert all(p.grad is not None for p in moe.experts.parameters())
        if router in ("random", "uniform"):  # whose choice a rounded input hardly moves
            torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("csr", [False, True])
@pytest.mark.parametrize("conv", [*CONVS, "low_pass", "two_hop", partial(SAGEConv, normalize=True)])
def test_a_model_in_bfloat16_scores_in_float32(conv: Any, csr: bool) -> None:
    x, edge_index = graph()
    adj = to_torch_csr_tensor(edge_index.flip(0), size=(NODES, NODES)) if csr else edge_index
    leaf = x.bfloat16().requires_grad_()
    moe = layer(conv, router_input=("node", "neighbors"))
    y, routing = copy.deepcopy(moe).bfloat16()(leaf, adj, return_routing=True)
    assert y.dtype == torch.bfloat16
    assert routing.scores.dtype == torch.float32
    y.sum().backward()
    assert leaf.grad is not None
    expected = moe(x, adj, routing=replace(routing, weight=routing.weight.float()))
    torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(("conv", "backend"), [("gcn", "aot_eager"), ("gat", "eager")])
def test_compiled_equals_eager(conv: str, backend: str) -> None:
    torch.compiler.reset()
    x, edge_index = graph()
    moe = layer(conv, router="expert_choice", k=2)
    compiled: Any = torch.compile(moe, backend=backend)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    outs = [moe(leaves[0], edge_index), compiled(leaves[1], edge_index)]
    torch.testing.assert_close(outs[1], outs[0])
    gradients = [
        torch.autograd.grad(out.square().sum(), [leaf, *moe.parameters()])
        for out, leaf in zip(outs, leaves, strict=True)
    ]
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("conv", CONVS)
def test_a_node_without_an_expert_gets_zero(conv: str) -> None:
    x, edge_index = graph()
    weight = torch.ones(NODES, EXPERTS)
    weight[2] = 0
    y = layer(conv, router=None)(x, edge_index, routing=routing_of(weight))
    assert not y[2].any()
    assert y[3].any()


def test_router_may_be_name_class_factory_or_instance() -> None:
    x, edge_index = graph()
    assignment = torch.arange(NODES) % EXPERTS
    for router in (
        "token_choice",
        TokenChoice,
        lambda dim, n: OracleRouter(dim, n, assignment),
        TokenChoice(WIDTH, EXPERTS),
    ):
        moe = layer(router=router)
        assert moe(x, edge_index).shape == (NODES, WIDTH)
    oracle = layer(router=lambda dim, n: OracleRouter(dim, n, assignment))
    assert torch.equal(oracle(x, edge_index, return_routing=True)[1].to_dense().argmax(1), assignment)


def test_losses_come_back_and_reach_the_router() -> None:
    x, edge_index = graph()
    moe = layer(router_kwargs={"balance": "switch", "z_coef": 0.1})
    _, routing = moe(x, edge_index, return_routing=True)
    assert set(routing.losses) == {"switch", "z"}
    aux_loss(routing).backward()
    assert moe.router is not None
    assert all(p.grad is not None and p.grad.any() for p in moe.router.parameters())
    with record(moe) as routings:
        moe(x, edge_index)
    torch.testing.assert_close(aux_loss(routings), aux_loss(routing))


def test_given_routing_is_followed_without_the_router() -> None:
    x, edge_index = graph()
    moe = layer(router=None)
    given = routing_of(features(NODES, EXPERTS, seed=3).float())
    y, routing = moe(x, edge_index, routing=given, return_routing=True)
    assert routing is given
    assert torch.equal(y, moe(x, edge_index, routing=given))
    with pytest.raises(ValueError, match=r"routing: got None, expected a Routing, since .* router=None"):
        moe(x, edge_index)
    with pytest.raises(ValueError, match="routing: got 8 tokens and 2 experts, expected 8 and 3"):
        moe(x, edge_index, routing=routing_of(torch.ones(NODES, 2)))


def test_given_routing_does_not_touch_the_layers_own_router() -> None:
    """A graph of one layer's decision can be put into another."""
    x, edge_index = graph()
    moe = layer(router="token_choice")
    moe(x, edge_index, routing=routing_of(torch.ones(NODES, EXPERTS))).sum().backward()
    assert moe.router is not None
    assert all(p.grad is None for p in moe.router.parameters())


@pytest.mark.parametrize(
    ("conv", "text"),
    [
        ("gcn", "MoEConv(\n  4, 4, num_experts=3, router_input=('input',)"),
        ("gat", "TokenChoice("),
        ("gat", "GATConv(4, 4, heads=1)"),
    ],
)
def test_repr(conv: str, text: str) -> None:
    assert text in repr(layer(conv))


def test_drop_in_for_a_pyg_conv() -> None:
    """Called as a PyG conv is, by position, and learns."""
    x, edge_index = graph()
    moe = layer(GCNConv, k=2)
    target = features(NODES, WIDTH, seed=9).float()
    optimizer = torch.optim.Adam(moe.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (moe(x, edge_index, torch.ones(edge_index.size(1))) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_dropout_follows_training_mode() -> None:
    x, edge_index = graph()
    moe = layer(GATConv, dropout=0.5, heads=2)
    assert not torch.equal(moe(x, edge_index), moe(x, edge_index))
    moe.eval()
    assert torch.equal(moe(x, edge_index), moe(x, edge_index))
    assert not moe.expert(0).training


def test_on_a_graph_of_realistic_width() -> None:
    """Cora's 1,433 features and 7 classes, which grouped_mm refuses."""
    for backend in ("auto", "grouped", "padded", "loop"):
        moe = MoEConv("gcn", 1433, 7, num_experts=4, router="expert_choice", backend=backend)
        moe(torch.randn(20, 1433), random_graph(20, 20, 60)).sum().backward()
        assert all(p.grad is not None for p in moe.experts.parameters())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"router": "tokenchoice"}, "router: got 'tokenchoice', expected one of 'token_choice', 'expert_choice'"),
        ({"k": 4}, "k: got 4, expected at most num_experts=3"),
        ({"k": 4, "router": None}, "k: got 4, expected at most num_experts=3"),
        ({"k": 0}, "k: got 0, expected at least 1"),
        ({"num_experts": 0}, "num_experts: got 0, expected at least 1"),
        ({"router_input": "output"}, "router_input: got 'output', expected one of 'input', 'aggregate', 'both'"),
        ({"backend": "cuda"}, "backend: got 'cuda', expected one of 'auto', 'grouped', 'padded', 'loop'"),
        ({"router_kwargs": {"capacity_factor": 0}}, "capacity_factor: got 0, expected a positive number"),
        (
            {"router_kwargs": {"weight": "normalized"}},
            "weight: got 'normalized' with k=1.*'score' or 'straight_through'",
        ),
        (
            {"router": TokenChoice(5, 3)},
            "router: got an instance for dim=5, num_experts=3, expected dim=4, num_experts=3",
        ),
        ({"conv": "gnc"}, "conv: got 'gnc', expected one of 'agnn'"),
        ({"conv": ["gcn", "gat"]}, "conv: got a list of 2 convs, expected num_experts=3"),
        ({"conv": lambda i, o: nn.Linear(i, o)}, "conv: got a factory of Linear, expected one of PyG's MessagePassing"),
        (
            {"conv": lambda *_: SHARED},
            "conv: got a factory whose convs share parameters",
        ),
        ({"conv": lambda *_: GINConv(SHARED.nn)}, "conv: got a factory whose convs share parameters"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer(**kwargs)


@pytest.mark.parametrize(
    ("name", "widths"), [("in_channels", (0, 4)), ("out_channels", (4, 0)), ("in_channels", ((3, 0), 4))]
)
def test_bad_widths(name: str, widths: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}: got 0, expected at least 1"):
        MoEConv("sage", *widths)


@pytest.mark.parametrize("conv", CONVS)
def test_bad_features(conv: str) -> None:
    _, edge_index = graph()
    moe = layer(conv, check_finite=True)
    with pytest.raises(ValueError, match=r"x: got source nodes of shape \(8, 5\), expected \(number of nodes, 4\)"):
        moe(torch.randn(NODES, 5), edge_index)
    with pytest.raises(ValueError, match=r"x: got source nodes of shape \(2, 8, 4\), expected \(number of nodes, 4\)"):
        moe(torch.randn(2, NODES, 4), edge_index)
    with pytest.raises(ValueError, match="x: got 2 values that are NaN or infinite, expected none"):
        moe(torch.tensor([[0.0, 1.0, torch.nan, torch.inf]]).repeat(1, 1), edge_index[:, :1])
    with pytest.raises(
        ValueError, match=r"batch: got shape \(3,\) of torch.int64, expected one integer for each of 8 nodes"
    ):
        moe(torch.randn(NODES, 4), edge_index, batch=torch.zeros(3, dtype=torch.long))


def test_check_finite_is_not_lost_on_a_router_instance() -> None:
    x, edge_index = graph()
    moe = layer(router=TokenChoice(WIDTH, EXPERTS), check_finite=True)
    with pytest.raises(ValueError, match="x: got 32 values that are NaN or infinite, expected none"):
        moe(x * torch.nan, edge_index)


def test_a_router_belongs_to_one_layer() -> None:
    router = TokenChoice(WIDTH, EXPERTS)
    first = layer(router=router)
    with pytest.raises(ValueError, match="router: got an instance that another layer holds already"):
        layer(router=router)
    del first
    layer(router=router)


def test_one_expert_with_weight_one_is_the_plain_conv() -> None:
    x, edge_index = graph()
    moe = layer(num_experts=1)
    torch.testing.assert_close(moe(x, edge_index), moe.expert(0)(x, edge_index))
    assert_equals_masked(moe.double(), x.double(), edge_index)
