"""MoEConv as a layer: what it promises whichever way its experts are run, beside the contract of all layers."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GraphConv, SAGEConv
from torch_geometric.utils import to_torch_csr_tensor

from gmoe import (
    ROUTERS,
    MoEConv,
    TokenChoice,
    active_parameters,
    aux_loss,
    count_flops,
    record_routing,
)
from tests.gmoe.conv.masked import GRAPHS, features, mean_of_in_edges, random_graph, routing_of
from tests.gmoe.conv.test_experts import AGGREGATE_ONCE, ATTENTION, ids

CONVS = ["gcn", "sage", "graph", "gin", "gat", "general"]
NODES, WIDTH, EXPERTS = 8, 4, 3


def layer(conv: Any = "gcn", **kwargs: Any) -> MoEConv:
    torch.manual_seed(0)
    return MoEConv(conv, WIDTH, WIDTH, **{"num_experts": EXPERTS, "shared_expert": False, **kwargs})


def graph() -> tuple[Tensor, Tensor]:
    return features(NODES, WIDTH).float(), GRAPHS["mixed"][1]


def experts_of(moe: MoEConv) -> list[nn.Module]:
    return [moe.expert(index) for index in range(moe.num_experts)]


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("conv", ["gcn", "gat", "general"])
def test_graphs_of_an_unsorted_batch_with_gaps_stand_alone(conv: str, router: str) -> None:
    moe = layer(conv, router=router, k=2, router_input=("node", "neighbors")).double()
    moe.train(router != "token_choice")  # whose noise and bias are those of all tokens
    graphs = [Data(features(n, WIDTH, seed=n), random_graph(n, n, 3 * n, seed=n)) for n in (5, 7, 5, 2)]
    alone = [moe(g.x, g.edge_index) for g in graphs]
    data = Batch.from_data_list(graphs)
    order = torch.randperm(data.num_nodes, generator=torch.Generator().manual_seed(0))
    together = moe(data.x[order], order.argsort()[data.edge_index], batch=3 * data.batch[order] + 1)
    torch.testing.assert_close(together, torch.cat(alone)[order], rtol=0, atol=1e-6)


def test_batch_makes_groups() -> None:
    x, edge_index = graph()
    batch = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    load = layer(router="expert_choice")(x, edge_index, batch=batch, return_routing=True)[1].to_dense() != 0
    assert load[:3].sum(0).tolist() == [1, 1, 1]  # ceil(3 / 3)
    assert load[3:].sum(0).tolist() == [2, 2, 2]  # ceil(5 / 3)


def test_neighbors_vote_along_the_edges() -> None:
    x, edge_index = graph()
    options: dict[str, Any] = {"router": "attention_vote", "router_kwargs": {"scope": "neighbors"}}
    moe = layer(**options)
    _, routing = moe(x, edge_index, return_routing=True)
    assert moe.router is not None
    torch.testing.assert_close(routing.scores, moe.router(x, None, edge_index).scores)
    torch.testing.assert_close(routing.scores[6:], torch.ones(2, EXPERTS))  # isolated nodes vote for themselves
    turned = layer("sage", flow="target_to_source", **options)
    assert turned.router is not None
    scores = turned(x, edge_index, return_routing=True)[1].scores
    torch.testing.assert_close(scores, turned.router(x, None, edge_index.flip(0)).scores)
    with pytest.raises(ValueError, match="x: got a tuple"):
        layer("sage", **options)((x, x[:5]), edge_index % 5)


@pytest.mark.filterwarnings("ignore:.*runs on the whole graph")
@pytest.mark.parametrize("router_input", ["node", "neighbors", ("neighbors", "node"), ("degree", "neighbors")], ids=str)
@pytest.mark.parametrize(
    ("conv", "kwargs", "aggregate"),
    [
        (
            "gcn",
            {"bias": False, "normalize": False},
            lambda x, e: GraphConv(1, 1).propagate(e, x=(x, x), edge_weight=None),
        ),
        ("sage", {}, mean_of_in_edges),
        ("sage", {"aggr": ["mean", "max"]}, None),
        ("gat", {}, mean_of_in_edges),
        ("cheb", {"K": 2}, mean_of_in_edges),
        (["gcn", "gat", "mlp"], {}, mean_of_in_edges),
    ],
    ids=["gcn", "sage", "sage twice as wide", "gat", "cheb", "list"],
)
def test_router_input(conv: Any, kwargs: dict[str, Any], aggregate: Any, router_input: Any) -> None:
    """Node, the conv's own aggregate (else the mean over in-edges) and degree, in this order whatever the given one."""
    x, edge_index = graph()
    if aggregate is None:
        aggregate = SAGEConv(WIDTH, WIDTH, aggr=["mean", "max"], root_weight=False, bias=False)
        aggregate.lin_l = nn.Identity()
    degree = torch.bincount(edge_index[1], minlength=NODES).float().log1p()[:, None]
    parts = {"node": x, "neighbors": aggregate(x, edge_index), "degree": degree}
    expected = torch.cat([value for name, value in parts.items() if name in router_input], dim=1)
    moe = layer(conv, router_input=router_input, **kwargs)
    assert moe.router is not None
    assert moe.router.dim == expected.size(1)
    inputs: list[Tensor] = []
    moe.router.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    moe(x, edge_index)
    torch.testing.assert_close(inputs, [expected])


