"""HeteroMoEConv against E separate sets of PyG's SAGEConvs, and what it promises as a layer."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gmoe import (
    ROUTERS,
    ExpertChoice,
    OracleRouter,
    RandomRouter,
    TokenChoice,
    UniformRouter,
    active_parameters,
    aux_loss,
    count_flops,
    record,
)
from gmoe.conv.hetero import HeteroMoEConv
from tests.gmoe.conv.hetero_reference import (
    COUNTS,
    METADATA,
    OUT,
    WIDTHS,
    Edges,
    Nodes,
    assert_all_close,
    assert_equals_masked,
    backward,
    csr,
    edges,
    nodes,
)
from tests.gmoe.conv.masked import features, routing_of

EXPERTS, WIDTH = 3, 4
TYPES = METADATA[0]
SHARE = [(router, experts) for router in (False, True) for experts in (False, True)]
SHARE_IDS = ["separate", "shared experts", "shared router", "shared both"]


def layer(widths: Any = WIDTH, **kwargs: Any) -> HeteroMoEConv:
    torch.manual_seed(0)
    return HeteroMoEConv(widths, OUT, METADATA, **{"num_experts": EXPERTS, **kwargs})


def routers_of(conv: HeteroMoEConv) -> dict[str, Any]:
    return dict(conv.routers.items()) if conv.router is None else {"all": conv.router}


# Equality with the reference


@pytest.mark.parametrize(("tie_routers", "tie_experts"), SHARE, ids=SHARE_IDS)
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("router", ROUTERS)
def test_equals_masked_pyg(router: str, k: int, tie_routers: bool, tie_experts: bool) -> None:
    conv = layer(router=router, k=k, tie_routers=tie_routers, tie_experts=tie_experts).double()
    assert_equals_masked(conv, nodes(WIDTH), edges())


@pytest.mark.parametrize("router_input", ["node", "neighbors", ("node", "neighbors")])
@pytest.mark.parametrize("out_types", [["paper"], ["author", "field"]], ids=str)
def test_equals_masked_pyg_with_every_option(out_types: list[str], router_input: Any) -> None:
    options: dict[str, Any] = {"balance": "switch", "balance_coef": 0.5, "z_coef": 0.1}
    conv = layer(WIDTHS, aggr="sum", router_input=router_input, out_types=out_types, router_kwargs=options).double()
    assert_equals_masked(conv, nodes(), edges())
    assert list(conv(nodes(), edges())) == out_types


def test_equals_masked_pyg_on_sparse_matrices() -> None:
    conv = layer(WIDTHS, k=2).double()
    sparse = {r: csr(e, COUNTS[r[0]], COUNTS[r[-1]]) for r, e in edges().items()}
    assert_equals_masked(conv, nodes(), sparse, reference_edges=edges())


@pytest.mark.parametrize("tie_experts", [False, True])
def test_follows_given_routings(tie_experts: bool) -> None:
    """Any weights, tokens without experts and experts without tokens included."""
    conv = layer(router=None, tie_experts=tie_experts).double()
    weights = {t: features(n, EXPERTS) for t, n in COUNTS.items()}
    for i, weight in enumerate(weights.values()):
        weight[0] = 0  # a token without an expert
        weight[:, i % EXPERTS] = 0  # an expert without a token
    assert_equals_masked(conv, nodes(WIDTH), edges(), weights=weights)
    follow = {t: routing_of(w) for t, w in weights.items()}
    y_dict = conv(nodes(WIDTH), edges(), routings=follow)
    assert all(bool((y[0] == 0).all()) for y in y_dict.values())


@st.composite
def graphs(draw: st.DrawFn) -> tuple[dict[str, int], Edges]:
    """Few nodes, some types without any; relations with few edges, without any, or absent."""
    counts = {t: draw(st.integers(0, 4)) for t in TYPES}
    found: Edges = {}
    for relation in METADATA[1]:
        num_src, num_dst = counts[relation[0]], counts[relation[-1]]
        some: st.SearchStrategy[list[tuple[int, int]]] = st.just([])
        if num_src and num_dst:
            some = st.lists(st.tuples(st.integers(0, num_src - 1), st.integers(0, num_dst - 1)), max_size=6)
        chosen = draw(st.none() | some)
        if chosen is not None:
            found[relation] = torch.tensor(chosen, dtype=torch.long).reshape(-1, 2).T.contiguous()
    return counts, found


@settings(max_examples=40, deadline=None)
@given(graphs(), st.sampled_from(["token_choice", "expert_choice"]), st.booleans(), st.booleans())
def test_equals_masked_pyg_on_any_graph(
    graph: tuple[dict[str, int], Edges], router: str, tie_routers: bool, tie_experts: bool
) -> None:
    counts, found = graph
    conv = layer(router=router, k=2, tie_routers=tie_routers, tie_experts=tie_experts).double()
    assert_equals_masked(conv, nodes(WIDTH, counts), found)


@pytest.mark.parametrize("backend", ["loop", "padded", "grouped"])
def test_backends_agree(backend: Any) -> None:
    xs = {t: x.float() for t, x in nodes().items()}
    conv = layer(WIDTHS, k=2, backend=backend)
    assert_all_close(conv(xs, edges()), layer(WIDTHS, k=2).double()(nodes(), edges()), atol=1e-5)


# Symmetries


@pytest.mark.parametrize(("tie_routers", "tie_experts"), SHARE, ids=SHARE_IDS)
@pytest.mark.parametrize("router", ROUTERS)
def test_follows_permutations_of_the_nodes(router: str, tie_routers: bool, tie_experts: bool) -> None:
    conv = layer(router=router, k=2, tie_routers=tie_routers, tie_experts=tie_experts).double()
    order = {t: torch.randperm(n, generator=torch.Generator().manual_seed(n)) for t, n in COUNTS.items()}
    place = {t: o.argsort() for t, o in order.items()}
    moved = {r: torch.stack([place[r[0]][e[0]], place[r[-1]][e[1]]]) for r, e in edges().items()}
    expected = conv(nodes(WIDTH), edges())
    actual = conv({t: x[order[t]] for t, x in nodes(WIDTH).items()}, moved)
    assert_all_close(actual, {t: y[order[t]] for t, y in expected.items()})


@pytest.mark.parametrize(("tie_routers", "tie_experts"), SHARE, ids=SHARE_IDS)
def test_experts_can_be_renumbered(tie_routers: bool, tie_experts: bool) -> None:
    conv = layer(k=2, tie_routers=tie_routers, tie_experts=tie_experts).double()
    expected, before = conv(nodes(WIDTH), edges(), return_routing=True)
    new = torch.tensor([2, 0, 1])
    with torch.no_grad():
        for parameter in (*conv.experts.parameters(), *(p for r in routers_of(conv).values() for p in r.parameters())):
            parameter.copy_(parameter[new])  # experts, and rows of the gates
    actual, after = conv(nodes(WIDTH), edges(), return_routing=True)
    assert_all_close(actual, expected)
    for t in TYPES:
        assert torch.equal(after[t].load, before[t].load[new])


# Routers


@pytest.mark.parametrize("router_input", ["node", "neighbors", ("node", "neighbors")])
@pytest.mark.parametrize("tie_routers", [False, True])
def test_router_input(router_input: Any, tie_routers: bool) -> None:
    """Separate routers see each aggregate, a shared one their mean; and the types are its pools."""
    types = ["paper", "author", "field"]
    conv = layer(router_input=router_input, tie_routers=tie_routers, out_types=types).double()
    xs, found = nodes(WIDTH), edges()

    def mean(relation: Any) -> Tensor:
        src, dst = found[relation]
        adjacency = torch.zeros(COUNTS[relation[-1]], COUNTS[relation[0]], dtype=torch.float64)
        adjacency.index_put_((dst, src), torch.ones(len(src), dtype=torch.float64), accumulate=True)
        return adjacency @ xs[relation[0]] / adjacency.sum(dim=1, keepdim=True).clamp(min=1)

    expected = []
    for t in types:
        aggregates = [mean(r) for r in METADATA[1] if r[-1] == t]
        if tie_routers:
            aggregates = [torch.stack(aggregates).mean(dim=0)]
        parts = {"node": [xs[t]], "neighbors": aggregates}.get(router_input, [xs[t], *aggregates])
        expected.append(torch.cat(parts, dim=1))
    calls: list[tuple[Any, ...]] = []
    for router in routers_of(conv).values():
        router.register_forward_pre_hook(lambda _, args: calls.append(args))
    conv(xs, found)
    if not tie_routers:
        torch.testing.assert_close([call[0] for call in calls], expected)
        return
    ((seen, pool),) = calls
    torch.testing.assert_close(seen, torch.cat(expected))
    assert [len(part) for part in pool.split([COUNTS[t] for t in types])] == torch.unique(pool, return_counts=True)[
        1
    ].tolist()


def test_separate_routers_are_separate() -> None:
    conv = layer(WIDTHS, router_input=("node", "neighbors"))
    dims = {t: r.dim for t, r in routers_of(conv).items()}
    assert dims == {"paper": 4 + 3 + 4 + 2, "author": 3 + 4, "field": 5 + 4, "venue": 2}
    assert len({id(p) for p in conv.routers.parameters()}) == len(TYPES)


def test_a_shared_router_decides_once() -> None:
    """Counters advance once a step, node types are pools, and the losses are counted once."""
    kwargs: dict[str, Any] = {"balance": "switch", "balance_coef": 0.5, "z_coef": 0.1}
    conv = layer(tie_routers=True, router_kwargs=kwargs).double()
    with record(conv) as recorded:
        _, routings = conv(nodes(WIDTH), edges(), return_routing=True)
    (together,) = recorded
    torch.testing.assert_close(aux_loss(routings.values()), together.aux_loss)
    torch.testing.assert_close(torch.cat([r.to_dense() for r in routings.values()]), together.to_dense())
    assert {t: r.num_tokens for t, r in routings.items()} == COUNTS

    chosen = layer(tie_routers=True, router="expert_choice").double()(nodes(WIDTH), edges(), return_routing=True)[1]
    assert {t: r.load.tolist() for t, r in chosen.items()} == {
        t: [-(-n // EXPERTS)] * EXPERTS for t, n in COUNTS.items()
    }

    biased = layer(tie_routers=True, router_kwargs={"balance": "bias", "bias_rate": 0.25})
    for _ in range(2):  # the first step's load moves the bias in the second
        biased({t: x.float() for t, x in nodes(WIDTH).items()}, edges())
    bias: Any = biased.router
    assert set(bias.bias_E.tolist()) <= {-0.25, 0.0, 0.25}
    assert bias.last_load_E.sum() == sum(COUNTS.values())


def test_separate_routers_are_recorded_in_order() -> None:
    conv = layer(router_kwargs={"balance": "switch"})
    with record(conv) as recorded:
        _, routings = conv({t: x.float() for t, x in nodes(WIDTH).items()}, edges(), return_routing=True)
    assert [r.num_tokens for r in recorded] == list(COUNTS.values())
    assert all(own is other for own, other in zip(routings.values(), recorded, strict=True))
    torch.testing.assert_close(
        aux_loss(recorded), torch.stack([r.losses["switch"].value for r in recorded]).sum() / 100
    )


@pytest.mark.parametrize("tie_routers", [False, True])
@pytest.mark.parametrize("router", ["token_choice", "expert_choice", "attention_vote"])
def test_batch_mates_do_not_matter(router: str, tie_routers: bool) -> None:
    conv = layer(router=router, tie_routers=tie_routers).double()
    other = {t: 2 * n for t, n in COUNTS.items()}
    graphs = [(nodes(WIDTH), edges()), (nodes(WIDTH, other, seed=9), edges(other, seed=9))]
    alone = [conv(*graph) for graph in graphs]
    xs = {t: torch.cat([graph[0][t] for graph in graphs]) for t in TYPES}
    shift = {r: torch.tensor([[COUNTS[r[0]]], [COUNTS[r[-1]]]]) for r in METADATA[1]}
    found = {r: torch.cat([graphs[0][1][r], graphs[1][1][r] + shift[r]], dim=1) for r in METADATA[1]}
    batch = {t: torch.tensor([0] * n + [1] * other[t]) for t, n in COUNTS.items()}
    assert_all_close(conv(xs, found, batch_dict=batch), {t: torch.cat([y[t] for y in alone]) for t in TYPES})


@pytest.mark.parametrize("tie_routers", [False, True])
def test_oracle_and_instances(tie_routers: bool) -> None:
    assignment = {t: torch.arange(n) % EXPERTS for t, n in COUNTS.items()}
    router: Any = {t: OracleRouter(WIDTH, EXPERTS, a) for t, a in assignment.items()}
    if tie_routers:
        router = OracleRouter(WIDTH, EXPERTS, torch.cat(list(assignment.values())))
    conv = layer(router=router, tie_routers=tie_routers, router_input="node").double()
    _, routings = conv(nodes(WIDTH), edges(), return_routing=True)
    for t, routing in routings.items():
        assert torch.equal(routing.to_dense().argmax(dim=1), assignment[t])
    assert_equals_masked(conv, nodes(WIDTH), edges())


def test_router_of_each_type() -> None:
    router: Any = {
        "paper": "expert_choice",
        "author": UniformRouter,
        "field": partial(TokenChoice, k=2),
        "venue": "random",
    }
    conv = layer(WIDTHS, router=router)
    kinds = {t: type(r) for t, r in routers_of(conv).items()}
    assert kinds == {"paper": ExpertChoice, "author": UniformRouter, "field": TokenChoice, "venue": RandomRouter}
    assert conv.experts_per_token == (1 + EXPERTS + 2 + 1) / 4


def test_check_finite_reaches_the_routers() -> None:
    xs = {t: x.float() for t, x in nodes(WIDTH).items()}
    xs["field"][1, 1] = torch.nan
    for tie_routers in (False, True):
        layer(tie_routers=tie_routers)(xs, edges())
        with pytest.raises(ValueError, match=r"x: got .* NaN"):
            layer(tie_routers=tie_routers, check_finite=True)(xs, edges())


# The layer as a module


def test_each_part_is_initialised_as_a_linear_layer_of_its_own() -> None:
    torch.manual_seed(3)
    conv = HeteroMoEConv(WIDTHS, OUT, METADATA, EXPERTS, router=None)
    torch.manual_seed(3)
    parts = [(WIDTHS[t], True) for t in TYPES] + [
        (WIDTHS[r[0]], False) for t in TYPES for r in METADATA[1] if r[-1] == t
    ]
    for experts, (width, bias) in zip(
        (*conv.experts.root.children(), *conv.experts.relation.children()), parts, strict=True
    ):
        for expert in range(EXPERTS):
            linear = nn.Linear(width, OUT, bias=bias)
            assert torch.equal(experts.weight[expert], linear.weight.T)
            assert not bias or torch.equal(experts.bias[expert], linear.bias)


@pytest.mark.parametrize("tie_routers", [False, True])
def test_reset_parameters(tie_routers: bool) -> None:
    conv = layer(tie_routers=tie_routers, tie_experts=tie_routers)
    before = {name: p.clone() for name, p in conv.named_parameters()}
    conv.reset_parameters()
    assert not any(torch.equal(p, before[name]) for name, p in conv.named_parameters())


def test_expert_is_a_detached_copy() -> None:
    conv = layer(WIDTHS, router=None).double().eval()
    state = torch.get_rng_state()
    for index in range(EXPERTS):
        dense = conv.expert(index)
        assert not dense.training
        weight = {t: torch.zeros(n, EXPERTS, dtype=torch.float64) for t, n in COUNTS.items()}
        for w in weight.values():
            w[:, index] = 1
        follow = {t: routing_of(w) for t, w in weight.items()}
        before = conv(nodes(), edges(), routings=follow)
        assert_all_close(dense(nodes(), edges()), before)
        with torch.no_grad():
            for parameter in dense.parameters():
                parameter.add_(1.0)
        assert_all_close(conv(nodes(), edges(), routings=follow), before, atol=0.0)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match=r"index: got 3, expected 0\.\.num_experts-1=2"):
        conv.expert(EXPERTS)


@pytest.mark.parametrize("tie_routers", [False, True])
def test_state_dict_copies_and_pickles(tie_routers: bool) -> None:
    conv = layer(router="expert_choice", tie_routers=tie_routers, tie_experts=tie_routers).double()
    expected = conv(nodes(WIDTH), edges())
    torch.manual_seed(7)
    other = HeteroMoEConv(
        WIDTH, OUT, METADATA, EXPERTS, "expert_choice", tie_routers=tie_routers, tie_experts=tie_routers
    ).double()
    other.load_state_dict(conv.state_dict())
    for copied in (other, copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert_all_close(copied(nodes(WIDTH), edges()), expected, atol=0.0)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.mul_(2)
    assert_all_close(conv(nodes(WIDTH), edges()), expected, atol=0.0)
    assert len({id(v.untyped_storage()) for v in conv.state_dict().values()}) == len(conv.state_dict())  # none is tied
    held = next(iter(routers_of(copy.deepcopy(conv)).values()))
    assert held is not next(iter(routers_of(conv).values()))


@pytest.mark.parametrize("sparse", [False, True], ids=["edge_index", "csr"])
@pytest.mark.parametrize("aggr", ["mean", "sum"])
def test_autocast(aggr: Any, sparse: bool) -> None:
    conv = layer(WIDTHS, aggr=aggr)
    found = edges()
    if sparse:
        found = {r: csr(e, COUNTS[r[0]], COUNTS[r[-1]], dtype=torch.float32) for r, e in found.items()}
    with torch.no_grad():
        exact, routings = conv({t: x.float() for t, x in nodes().items()}, found, return_routing=True)
    atol = 0.05 * max(y.abs().max().item() for y in exact.values())
    for dtype in (torch.float32, torch.bfloat16):
        xs = {t: x.to(dtype).requires_grad_() for t, x in nodes().items()}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y_dict = conv(xs, found, routings=routings)
        assert all(y.dtype == torch.bfloat16 for y in y_dict.values())
        assert_all_close({t: y.float() for t, y in y_dict.items()}, exact, atol)
        backward({t: y.float() for t, y in y_dict.items()})
        assert all(x.grad is not None and x.grad.dtype == dtype for x in xs.values())


# Cost


def test_active_parameters_follow_k() -> None:
    for tie_routers, tie_experts in SHARE:
        kwargs: dict[str, Any] = {"num_experts": 8, "tie_routers": tie_routers, "tie_experts": tie_experts}
        conv = layer(k=2, **kwargs)
        one = sum(p.numel() for p in conv.expert(0).parameters())
        gates = sum(p.numel() for router in routers_of(conv).values() for p in router.parameters())
        assert sum(p.numel() for p in conv.parameters()) == 8 * one + gates
        assert active_parameters(conv) == 2 * one + gates
    assert active_parameters(layer(router="uniform", num_experts=8)) == 8 * one_expert(num_experts=8)


def one_expert(**kwargs: Any) -> int:
    return sum(p.numel() for p in layer(**kwargs).expert(0).parameters())


def test_flops_follow_k() -> None:
    """The same for any E; K times the products, and the aggregation once; and at K = 1 a dense layer's."""
    xs: Nodes = {t: x.float() for t, x in nodes(WIDTH).items()}

    def flops(num_experts: int, k: int) -> int:
        conv = layer(num_experts=num_experts, router=None, k=k)
        weight = {t: torch.arange(num_experts).expand(n, -1) < k for t, n in COUNTS.items()}
        return count_flops(conv, xs, edges(), routings={t: routing_of(w.float()) for t, w in weight.items()})

    assert flops(2, 1) == flops(16, 1)
    assert flops(2, 2) == flops(16, 2)
    products = 2 * OUT * WIDTH * (COUNTS["paper"] * 4 + COUNTS["author"] * 2 + COUNTS["field"] * 2 + COUNTS["venue"])
    combining = OUT * sum(COUNTS.values())
    assert flops(16, 2) - flops(16, 1) == products + combining
    assert count_flops(layer().expert(0), xs, edges()) == flops(16, 1) - combining