@pytest.mark.parametrize("conv", CONVS)
def test_expert_is_a_detached_copy(conv: str) -> None:
    x, edge_index = graph()
    moe = layer(conv, router=None).eval()
    for index in range(EXPERTS):
        plain = moe.expert(index)
        assert not plain.training
        routing = routing_of(torch.eye(EXPERTS)[index].expand(NODES, EXPERTS))
        before = moe(x, edge_index, routing=routing)
        torch.testing.assert_close(plain(x, edge_index), before)
        assert all(p.is_leaf and p.requires_grad for p in plain.parameters())
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.add_(1.0)
        assert torch.equal(moe(x, edge_index, routing=routing), before)
        assert not torch.allclose(plain(x, edge_index), before)


def test_expert_follows_dtype_and_is_bounded() -> None:
    moe = layer().double()
    drawn = torch.get_rng_state()
    assert all(p.dtype == torch.float64 for p in moe.expert(0).parameters())
    assert torch.equal(torch.get_rng_state(), drawn)
    for index in (-1, EXPERTS):
        with pytest.raises(ValueError, match=rf"index: got {index}, expected 0\.\.num_experts-1=2"):
            moe.expert(index)


@pytest.mark.parametrize(
    ("conv", "kwargs"),
    [case for case in [*AGGREGATE_ONCE, *ATTENTION, ("filter", {}), ("mlp", {})] if case[0] != "gin"],
    ids=ids,
)
def test_initialized_as_separate_convs(conv: str, kwargs: dict[str, Any]) -> None:
    moe = MoEConv(conv, 6, 5, num_experts=EXPERTS, router=None, shared_expert=False, **kwargs)
    torch.manual_seed(7)
    moe.reset_parameters()
    separate: Any = experts_of(moe)
    torch.manual_seed(7)
    for plain in separate:
        plain.reset_parameters()
    unused = () if kwargs.get("root_weight", True) or conv != "transformer" else ("lin_skip.weight", "lin_skip.bias")
    for index, plain in enumerate(separate):
        mine = moe.expert(index).state_dict()
        assert all(torch.equal(value, mine[name]) for name, value in plain.state_dict().items() if name not in unused)
    in_use = sum(p.numel() for name, p in separate[0].named_parameters() if name not in unused)
    assert sum(p.numel() for p in moe.parameters()) == EXPERTS * in_use


def test_gin_is_initialized_as_separate_convs() -> None:
    """By statistics: uniform in +-1/sqrt(fan in), E different draws."""
    experts: Any = experts_of(MoEConv("gin", 400, 100, num_experts=2, shared_expert=False))
    first, second = (expert.nn.lins[0].weight for expert in experts)
    assert float(first.detach().abs().max()) == pytest.approx(400**-0.5, rel=0.01)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("conv", [*CONVS, "filter", "mlp", ["gcn", "le", "gat"]], ids=str)
def test_reset_parameters_draws_all_anew(conv: Any) -> None:
    moe = layer(conv, shared_expert=True)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.fill_(9.0)
    moe.reset_parameters()
    assert not any((parameter == 9.0).any() for parameter in moe.parameters())


@pytest.mark.parametrize("csr", [False, True])
@pytest.mark.parametrize("conv", [*CONVS, "low_pass", "two_hop", partial(SAGEConv, normalize=True)], ids=str)
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


@pytest.mark.parametrize("out_channels", [2, 9])
@pytest.mark.parametrize("conv", ["gcn", "sage", "graph"])
def test_autocast_gives_bfloat16_in_either_order(conv: str, out_channels: int) -> None:
    """3 x 2 columns are transformed first, 3 x 9 last."""
    moe = MoEConv(conv, 9, out_channels, num_experts=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, routing = moe(torch.randn(NODES, 9), graph()[1], return_routing=True)
    assert y.dtype == torch.bfloat16
    assert routing.scores.dtype == routing.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("conv", "backend"), [("gcn", "eager"), pytest.param("gatv2", "aot_eager", marks=pytest.mark.slow)]
)
def test_compiled_equals_eager(conv: str, backend: str) -> None:
    torch.compiler.reset()
    x, edge_index = graph()
    moe = layer(conv, router="expert_choice", k=2)
    compiled: Any = torch.compile(moe, backend=backend)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    outs = [moe(leaves[0], edge_index), compiled(leaves[1], edge_index)]
    torch.testing.assert_close(outs[1], outs[0])
    pairs = zip(outs, leaves, strict=True)
    gradients = [torch.autograd.grad(out.square().sum(), [leaf, *moe.parameters()]) for out, leaf in pairs]
    torch.testing.assert_close(gradients[1], gradients[0])


def test_losses_come_back_and_reach_the_router() -> None:
    x, edge_index = graph()
    moe = layer(router_kwargs={"balance": "switch", "z_coef": 0.1})
    _, routing = moe(x, edge_index, return_routing=True)
    assert set(routing.losses) == {"switch", "z"}
    aux_loss(routing).backward()
    assert moe.router is not None
    assert all(p.grad is not None and p.grad.any() for p in moe.router.parameters())
    with record_routing(moe) as routings:
        moe(x, edge_index)
    torch.testing.assert_close(aux_loss(routings), aux_loss(routing))


def test_a_given_routing_is_followed_without_the_router() -> None:
    x, edge_index = graph()
    moe = layer(router=None)
    given = routing_of(features(NODES, EXPERTS, seed=3).float())
    y, routing = moe(x, edge_index, routing=given, return_routing=True)
    assert routing is given
    for wrong, message in (
        (None, r"routing: got None, expected a Routing, since .* router=None"),
        (
            routing_of(torch.ones(NODES, 2)),
            "routing: got Routing.8 tokens, 2 experts.*expected a Routing of 8",
        ),
        ("token_choice", "routing: got 'token_choice', expected a Routing"),
    ):
        with pytest.raises(ValueError, match=message):
            moe(x, edge_index, routing=wrong)
    own = layer(router="token_choice")
    own(x, edge_index, routing=given).sum().backward()
    assert own.router is not None
    assert all(p.grad is None for p in own.router.parameters())
    own.experts.load_state_dict(moe.experts.state_dict())
    assert torch.equal(own(x, edge_index, routing=given), y)


def test_a_shared_expert_covers_nodes_without_another_and_counts_in_full() -> None:
    moe = layer(num_experts=4, shared_expert=True, router="expert_choice")
    plain = layer(num_experts=4, router="expert_choice")
    assert active_parameters(moe) - active_parameters(plain) == WIDTH * WIDTH + WIDTH + 1
    x, edge_index = graph()
    y, routing = moe(x, edge_index, return_routing=True)
    missed = torch.ones(NODES, dtype=torch.bool).index_fill(0, routing.token, False)
    assert missed.any()
    torch.testing.assert_close(y[missed], moe.shared_expert.expert(0)(x, edge_index)[missed])
    assert count_flops(moe, x, edge_index) > count_flops(plain, x, edge_index)