# Errors


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_experts": 0}, "num_experts: got 0, expected at least 1"),
        ({"k": 4}, "k: got 4, expected at most num_experts=3"),
        ({"out_channels": 0}, "out_channels: got 0"),
        ({"router_input": "degree"}, "router_input: got 'degree', expected 'node', 'neighbors', or both of them"),
        ({"router_input": ()}, "router_input: got (), expected 'node', 'neighbors', or both of them"),
        (
            {"router_input": "neighbors"},
            "router_input: got 'neighbors', expected 'node' or both, since no relation ends in 'venue'",
        ),
        ({"backend": "magic"}, "backend: got 'magic'"),
        ({"aggr": "max"}, "aggr: got 'max', expected one of 'mean', 'sum'"),
        ({"router": "choice"}, "router: got 'choice', expected one of 'token_choice'"),
        (
            {"router": {"paper": "random"}},
            "router: got a dict for ['paper'], expected one router for each of ['paper', 'author'",
        ),
        (
            {"router": dict.fromkeys(TYPES, "random"), "tie_routers": True},
            "'venue'], expected one router, since tie_routers=True",
        ),
        ({"router": TokenChoice(4, 3)}, "router: got one instance for several node types"),
        ({"router": dict.fromkeys(TYPES, TokenChoice(4, 3))}, "router: got one instance for several node types"),
        (
            {"router": "attention_vote", "router_kwargs": {"scope": "neighbours"}},
            "router: got scope='neighbours', expected scope='pool', since neighbors differ in type",
        ),
        (
            {"in_channels": WIDTHS, "tie_routers": True},
            "with tie_routers=True, expected one width for all node types",
        ),
        ({"in_channels": WIDTHS, "tie_experts": True}, "expected one width for all node types"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_errors_of_the_constructor(kwargs: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "in_channels": WIDTH,
        "out_channels": OUT,
        "metadata": METADATA,
        "num_experts": EXPERTS,
    }
    with pytest.raises(ValueError) as error:  # noqa: PT011
        HeteroMoEConv(**{**arguments, **kwargs})
    assert message in str(error.value)


def test_errors_of_a_call() -> None:
    xs, found = nodes(WIDTH), edges()
    conv = layer().double()
    with pytest.raises(ValueError, match=r"batch_dict\['field'\]: batch: got shape \(2,\)"):
        conv(xs, found, batch_dict={"field": torch.zeros(2, dtype=torch.long)})
    with pytest.raises(ValueError, match="routings: got None, expected one of each node type, since router=None"):
        layer(router=None).double()(xs, found)
    _, routings = conv(xs, found, return_routing=True)
    with pytest.raises(ValueError, match=r"routings\['venue'\]: got None tokens and experts, expected \(4, 3\)"):
        conv(xs, found, routings={t: r for t, r in routings.items() if t != "venue"})
    with pytest.raises(ValueError, match=r"routings\['paper'\]: got \(5, 3\) tokens and experts, expected \(7, 3\)"):
        conv(xs, found, routings={**routings, "paper": routings["author"]})