def test_repr() -> None:
    text = repr(layer("gat"))
    assert text.startswith("MoEConv(\n  4, 4, num_experts=3, router_input=('node',)")
    assert "TokenChoice(" in text
    assert "GATConv(4, 4, heads=1)" in text


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
        ({"num_experts": 2.0}, "num_experts: got 2.0, expected a whole number"),
        ({"router_input": "output"}, "router_input: got 'output', expected one of 'node', 'neighbors', 'degree'"),
        ({"router_input": ("node", "x")}, "router_input: got 'x', expected one of"),
        ({"router_input": ()}, "router_input: got nothing, expected"),
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
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer(**kwargs)


X = torch.randn(NODES, WIDTH)


@pytest.mark.parametrize("conv", ["gcn", "gat", "le"])
@pytest.mark.parametrize(
    ("x", "kwargs", "message"),
    [
        (torch.randn(NODES, 5), {}, r"x: got .*\(8, 5\).*expected \(number of nodes, 4\)"),
        (torch.randn(2, NODES, 4), {}, r"x: got .*\(2, 8, 4\).*expected \(number of nodes, 4\)"),
        (None, {}, "x: got NoneType, expected a tensor"),
        ((X, None), {}, r"(x|size): got .*, expected"),
        ((None, X), {}, r"x: got \['NoneType', 'Tensor'\], expected a tensor"),
        (X.to_sparse(), {}, r"x: got .*torch.sparse_coo, expected"),
        (X[None], {}, r"x: got nodes of shape .* see batch="),
        (X, {"size": (3, 3)}, r"size: got \(3, 3\), expected"),
        (X, {"return_attention_weights": True}, r"return_attention_weights: got True, expected None"),
        ([X], {}, r"x: got \['Tensor'\], expected a tensor"),
        (X.long(), {}, "x: got .*torch.int64"),
        (
            X.fill_(0.5),
            {"batch": torch.zeros(3, dtype=torch.long)},
            r"batch: got shape \(3,\) of torch.int64, expected one integer",
        ),
        (X, {"batch": [0] * NODES}, "batch: got list, expected one integer for each of 8 nodes"),
        (torch.full((NODES, WIDTH), torch.nan), {}, "x: got 32 values that are NaN or infinite, expected none"),
    ],
)
def test_bad_input(conv: str, x: Any, kwargs: dict[str, Any], message: str) -> None:
    moe = layer(conv, check_finite=True)
    with pytest.raises(ValueError, match=message):
        moe(x, graph()[1], **kwargs)
    if x is X:
        return
    with pytest.raises(ValueError, match="NaN"):  # check_finite is not lost on an instance
        layer(router=TokenChoice(WIDTH, EXPERTS), check_finite=True)(X * torch.nan, graph()[1])


def test_edge_arguments_that_no_conv_takes() -> None:
    x, edge_index = graph()
    weight, attr = torch.ones(edge_index.size(1)), torch.ones(edge_index.size(1), 1)
    with pytest.raises(ValueError, match="edge_weight: got a tensor, but the conv takes none"):
        layer("sage")(x, edge_index, edge_weight=weight)
    with pytest.raises(ValueError, match=r"edge_attr: got a tensor, but the conv takes \['edge_weight'\]"):
        layer(["gcn", "mlp", "le"])(x, edge_index, edge_attr=attr)
    with pytest.raises(ValueError, match="edge_weight: got list, expected a tensor"):
        layer("gcn")(x, edge_index, edge_weight=[1.0] * edge_index.size(1))
    with pytest.raises(ValueError, match=r"edge_weight: got shape \(13, 2\), expected \(13,\)"):
        layer("gcn")(x, edge_index, edge_weight=attr.expand(-1, 2))
